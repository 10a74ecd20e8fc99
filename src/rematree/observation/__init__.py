"""A twin of the model on fake tensors, also for a device that is not here."""
