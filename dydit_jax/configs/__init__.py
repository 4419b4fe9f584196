"""One file = one experiment, each with a function `get_config`; default.py lists every key."""
