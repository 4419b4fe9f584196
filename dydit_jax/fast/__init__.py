"""Fast sampling: compute only what is open, with the same result."""
