"""Published weights by name: where they are, under which licence, and fetching them once.

Nothing is fetched unless its name is used. Files are kept under $DYDIT_JAX_CACHE (default ~/.cache/dydit-jax), which
several machines and users may share. One process at a time fetches a file. A download that breaks off goes on where it
stopped, if the server still has the same file, and is checked before it gets its name: against the SHA-256 of the
server or of this list, or the checksums inside the file. Its own SHA-256 is kept beside it, in the format of
`sha256sum`, and compared whenever the file is read.
"""

import contextlib
import dataclasses
import hashlib
import logging
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from dydit_jax.convert.torch_files import find_damage
from dydit_jax.errors import InputError
from dydit_jax.runtime.cache import cache_folder
from dydit_jax.runtime.files import hold_lock, write_atomically
from dydit_jax.runtime.progress import Progress

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
DIT_LICENCE = "CC BY-NC 4.0 (facebookresearch/DiT): not for commercial use"
DYDIT_LICENCE = "none stated by its authors (alibaba-damo-academy/DyDiT); ask them before you redistribute it"
AUTOENCODER_LICENCE = "MIT (stabilityai)"
SIT_LICENCE = "MIT (willisma/SiT)"
INCEPTION_LICENCE = "Apache-2.0 (TensorFlow's Inception, in the port of mseitzer/pytorch-fid)"


@dataclasses.dataclass(frozen=True)
class Published:
    """One published file: either a plain address, or a repository on Hugging Face and a file in it.

    Attributes:
      licence: as text.
      file: its name there.
      address, repository: where it is.
      query: of the address, behind the file's name.
      revision: of the repository.
      sha256: the beginning of its checksum, where it is known.
      holds: "model", "autoencoder" or "judge" (the network that `evaluate.py` looks through).
    """

    licence: str
    file: str
    address: str = ""
    query: str = ""
    repository: str = ""
    revision: str | None = None
    sha256: str = ""
    holds: str = "model"


_DIT_ADDRESS = "https://dl.fbaipublicfiles.com/DiT/models"
_DYDIT_REPOSITORY = "heisejiasuo/DyDiT"
_DYDIT_FOLDER = "new_release_2025_03_26"
_AUTOENCODER_FILE = "diffusion_pytorch_model.safetensors"
PUBLISHED = {
    "dit-xl2-256": Published(DIT_LICENCE, "DiT-XL-2-256x256.pt", address=_DIT_ADDRESS),
    "dit-xl2-512": Published(DIT_LICENCE, "DiT-XL-2-512x512.pt", address=_DIT_ADDRESS),
    "dydit-xl2-256-0.7": Published(DYDIT_LICENCE, f"{_DYDIT_FOLDER}/new_dydit0.7.pt", repository=_DYDIT_REPOSITORY),
    "dydit-xl2-256-0.7-v1": Published(DYDIT_LICENCE, "dydit_0.7.pth", repository=_DYDIT_REPOSITORY),
    "dydit-xl2-256-0.5": Published(DYDIT_LICENCE, f"{_DYDIT_FOLDER}/new_dydit0.5.pt", repository=_DYDIT_REPOSITORY),
    "sit-xl2-256": Published(
        SIT_LICENCE,
        "SiT-XL-2-256.pt",
        address="https://www.dl.dropboxusercontent.com/scl/fi/as9oeomcbub47de5g4be0",
        query="?rlkey=uxzxmpicu46coq3msb17b9ofa&dl=0",
    ),
    **{
        name: Published(AUTOENCODER_LICENCE, _AUTOENCODER_FILE, repository=f"stabilityai/{name}", holds="autoencoder")
        for name in ("sd-vae-ft-ema", "sd-vae-ft-mse")
    },
    "inception-2015": Published(
        INCEPTION_LICENCE,
        "pt_inception-2015-12-05-6726825d.pth",
        address="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights",
        sha256="6726825d",  # its name ends with the beginning of its checksum
        holds="judge",
    ),
}


