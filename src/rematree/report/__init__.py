"""What plans, frontiers and measurements look like, on a terminal, in a pipe and as JSON."""
