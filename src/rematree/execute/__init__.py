"""Run a plan on a live model: recompute, save, keep masks, chunk the loss; and take it off again."""