def shipped_models() -> dict[str, Path]:
    """Return the models that come with the package by name: x_dydit.safetensors is "x", x_dysit "x-flow"."""
    files = sorted((Path(__file__).parents[1] / "assets").glob("*.safetensors"))
    return {file.stem.removesuffix("_dydit").replace("_dysit", "-flow"): file for file in files}


SHIPPED = shipped_models()


def known_names(holds: str) -> list[str]:
    """List the names of every known "model", "autoencoder" or "judge"."""
    return [*(SHIPPED if holds == "model" else ()), *(name for name, it in PUBLISHED.items() if it.holds == holds)]


def converted_file(name: str) -> Path:
    """Return where the converted weights of a published model are kept."""
    return cache_folder() / f"{name}.safetensors"


def downloaded_file(name: str) -> Path:
    """Return where the published file is kept; a user without a network can put it there."""
    return cache_folder() / "downloads" / name / Path(PUBLISHED[name].file).name


def fetch(name: str) -> Path:
    """Return the local copy of a published file, fetching it if it is not there or not what was fetched.

    Args:
      name: a key of `PUBLISHED`.

    Raises:
      InputError: no network, no such file there any more, or a copy that is not what the server has.
    """
    return fetch_file(name, PUBLISHED[name], downloaded_file(name))


def fetch_file(name: str, entry: Published, target: Path) -> Path:
    """Return the local copy of a file, fetching it if it is not there or not what was fetched.

    Args:
      name: of the file, for people.
      entry: where it is.
      target: where it is kept.

    Raises:
      InputError: see `fetch`.
    """
    if _is_whole(target, entry):
        return target
    with hold_lock(target.with_name(target.name + ".lock"), to=f"to fetch {name}"):
        if not _is_whole(target, entry):  # the process that held the lock may have fetched it
            logger.info("Fetching %s (%s). Licence: %s.", name, entry.file, entry.licence)
            _fetch(name, entry, target)
    return target


@contextlib.contextmanager
def naming_fetched(source: Path) -> Iterator[None]:
    """Say in an `InputError` what to do about a fetched file, or folder, that can't be converted."""
    try:
        yield
    except InputError as error:
        raise InputError(
            f"{error} {source} is what was fetched: remove it to fetch it again, or convert it with "
            "convert_torch_weights.py, whose flags say what it leaves open."
        ) from error


def _fetch(name: str, entry: Published, target: Path) -> None:
    """Fetch a file under another name, check it, note its checksum and give it its name."""
    partial = target.with_name(target.name + ".partial")
    try:
        if entry.repository:
            checksum = _fetch_from_hub(entry, partial)
        else:
            fetch_address(f"{entry.address}/{entry.file}{entry.query}", partial)
            checksum = entry.sha256
        found = require_checksum(partial, checksum)
        with write_atomically(_record_of(target)) as record:
            record.write_text(f"{found}  {target.name}\n")
        partial.replace(target)
        _version_of(partial).unlink(missing_ok=True)
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 (the hub's and the network's errors have no common base)
        raise InputError(
            f"{name} can't be fetched ({hub_reason(error)}). Put its file {entry.file} of "
            f"{entry.repository or entry.address} at {target}, or convert it with convert_torch_weights.py."
        ) from error


