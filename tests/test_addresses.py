"""What an address leads to stays what it says: by its checksum, its hub, wherever the cache lies and whoever waits."""

import concurrent.futures
import hashlib
import json
import time
import zipfile

import pytest
from hubs import MAIN, Hub

from dydit_jax.convert import hub as addresses
from dydit_jax.convert import published
from dydit_jax.convert.hub import known_file, local_file
from dydit_jax.convert.published import require_checksum
from dydit_jax.errors import InputError
from dydit_jax.loading import load_checkpoint

FIRST, SECOND = b"first " * 50, b"second " * 50


def copy(source, out, exact) -> None:
    """Stand in for a conversion: write what the source holds."""
    out.write_bytes(source.read_bytes() if source.is_file() else b"of a folder")


def with_checksum(address: str, content: bytes) -> str:
    return f"{address}#sha256={hashlib.sha256(content).hexdigest()}"


@pytest.mark.parametrize("is_ours", [False, True])
def test_a_checksum_never_leads_to_another_file(hub, monkeypatch, is_ours):
    monkeypatch.setattr(addresses, "_is_ours", lambda path: is_ours)
    Hub.repositories["me/it"] = {"w.pt": FIRST}
    address = f"{hub}/me/it/resolve/{MAIN}/w.pt"
    for name in (address, with_checksum(address, FIRST)):
        assert local_file(name, copy).read_bytes() == FIRST
    Hub.repositories["me/it"] = {"w.pt": SECOND}
    with pytest.raises(InputError, match="it lies at .*w.pt. Remove that to fetch it again"):
        local_file(with_checksum(address, SECOND), copy)
    addresses._fetch_plain(address).unlink()
    assert local_file(with_checksum(address, SECOND), copy).read_bytes() == SECOND
    if is_ours:
        with pytest.raises(InputError, match="it lies at"):
            local_file(with_checksum(address, FIRST), copy)
    else:
        assert local_file(with_checksum(address, FIRST), copy).read_bytes() == FIRST


def test_another_hub_has_files_of_its_own(hub, monkeypatch, tmp_path):
    Hub.repositories["me/it"] = {"w.pt": FIRST}
    found = local_file("hf://me/it/w.pt", copy)
    monkeypatch.setenv("HF_ENDPOINT", "https://huggingface.co/")
    assert known_file("hf://me/it/w.pt") == found
    monkeypatch.setenv("HF_ENDPOINT", "https://another.hub")
    assert known_file("hf://me/it/w.pt") is None
    Hub.repositories["me/it"] = {"w.pt": SECOND}
    assert local_file("hf://me/it/w.pt", copy).read_bytes() == SECOND and found.read_bytes() == FIRST
    assert addresses._record_of("https://h/w.pt").parent == tmp_path / "cache" / "addresses"


def test_cache_may_be_moved_and_a_record_that_says_nothing_is_none(hub, monkeypatch, tmp_path):
    Hub.repositories["me/it"] = {"w.pt": FIRST}
    local_file("hf://me/it/w.pt", copy)
    (tmp_path / "cache").rename(tmp_path / "moved")
    monkeypatch.setenv("DYDIT_JAX_CACHE", str(tmp_path / "moved"))
    assert known_file("hf://me/it/w.pt").read_bytes() == FIRST
    addresses._record_of("hf://me/it/w.pt").write_text("{}")
    assert known_file("hf://me/it/w.pt") is None


def test_those_who_waited_ask_nobody(hub):
    Hub.repositories["me/it"] = {"w.pt": FIRST}
    slow = lambda *arguments: (time.sleep(0.2), copy(*arguments))
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: local_file("hf://me/it/w.pt", slow), range(3)))
    assert len(set(found)) == 1 and len(Hub.asked) == 2


@pytest.mark.parametrize("ending", ["index.json", "index.fp16.json"])
def test_files_of_any_index_are_fetched(hub, tmp_path, ending):
    index = f"diffusion_pytorch_model.safetensors.{ending}"
    files = {"config.json": b"{}", index: json.dumps(dict(weight_map=dict(a="part.safetensors"))).encode()}
    Hub.repositories["me/it"] = files | {"part.safetensors": FIRST}
    local_file("hf://me/it", copy)
    assert (tmp_path / "cache" / "hub" / "me" / "it" / MAIN / "part.safetensors").read_bytes() == FIRST
    Hub.repositories["me/other"] = files | {index: json.dumps(dict(weight_map=dict(a="\x1b[2J"))).encode()}
    with pytest.raises(InputError, match=r"an index that lists '\\x1b\[2J'"):
        local_file("hf://me/other", copy)


def test_what_is_no_file_of_weights_is_named_with_what_to_remove(hub):
    Hub.repositories["me/it"] = {"w.pt": b"<!DOCTYPE html><p>Sign in", "w.safetensors": b"<!DOCTYPE html><p>Sign in"}
    for name in ("w.pt", "w.safetensors"):
        with pytest.raises(InputError, match=f"{name} is what was fetched: remove it to fetch it again"):
            load_checkpoint(f"{hub}/me/it/resolve/{MAIN}/{name}")


def test_damaged_weights_of_the_cache_are_named_with_what_to_do(hub):
    path = published.converted_file("dit-xl2-256")
    path.parent.mkdir()
    path.write_bytes(b"cut short")
    with pytest.raises(InputError, match=f"{path} is not a readable .*Remove it: it lies in the cache"):
        load_checkpoint("dit-xl2-256")


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda content: content[:-30], "not a zip file"),
        (lambda content: content.replace(b"numbers", b"numbexs"), "its part data/0 has another checksum"),
        (lambda content: content.replace(b"PK\x03\x04", b"PK\x03\x04" + b"?" * 300), ""),
    ],
)
def test_zip_that_is_damaged_is_not_kept(tmp_path, damage, reason):
    path = tmp_path / "w.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data/0", b"numbers" * 100)
    require_checksum(path, None)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=f"damaged on the way.*{reason}"):
        require_checksum(path, None)
    assert not path.exists()


@pytest.mark.parametrize("packing", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_what_is_packed_is_not_unpacked_to_be_checked(tmp_path, packing, monkeypatch):
    path = tmp_path / "w.pt"
    with zipfile.ZipFile(path, "w", packing) as archive:
        archive.writestr("data/0", b"0" * 10**5)
    monkeypatch.setattr(zipfile, "_get_decompressor", None)
    require_checksum(path, None)
