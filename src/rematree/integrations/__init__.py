"""Other libraries' training loops and layers. What need not be installed is imported here and nowhere else."""
