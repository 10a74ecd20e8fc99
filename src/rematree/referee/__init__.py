"""One training step with given decisions, run on fake tensors: its memory over time, its peak, its seconds."""
