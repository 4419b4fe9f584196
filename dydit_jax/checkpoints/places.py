"""Places of one machine in what describes weights: a reader elsewhere has no use for them, and they say who made them.

Work directories keep whole paths, since a run goes on from them. A file of weights is passed on, so its record of what
made it has no folder of that machine; what is pushed to a hub names none at all, see `adapters.published_file`.
"""

import re

# A folder from the root, of a user, of a drive or a share, or in somebody's storage: gs://, s3://, file://.
PLACE = re.compile(r"/|~[\w.-]*[\\/]|[A-Za-z]:[\\/]|\\\\|(?!hf:|https?:)[A-Za-z][\w+.-]*://")
SECRETS = re.compile(r"(?<=://)[^/@]*@|\?[^#]*")  # an account or a signature in an address
NAMES = "class_names"  # which are no paths, whatever they look like


def without_places(described):
    """Return JSON with every path of a machine reduced to its last name, and addresses without accounts or queries."""
    if isinstance(described, dict):
        return {key: value if key == NAMES else without_places(value) for key, value in described.items()}
    if isinstance(described, list | tuple):
        return [without_places(value) for value in described]
    if not isinstance(described, str):
        return described
    if PLACE.match(described):
        return re.split(r"[\\/]", described.rstrip("\\/"))[-1]
    return SECRETS.sub("", described) if described.startswith(("https://", "http://")) else described