def hub_reason(error: Exception) -> str:
    """Return in a few words why Hugging Face or a network did not give what was asked for."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "its owner gives it to accounts that have accepted the terms on its page: set HF_TOKEN to a token of one"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repository, or it is private: then set HF_TOKEN to a token that may read it"
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return "the repository has no such file"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision: a branch, a tag or a commit, and the last part of the address"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _record_of(target: Path) -> Path:
    """Return where the checksum of a fetched file is noted."""
    return target.with_name(target.name + ".sha256")


def noted_checksum(target: Path) -> str:
    """Return the SHA-256 that was noted of a fetched file, "" where none was."""
    record = _record_of(target)
    return record.read_text(errors="replace").partition(" ")[0] if record.exists() else ""


def _is_whole(target: Path, entry: Published) -> bool:
    """Return whether a file is there and what was fetched; what a user put there is believed if nothing is known."""
    if not target.exists():
        return False
    has_record = _record_of(target).exists()
    known = noted_checksum(target) if has_record else entry.sha256
    if has_record or known:
        found = checksum_of(target)
        if not known or not found.startswith(known):
            logger.warning("%s is damaged: SHA-256 %s, was %s. Fetching it again.", target, found, known or "lost")
            return False
    return True


def _fetch_from_hub(entry: Published, partial: Path) -> str | None:
    """Fetch with huggingface_hub, which resumes; return the checksum that it publishes for large files."""
    import huggingface_hub

    folder = partial.parent / "hub"
    place = dict(repo_id=entry.repository, filename=entry.file, revision=entry.revision)
    copy = Path(huggingface_hub.hf_hub_download(**place, local_dir=folder))
    checksum = huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(**place)).etag
    copy.replace(partial)
    return checksum


def require_checksum(path: Path, known: str | None) -> str:
    """Raise unless a file is what its server has, as far as that can be known.

    Args:
      path: of the file.
      known: its SHA-256 or the beginning of it; anything else is none, and then the checksums inside the file decide,
        if it begins as a zip, as PyTorch's do.

    Returns:
      The file's SHA-256.

    Raises:
      InputError: another checksum; the file is deleted.
    """
    found = checksum_of(path)
    if known and re.fullmatch(r"[0-9a-f]{8}|[0-9a-f]{64}", known):
        reason = "" if found.startswith(known) else f"SHA-256 {found}, should be {known}"
    else:
        reason = find_damage(path)
    if reason:
        path.unlink()
        raise InputError(f"{path.name} was damaged on the way: {reason}. Try again.")
    return found


def checksum_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_address(address: str, partial: Path) -> None:
    """Fetch a plain address into a file, going on where an earlier attempt stopped, if the server's file is the same.

    Raises:
      OSError: no answer, or an answer that broke off; what has come is kept for the next attempt.
    """
    done = partial.stat().st_size if partial.exists() else 0
    version = _version_of(partial).read_text() if done and _version_of(partial).exists() else ""
    # A server that has another file by now ignores the range and sends that one, whole.
    headers = {"Range": f"bytes={done}-", "If-Range": version} if version else {}
    try:
        response = urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not version:
            raise
        if error.headers.get("Content-Range") == f"bytes */{done}":  # all of it is there
            return
        _restart(address, partial)
        return
    with response:
        if response.status == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {done}-"):
            _restart(address, partial)
            return
        _receive(response, partial, done if response.status == 206 else 0)


def _restart(address: str, partial: Path) -> None:
    """Fetch from the beginning, since what is there is not the beginning of what the server has."""
    _version_of(partial).unlink()
    fetch_address(address, partial)


def _receive(response, partial: Path, done: int) -> None:
    """Write what a server sends behind the `done` bytes that are there, and count them."""
    total = done + int(response.headers.get("Content-Length", 0))
    if not done:
        partial.unlink(missing_ok=True)
        with write_atomically(_version_of(partial)) as version:
            version.write_text(_stated_version(response.headers))
    with (
        partial.open("ab") as file,
        Progress(total, "B", partial.stem, done=done) as progress,
    ):
        while chunk := response.read(CHUNK_BYTES):
            file.write(chunk)
            progress.advance(len(chunk))
    size = partial.stat().st_size
    if "Content-Length" in response.headers and size != total:
        raise OSError(f"the connection broke off after {size} of {total} bytes; try again")


def _version_of(partial: Path) -> Path:
    """Return where it is noted which version of a file the server was sending."""
    return partial.with_name(partial.name + ".version")


def _stated_version(headers) -> str:
    """Return the server's mark of a version of its file, "" if it has none."""
    tag = headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified", "")
