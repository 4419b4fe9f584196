"""A finished folder goes to Hugging Face, with a model card: what it is, what made it, what was measured.

A finished folder is a run's work directory after its last step, a folder of converted weights, or one that
`--export diffusers` wrote. Only files of the model are sent, in one commit, and nothing is replaced unless asked for.
What they say of this machine's folders is left out.
"""

import json
import logging
import re
import tempfile
from pathlib import Path

from dydit_jax.checkpoints import (
    ADAPTER_FORMAT,
    WEIGHTS_FILE,
    Weights,
    checksum,
    format_of,
    load_adapter,
    load_weights,
    published_file,
    without_places,
)
from dydit_jax.convert.diffusers_layout import AUTOENCODER, INDEX_FILE
from dydit_jax.convert.diffusers_scheduler import SCHEDULER, TRANSFORMER
from dydit_jax.convert.hub import HUB, split_hub_address
from dydit_jax.convert.published import hub_reason
from dydit_jax.errors import InputError, some_of
from dydit_jax.labels import find_by_name, index_names
from dydit_jax.models.cost import format_count
from dydit_jax.models.dit import count_parameters
from dydit_jax.runtime.files import read_json, require_local

logger = logging.getLogger(__name__)

CARD_FILE, EVALUATION_FILE = "README.md", "evaluation.json"
METRICS = dict(fid="FID", sfid="sFID", inception_score="Inception score", precision="precision", recall="recall")
SHOWN_CLASSES = 20
# Of a folder of DiTPipeline.
PARTS, FILES = (TRANSFORMER, AUTOENCODER, SCHEDULER), re.compile(r"\w[\w.-]*\.(json|safetensors|bin)")
FRONT = """---
library_name: {library}
pipeline_tag: unconditional-image-generation
tags: [diffusion, dit, class-conditional]
---
"""


def push(folder, address: str, *, overwrite: bool = False) -> str:
    """Send a finished folder to a repository, which is made where there is none.

    Args:
      folder: see the module.
      address: hf://owner/name.
      overwrite: whether files of these names that are there are replaced.

    Returns:
      The address of the commit's page.

    Raises:
      InputError: a folder that is not finished, files that are there, no right to write, or no network.
    """
    if not str(address).startswith(HUB) or any(split_hub_address(address)[1:]):
        raise InputError(f"--push wants hf://owner/name, not {address}.")
    folder = require_local(folder)
    with tempfile.TemporaryDirectory() as copies:
        files = finished_files(folder, Path(copies))
        card = files.pop(CARD_FILE, None) or model_card(folder, files, address).encode()
        return _send({**files, CARD_FILE: card}, folder, address, overwrite)


def _send(files: dict, folder, address: str, overwrite: bool) -> str:
    """Send files, by name, in one commit; return the address of its page."""
    import huggingface_hub

    repository, api = split_hub_address(address)[0], huggingface_hub.HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        there = {file.rfilename for file in api.model_info(repository).siblings or []}
        taken = sorted(there & files.keys())
        if taken and not overwrite:
            raise InputError(f"{address} has {some_of(taken)} already; give --overwrite to replace it.")
        add = huggingface_hub.CommitOperationAdd
        operations = [add(name, content) for name, content in files.items()]
        commit = api.create_commit(repository, operations, commit_message="Add the model")
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 (the hub's and the network's errors have no common base)
        raise InputError(f"{folder} can't be sent to {address}: {hub_reason(error)}.") from error
    logger.info("Sent %d files to %s.", len(operations), commit.commit_url)
    return str(commit.commit_url)


def finished_files(folder: Path, copies: Path) -> dict:
    """Return the files of a finished folder's model by their names in it.

    Args:
      folder: see the module. What else lies in it stays here.
      copies: a folder for weights of ours that this machine's folders are taken out of.

    Raises:
      InputError: a folder that is none, or not finished.
    """
    if (folder / INDEX_FILE).is_file():
        found = [folder / INDEX_FILE, folder / CARD_FILE]
        found += [path for part in PARTS for path in sorted((folder / part).glob("*")) if FILES.fullmatch(path.name)]
        return {path.relative_to(folder).as_posix(): str(path) for path in found if path.is_file()}
    if not (folder / WEIGHTS_FILE).is_file():
        raise InputError(
            f"{folder} is not finished: it has neither {WEIGHTS_FILE}, which the last step of a training writes, nor "
            f"{INDEX_FILE}."
        )
    card = {CARD_FILE: str(folder / CARD_FILE)} if (folder / CARD_FILE).is_file() else {}
    return {WEIGHTS_FILE: str(published_file(folder / WEIGHTS_FILE, copies)), **card}


