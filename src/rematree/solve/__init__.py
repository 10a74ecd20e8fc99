"""From what was observed to decisions: the frontier of one block, then the chain of all blocks."""
