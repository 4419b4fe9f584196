"""Checkpoints by address: hf://owner/name[/<file or folder>][@<revision>], and plain https addresses.

Naming one is asking for it: it is fetched once, checked as a published file is (`published`), converted where it is not
ours, and found without a network from then on. A repository may hold weights of ours, a `DiTPipeline` of diffusers, one
of its models, or files that are named one by one. A revision is a branch, a tag or a commit, "main" where none is
named; all files of an address are those of one commit. A plain address may end with #sha256=<checksum>.

    <cache>/hub/<owner>/<name>/<commit>/...      files, as they are there, with their checksums
    <cache>/addresses/<digest>/<file>            files of plain addresses
    <...>.<its checksum>.converted.safetensors   what was made of them; of a folder without the checksum
    <cache>/addresses/<digest>.json              where an address was found to lead
"""

import hashlib
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from dydit_jax.checkpoints import ADAPTER_FORMAT, FORMAT, WEIGHTS_FILE, format_of, is_autoencoder_format
from dydit_jax.convert.diffusers_layout import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILES, is_index
from dydit_jax.convert.diffusers_scheduler import TRANSFORMER, scheduler_beside
from dydit_jax.convert.published import Published, checksum_of, fetch_file, hub_reason, naming_fetched, noted_checksum
from dydit_jax.errors import InputError, some_of
from dydit_jax.runtime.cache import cache_folder
from dydit_jax.runtime.files import hold_lock, read_json, write_json

logger = logging.getLogger(__name__)

HUB, PLAIN = "hf://", ("https://", "http://")
HUGGING_FACE = "https://huggingface.co"
CHECKSUM_MARK = "#sha256="
SHOWN_DIGITS = 16  # of a checksum, in names of files
LICENCE = "see its page"
CONVERTED = ".converted.safetensors"


def is_address(text) -> bool:
    """Return whether a checkpoint's name is an address."""
    return str(text).startswith((HUB, *PLAIN))


def local_file(address: str, convert: Callable[[Path, Path, str], None]) -> Path:
    """Return the file of ours that an address leads to, fetching and converting it if it is not there.

    Args:
      address: see the module.
      convert: writes weights of ours; is given the source, a file or a folder of diffusers', the file to write, and the
        address with the commit that it was found to lead to.

    Raises:
      InputError: no such repository or file, one that needs a token, another checksum, or nothing to convert.
    """
    if found := known_file(address):
        return found
    record = _record_of(address)
    with hold_lock(record.with_suffix(".lock"), to=f"to fetch {address}"):
        if found := known_file(address):  # the process that held the lock has fetched it
            return found
        source, exact = _fetch_from_hub(address) if address.startswith(HUB) else (_fetch_plain(address), address)
        found = _file_of_ours(source, lambda out: convert(source, out, exact))
        # Within the cache, which may be moved.
        write_json(record, dict(address=address, exact=exact, path=str(found.relative_to(cache_folder()))))
    return found


def known_file(address: str) -> Path | None:
    """Return the file of ours that an address was found to lead to; None where it is not here, or another by now."""
    record = _record_of(address)
    path = read_json(record, remedy="remove it").get("path") if record.is_file() else None
    found = cache_folder() / path if isinstance(path, str) else None
    if found is None or not found.is_file():
        return None
    wanted = address.partition(CHECKSUM_MARK)[2].lower()
    return None if wanted and noted_checksum(found) not in ("", wanted) else found


def _file_of_ours(source: Path, convert: Callable[[Path], None]) -> Path:
    """Return what was fetched where that is ours, else what is made of it, in a file that its checksum names."""
    with naming_fetched(source):
        if source.is_dir():
            found = source.with_name(source.name + CONVERTED)
        elif _is_ours(source):
            return source
        else:
            checksum = noted_checksum(source) or checksum_of(source)
            found = source.with_name(f"{source.name}.{checksum[:SHOWN_DIGITS]}{CONVERTED}")
        if not found.is_file():
            convert(found)
    return found


def _record_of(address: str) -> Path:
    hub = _other_hub() if address.startswith(HUB) else ""
    return cache_folder() / "addresses" / f"{_digest(hub + address)}.json"


def _other_hub() -> str:
    """Return the address of the hub where it is another one than Hugging Face, else ""."""
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    return "" if endpoint == HUGGING_FACE else endpoint


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:SHOWN_DIGITS]


def _is_ours(path: Path) -> bool:
    if path.suffix != ".safetensors":
        return False
    name = format_of(path)
    return name in (FORMAT, ADAPTER_FORMAT) or is_autoencoder_format(name)


# --- Plain addresses -----------------------------------------------------------------------------


