"""train.py, with the routers of the study: `model.time_router` and `model.token_router` may name them."""

import study_routers  # noqa: F401 (registers them)

from dydit_jax.cli.train import main

if __name__ == "__main__":
    main()
