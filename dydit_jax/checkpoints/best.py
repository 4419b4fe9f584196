"""Which checkpoint of a run is the best, as the training that measures its EMA has written it.

<workdir>/best.json    step and value of the best checkpoint, all values by step, and how they were measured
"""

from dydit_jax.errors import InputError
from dydit_jax.runtime.files import locate, read_json

BEST_FILE = "best.json"
REMEDY = "remove it, which forgets what was measured"


def read_best(workdir) -> dict | None:
    """Read what is known of a run's best checkpoint.

    Returns:
      The record, with its "step", and the measured values "by_step", {step: value}; None where nothing was measured.

    Raises:
      InputError: a file that is damaged.
    """
    path = locate(workdir) / BEST_FILE
    if not path.exists():
        return None
    record = read_json(path, remedy=REMEDY)
    values = record.get("by_step")
    if not isinstance(values, dict) or not all(key.isdecimal() and type(values[key]) is float for key in values):
        raise InputError(f"{path} holds no values by step; {REMEDY}.")
    if type(record.get("step")) is not int:
        raise InputError(f"{path} names no step of the best checkpoint; {REMEDY}.")
    return record | dict(by_step={int(key): value for key, value in values.items()})