def _fetch_plain(address: str) -> Path:
    """Fetch the file of a plain address, whatever its checksum, and then compare it with the one that is asked for."""
    address, _, fragment = address.partition("#")
    match = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)
    if fragment and not match:
        raise InputError(f"What follows # in {address}#{fragment[:80]} must be sha256= and 64 hexadecimal digits.")
    plain, mark, query = address.partition("?")
    base, _, file = plain.rpartition("/")
    if not re.fullmatch(r"[\w.+-]+\.\w+", file):
        raise InputError(f"{address} must end with the name of a file of weights.")
    wanted = match[1].lower() if match else ""
    target = cache_folder() / "addresses" / _digest(address) / file
    entry = Published(LICENCE, file, address=base, query=mark + query, sha256=wanted)
    path = fetch_file(address, entry, target)
    if wanted and (found := checksum_of(path)) != wanted:  # it was here, fetched without a checksum
        raise InputError(
            f"{address} has the SHA-256 {found}, not {wanted}; it lies at {path}. Remove that to fetch it again."
        )
    return path


# --- Hugging Face --------------------------------------------------------------------------------


def split_hub_address(address: str) -> tuple[str, str, str]:
    """Return the repository, the path in it and the revision of hf://owner/name[/path][@revision]; "" for none.

    Raises:
      InputError: not of this form.
    """
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:/([\w./+-]*))?(?:@([\w./+-]+))?", address)
    if not match or ".." in re.split("[/@]", address):
        raise InputError(
            f"{address} must be hf://owner/name, or hf://owner/name/<file or folder in it>; a revision comes last, as "
            "@<branch, tag or commit>."
        )
    return match[1], (match[2] or "").strip("/"), match[3] or ""


def _fetch_from_hub(address: str) -> tuple[Path, str]:
    """Fetch what a hub's address leads to.

    Returns:
      Its file, or the folder of a model of diffusers', and the address with the commit in it.
    """
    repository, path, revision = split_hub_address(address)
    listed, commit = list_files(repository, revision)
    source, files = choose_files(listed, path, address)
    other = _other_hub()
    folder = cache_folder() / "hub" / (_digest(other) if other else "") / repository / commit
    fetch = lambda file: fetch_file(
        f"{HUB}{repository}/{file}", Published(LICENCE, file, repository=repository, revision=commit), folder / file
    )
    for file in files:
        fetched = fetch(file)
        if is_index(file):  # its shards lie beside it
            places = read_json(fetched, remedy="remove it").get("weight_map")
            shards = sorted(set(map(str, places.values()))) if isinstance(places, dict) else []
            for shard in shards:
                if "/" in shard or shard.startswith(".") or not shard.isprintable():
                    raise InputError(f"{address} has an index that lists {shard!r:.80}, which is not in its folder.")
                fetch(f"{file.rpartition('/')[0]}/{shard}".lstrip("/"))
    return folder / source, f"{HUB}{'/'.join(filter(None, (repository, path)))}@{commit}"


def list_files(repository: str, revision: str) -> tuple[list[str], str]:
    """Return the names of a repository's files, and the commit that has them.

    Args:
      repository: owner/name.
      revision: a branch, a tag or a commit; "" for the hub's default.

    Raises:
      InputError: there is none, it needs a token, or no network.
    """
    import huggingface_hub

    try:
        found = huggingface_hub.HfApi().model_info(repository, revision=revision or None)
    except Exception as error:  # noqa: BLE001 (the hub's and the network's errors have no common base)
        at = f"@{revision}" if revision else ""
        raise InputError(f"{HUB}{repository}{at} can't be looked up: {hub_reason(error)}.") from error
    if not re.fullmatch(r"[0-9a-f]{40}", str(found.sha)):  # it becomes the name of a folder
        raise InputError(f"{HUB}{repository} has the commit {found.sha!r:.80}, which is none; is HF_ENDPOINT a hub?")
    return [file.rfilename for file in found.siblings or []], found.sha


def choose_files(listed: Sequence[str], path: str, address: str) -> tuple[str, list[str]]:
    """Choose what to fetch of a repository, the shards of an index aside.

    Args:
      listed: its files.
      path: the file or folder that is asked for; "" for all of it.
      address: for messages.

    Returns:
      The file or folder that is then converted or read, and the files that it needs.

    Raises:
      InputError: nothing there that this package reads.
    """
    within = lambda *parts: "/".join(part for part in parts if part)
    described = lambda *files: [str(file) for file in files if str(file) in listed]
    if path in listed:
        folder = path.rpartition("/")[0]
        return path, [path, *described(within(folder, CONFIG_FILE), scheduler_beside(folder))]
    if (ours := within(path, WEIGHTS_FILE)) in listed:
        return ours, [ours]
    index, folder = within(path, INDEX_FILE), path
    if index in listed:
        folder = within(path, TRANSFORMER)
    config = within(folder, CONFIG_FILE)
    weights = [within(folder, name) for name in WEIGHTS_FILES if within(folder, name) in listed]
    if config in listed and weights:
        return path, [*described(index, scheduler_beside(folder)), config, weights[0]]
    raise InputError(
        f"{address} has no {WEIGHTS_FILE} and no model of diffusers'; name one of its files: "
        f"{some_of(sorted(listed), most=8) or 'it has none'}."
    )
