#!/usr/bin/env bash
# Install this clone into .venv with a Python 3.12 that is brought along: the images of TPU VMs have 3.10.
#
#     launch/install.sh tpu
#
# The argument is an extra of pyproject.toml, or several with commas. `uv` fetches Python and the packages.
set -euo pipefail
cd "$(dirname "$0")/.."
extras="${1:?name an extra, such as tpu}"
export PATH="$HOME/.local/bin:$PATH"
command -v uv >/dev/null || python3 -m pip install --quiet --user uv
uv venv --quiet --allow-existing --managed-python --python 3.12 .venv
uv pip install --quiet --python .venv/bin/python --editable ".[$extras]"