# --- The card ------------------------------------------------------------------------------------


def model_card(folder: Path, files: dict, address: str) -> str:
    """Write the card of a finished folder, in Markdown, from its files that are sent."""
    is_pipeline = INDEX_FILE in files
    front = FRONT.format(library="diffusers" if is_pipeline else "dydit-jax")
    name = address.rpartition("/")[2]
    parts = [_pipeline_use(address)] if is_pipeline else _parts(files[WEIGHTS_FILE], address)
    return "\n".join([front, f"# {name}\n", *parts, *_measured(folder)])


def _parts(path: str, address: str) -> list[str]:
    is_adapter = format_of(path) == ADAPTER_FORMAT
    weights, base = load_adapter(path) if is_adapter else (load_weights(path), {})
    config, about = weights.model, weights.about
    kind = "static DiT" if config.routers == "none" else f"DyDiT (routers {config.routers})"
    what = (
        f"A {kind}: depth {config.depth}, width {config.width}, {config.heads} heads, patch {config.patch}, input "
        f"{config.side} x {config.side} x {config.channels}; {format_count(count_parameters(config))} parameters, "
        f"{format_count(config.macs.complete)} MACs per image and pass with every gate open. SHA-256 of the weights: "
        f"`{checksum(weights.params)}`.\n"
    )
    adapted = [f"An adapter alone: it needs its base, {base.get('checkpoint')}.\n"] if is_adapter else []
    return [what, *adapted, _use(weights, address), _classes(weights), _made(about)]


def _use(weights: Weights, address: str) -> str:
    names = weights.class_names
    is_known = names and not names[0].isdecimal() and find_by_name(names[0], index_names(names)) == [0]
    label = repr(names[0]) if is_known else "0"
    return (
        "```python\nfrom dydit_jax import Pipeline\n\n"
        f'pipe = Pipeline.load("{address}")\npipe([{label}], seed=1).pictures[0].save("picture.png")\n```\n'
    )


def _pipeline_use(address: str) -> str:
    name = address.removeprefix(HUB)
    return (
        "A static DiT, exported from dydit-jax.\n\n"
        f'```python\nfrom diffusers import DiTPipeline\n\npipe = DiTPipeline.from_pretrained("{name}")\n```\n'
    )


def _classes(weights: Weights) -> str:
    names = some_of(weights.class_names, most=SHOWN_CLASSES)
    return f"{weights.model.classes} classes{': ' + names if names else ''}.\n"


def _made(about: dict) -> str:
    """Say what made weights: a training, with its config, or a conversion."""
    config, lines = about.get("config") or {}, []
    train = config.get("train") or {}
    if train:
        start = f", from {train['init_from']}" if train.get("init_from") else ""
        data = (config.get("data") or {}).get("name")
        lines.append(f"Trained for {about.get('step')} steps on data of the kind `{data}`{start}.")
    if about.get("source"):
        lines.append(f"Converted from `{about.get('origin') or about['source']}`.")
    versions = ", ".join(f"{name} {version}" for name, version in (about.get("versions") or {}).items())
    if versions:
        lines.append(f"Versions: {versions}.")
    if config:
        shown = f"```json\n{json.dumps(config, indent=1)}\n```"
        lines.append(f"\n<details><summary>Config</summary>\n\n{shown}\n</details>")
    return "## What made it\n\n" + "\n".join(lines) + "\n"


def _measured(folder: Path) -> list[str]:
    """Return the metrics that `evaluate.py` wrote into a folder, as a table; [] where it has none."""
    path = folder / EVALUATION_FILE
    if not path.is_file():
        return []
    rows = []
    for record in without_places(read_json(path, kind=list)):
        values = [f"{name} {record[key]:.4g}" for key, name in METRICS.items() if record.get(key) is not None]
        reference = (record.get("reference") or {}).get("name", "nothing")
        images = (record.get("samples") or {}).get("count")
        rows.append(f"| {', '.join(values)} | {images} | {reference} | {record.get('date', '')} |")
    return ["## Measured\n", "| what | images | against | date |\n|---|---|---|---|", *rows, ""]
