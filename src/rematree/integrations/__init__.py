"""Libraries that need not be installed: each is imported here and nowhere else, and only when it is asked for."""
