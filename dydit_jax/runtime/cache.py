"""Where things lie that can be made or fetched again: downloads, converted weights, calibrations, compiled programs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return $DYDIT_JAX_CACHE, or ~/.cache/dydit-jax."""
    return Path(os.environ.get("DYDIT_JAX_CACHE") or Path.home() / ".cache" / "dydit-jax")
