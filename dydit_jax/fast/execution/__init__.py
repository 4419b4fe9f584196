"""Ways to run only the open tokens: one file per backend, and the registry of all."""
