"""Seconds of operations, measured on the device that is here or from the published rates of one that is not."""
