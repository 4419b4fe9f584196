"""From a checked config to updated parameters."""
