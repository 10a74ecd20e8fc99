"""What one rank holds under DeepSpeed's ZeRO: `stage2` from the timeline of one process, `stage3` within the step."""
