"""What this project exists for: computing only what is on, with the same result."""
