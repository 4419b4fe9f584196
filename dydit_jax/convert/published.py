"""Published weights by name: where they are, under which licence, and fetching them once.

Nothing is fetched unless a name is asked for. Files are kept under $DYDIT_JAX_CACHE (default ~/.cache/dydit-jax); a
download that breaks off goes on where it stopped, and is checked against the server's SHA-256 where it tells one.
"""

import dataclasses
import hashlib
import logging
import re
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from dydit_jax.errors import InputError
from dydit_jax.runtime.cache import cache_folder

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
DIT_LICENCE = "CC BY-NC 4.0 (facebookresearch/DiT): not for commercial use"
DYDIT_LICENCE = "none stated by its authors (alibaba-damo-academy/DyDiT); ask them before you redistribute it"
AUTOENCODER_LICENCE = "MIT (stabilityai)"
INCEPTION_LICENCE = "Apache-2.0 (TensorFlow's Inception, in the port of mseitzer/pytorch-fid)"


@dataclasses.dataclass(frozen=True)
class Published:
    """One published file: either a plain address, or a repository on Hugging Face and a file in it.

    Attributes:
      licence: in words.
      file: its name there.
      address, repository: where it is.
      sha256: the beginning of its checksum, where it is known.
    """

    licence: str
    file: str
    address: str = ""
    repository: str = ""
    sha256: str = ""


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
    "sd-vae-ft-ema": Published(AUTOENCODER_LICENCE, _AUTOENCODER_FILE, repository="stabilityai/sd-vae-ft-ema"),
    "sd-vae-ft-mse": Published(AUTOENCODER_LICENCE, _AUTOENCODER_FILE, repository="stabilityai/sd-vae-ft-mse"),
    "inception-2015": Published(
        INCEPTION_LICENCE,
        "pt_inception-2015-12-05-6726825d.pth",
        address="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights",
        sha256="6726825d",  # its name ends with the beginning of its checksum
    ),
}


def converted_file(name: str) -> Path:
    """Return where the converted weights of a published model are kept."""
    return cache_folder() / f"{name}.safetensors"


def downloaded_file(name: str) -> Path:
    """Return where the published file is kept; a user without a network can put it there."""
    return cache_folder() / "downloads" / name / Path(PUBLISHED[name].file).name


def fetch(name: str) -> Path:
    """Return the local copy of a published file, fetching it if it is not there.

    Args:
      name: a key of `PUBLISHED`.

    Raises:
      InputError: no network, no such file there any more, or a copy that is not what the server has.
    """
    target, entry = downloaded_file(name), PUBLISHED[name]
    if target.exists():
        return target
    logger.info("Fetching %s (%s). Licence: %s.", name, entry.file, entry.licence)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    try:
        if entry.repository:
            _fetch_from_hub(entry, partial)
        else:
            fetch_address(f"{entry.address}/{entry.file}", partial)
            require_checksum(partial, entry.sha256)
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 (the hub's and the network's errors have no common base)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{name} can't be fetched ({reason}). Put its file {entry.file} of "
            f"{entry.repository or entry.address} at {target}, or convert it with convert_torch_weights.py."
        ) from error
    partial.replace(target)
    return target


def _fetch_from_hub(entry: Published, partial: Path) -> None:
    """Fetch by way of huggingface_hub, which resumes, and check the checksum that it tells of large files."""
    import huggingface_hub

    folder = partial.parent / "hub"
    copy = Path(huggingface_hub.hf_hub_download(entry.repository, entry.file, local_dir=folder))
    url = huggingface_hub.hf_hub_url(entry.repository, entry.file)
    require_checksum(copy, huggingface_hub.get_hf_file_metadata(url).etag)
    copy.replace(partial)


def require_checksum(path: Path, told: str | None) -> None:
    """Raise unless a file has the SHA-256 that was told, or its beginning; anything else told is no checksum.

    Raises:
      InputError: another checksum; the file is deleted.
    """
    if not told or not re.fullmatch(r"[0-9a-f]{8}|[0-9a-f]{64}", told):
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(told):
        path.unlink()
        raise InputError(f"{path.name} was damaged on the way: SHA-256 {found}, should be {told}. Try again.")


def fetch_address(address: str, partial: Path) -> None:
    """Fetch a plain address into a file, going on where an earlier attempt stopped."""
    done = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left beyond what is there
            return
        raise
    with response:
        resumed = response.status == 206
        total = int(response.headers.get("Content-Length", 0)) + (done if resumed else 0)
        with (
            partial.open("ab" if resumed else "wb") as file,
            tqdm(total=total, initial=done if resumed else 0, unit="B", unit_scale=True, desc=partial.stem) as progress,
        ):
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                progress.update(len(chunk))
    if total and partial.stat().st_size != total:
        raise OSError(f"the connection broke off after {partial.stat().st_size} of {total} bytes; try again")
