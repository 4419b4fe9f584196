"""Networks, routers and their cost."""
