"""Published models are fetched once, resumed, checked and converted; without a network the message helps."""

import concurrent.futures
import dataclasses
import hashlib
import http.server
import io
import threading
import types
import zipfile

import numpy as np
import pytest
from conftest import CHECKPOINTS, GOLDEN

from dydit_jax.convert import published
from dydit_jax.convert.published import PUBLISHED, SHIPPED, Published, fetch, fetch_address, require_checksum
from dydit_jax.errors import InputError
from dydit_jax.loading import load_checkpoint

CONTENT = bytes(range(256)) * 4096


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content` under the tag `version`, honours ranges, and remembers what was asked."""

    content, version, asked = CONTENT, '"1"', []
    cut_after = None  # bytes, once

    def do_GET(self):  # noqa: N802 (the base class's name)
        if self.path != "/file.bin":
            self.send_error(404)
            return
        asked = self.headers.get("Range")
        Server.asked.append(asked)
        same = self.headers.get("If-Range") in (None, Server.version)
        first = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and same else 0
        size = len(Server.content)
        if first >= size:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{size}")
            self.end_headers()
            return
        self.send_response(206 if first else 200)
        self.send_header("ETag", Server.version)
        self.send_header("Content-Length", str(size - first))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{size - 1}/{size}")
        self.end_headers()
        last, Server.cut_after = Server.cut_after, None
        self.wfile.write(Server.content[first:last])

    def log_message(self, *_):
        pass


@pytest.fixture
def address(monkeypatch):
    for name, value in dict(content=CONTENT, version='"1"', asked=[], cut_after=None).items():
        monkeypatch.setattr(Server, name, value)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DYDIT_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def broken_off(address, tmp_path):
    """A download that broke off after 1000 bytes: (address, partial file)."""
    partial = tmp_path / "file.partial"
    Server.cut_after = 1000
    with pytest.raises(OSError, match=f"broke off after 1000 of {len(CONTENT)} bytes"):
        fetch_address(f"{address}/file.bin", partial)
    assert partial.read_bytes() == CONTENT[:1000]
    return f"{address}/file.bin", partial


def test_download_goes_on_where_it_stopped(broken_off):
    address, partial = broken_off
    fetch_address(address, partial)
    assert partial.read_bytes() == CONTENT and Server.asked == [None, "bytes=1000-"]
    fetch_address(address, partial)  # nothing is left
    assert partial.read_bytes() == CONTENT


def test_download_starts_again_where_the_server_has_another_file(broken_off):
    address, partial = broken_off
    Server.content, Server.version = CONTENT[::-1], '"2"'
    fetch_address(address, partial)
    assert partial.read_bytes() == CONTENT[::-1] and Server.asked == [None, "bytes=1000-"]


def test_download_starts_again_where_more_lies_there_than_the_server_has(broken_off):
    address, partial = broken_off
    partial.write_bytes(CONTENT + b"of a second writer")
    fetch_address(address, partial)
    assert partial.read_bytes() == CONTENT and Server.asked[-1] is None


def test_download_starts_again_where_nobody_knows_what_lies_there(address, tmp_path):
    partial = tmp_path / "file.partial"
    partial.write_bytes(b"of an earlier version of this program")
    fetch_address(f"{address}/file.bin", partial)
    assert partial.read_bytes() == CONTENT and Server.asked == [None]


@pytest.fixture
def thing(address, monkeypatch):
    """The name of a published file on the server."""
    monkeypatch.setitem(PUBLISHED, "thing", Published("free", "file.bin", address=address))
    return "thing"


def test_file_is_fetched_once(thing, cache):
    path = fetch(thing)
    assert path.read_bytes() == CONTENT and path.is_relative_to(cache)
    assert fetch(thing) == path and Server.asked == [None]
    assert sorted(p.name for p in path.parent.iterdir()) == ["file.bin", "file.bin.lock", "file.bin.sha256"]
    record = (path.parent / "file.bin.sha256").read_text()
    assert record == f"{hashlib.sha256(CONTENT).hexdigest()}  file.bin\n"


def test_processes_that_start_together_fetch_once(thing):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(fetch, [thing] * 4))  # locks of one process exclude each other, too
    assert Server.asked == [None] and {path.read_bytes() for path in paths} == {CONTENT}


def test_damage_of_the_same_length_is_noticed_and_fetched_again(thing, caplog):
    path = fetch(thing)
    path.write_bytes(CONTENT[:5000] + b"?" + CONTENT[5001:])
    assert fetch(thing).read_bytes() == CONTENT and Server.asked == [None, None]
    assert f"{path} is damaged" in caplog.text


def test_file_put_there_by_hand_is_believed_unless_its_checksum_is_known(thing, monkeypatch, caplog):
    path = published.downloaded_file(thing)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"by hand")
    assert fetch(thing).read_bytes() == b"by hand" and not Server.asked
    known = dataclasses.replace(PUBLISHED[thing], sha256=hashlib.sha256(CONTENT).hexdigest()[:8])
    monkeypatch.setitem(PUBLISHED, thing, known)
    assert fetch(thing).read_bytes() == CONTENT and "is damaged" in caplog.text


def test_download_damaged_before_it_went_on_is_refused(thing, monkeypatch):
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("data.pkl", CONTENT)
    Server.content, Server.cut_after = zipped.getvalue(), 5000
    with pytest.raises(InputError, match="broke off after 5000"):
        fetch(thing)
    target = published.downloaded_file(thing)
    partial = target.with_name("file.bin.partial")
    partial.write_bytes(partial.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match="damaged on the way: its part data.pkl"):
        fetch(thing)
    assert not target.exists() and not partial.exists()
    assert fetch(thing).read_bytes() == zipped.getvalue()


def test_file_of_the_hub_is_compared_with_the_checksum_that_it_tells(monkeypatch):
    monkeypatch.setitem(PUBLISHED, "thing", Published("free", "folder/file.bin", repository="some/where"))

    def download(repo_id, filename, revision, local_dir):
        path = local_dir / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(CONTENT)
        return str(path)

    digests = [hashlib.sha256(b"other").hexdigest(), hashlib.sha256(CONTENT).hexdigest()]
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    metadata = lambda url: types.SimpleNamespace(etag=digests.pop(0))
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", metadata)
    with pytest.raises(InputError, match="was damaged on the way: SHA-256"):
        fetch("thing")
    assert fetch("thing").read_bytes() == CONTENT and not digests


def test_cache_that_cannot_be_written_is_read_or_named(thing, cache):
    path = fetch(thing)
    cache.rename(cache.parent / "kept")
    cache.write_text("a file where the cache should be")
    with pytest.raises(InputError, match=r"Can't write .*file.bin.lock .* to fetch thing"):
        fetch(thing)
    cache.unlink()
    (cache.parent / "kept").rename(cache)
    path.with_name("file.bin.lock").unlink()
    assert fetch(thing) == path and not path.with_name("file.bin.lock").exists()  # it needs no lock where it is whole


def test_missing_file_says_where_to_put_it(address, monkeypatch, cache):
    monkeypatch.setitem(PUBLISHED, "gone", Published("free", "gone.bin", address=address))
    with pytest.raises(
        InputError, match=r"gone can't be fetched \(HTTP Error 404.*Put its file gone.bin .*downloads/gone/gone.bin"
    ):
        fetch("gone")


@pytest.mark.parametrize("name", ["dit-xl2-256", "dydit-xl2-256-0.5"])
def test_without_a_network_the_message_says_what_to_do(name, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    with pytest.raises(InputError, match=f"{name} can't be fetched .Network is unreachable.*Put its file"):
        load_checkpoint(name)


def test_unknown_name_lists_the_published_ones():
    assert [*SHIPPED] == ["digits", "digits-flow", "fashion"]
    assert all(file.stat().st_size <= 8_000_000 for file in SHIPPED.values())
    names = (*SHIPPED, "dit-xl2-256", "dit-xl2-512", "dydit-xl2-256-0.7")
    with pytest.raises(InputError, match=f"known: {', '.join(names)}"):
        load_checkpoint("dit-xl3")


def test_damaged_download_is_refused_and_removed(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    require_checksum(path, hashlib.sha256(b"content").hexdigest())
    require_checksum(path, 'W/"not-a-checksum"')
    with pytest.raises(InputError, match="damaged on the way"):
        require_checksum(path, hashlib.sha256(b"other").hexdigest())
    assert not path.exists()


def test_query_of_an_address_follows_the_name_of_the_file(monkeypatch):
    def receive(address, partial):
        asked.append(address)
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(b"it")

    asked = []
    monkeypatch.setattr("dydit_jax.convert.published.fetch_address", receive)
    assert fetch("sit-xl2-256").name == "SiT-XL-2-256.pt"
    assert [address.partition("SiT")[2] for address in asked] == ["-XL-2-256.pt?rlkey=uxzxmpicu46coq3msb17b9ofa&dl=0"]


def test_named_model_is_converted_once(monkeypatch, cache):
    monkeypatch.setitem(PUBLISHED, "tiny", Published("free", "dydit_v2_train.pt", address="http://127.0.0.1:9"))
    downloaded = published.downloaded_file("tiny")
    downloaded.parent.mkdir(parents=True)
    downloaded.write_bytes((GOLDEN / CHECKPOINTS["v2"]).read_bytes())  # a user put it there by hand
    first = load_checkpoint("tiny")
    made = published.converted_file("tiny").stat().st_mtime_ns
    np.testing.assert_array_equal(
        load_checkpoint("tiny").params["label_embed"]["table"], first.params["label_embed"]["table"]
    )
    assert published.converted_file("tiny").stat().st_mtime_ns == made


def test_every_published_model_states_its_licence():
    assert set(PUBLISHED) == {
        "dit-xl2-256",
        "dit-xl2-512",
        "dydit-xl2-256-0.7",
        "dydit-xl2-256-0.7-v1",
        "dydit-xl2-256-0.5",
        "sit-xl2-256",
        "sd-vae-ft-ema",
        "sd-vae-ft-mse",
        "inception-2015",
    }
    for entry in PUBLISHED.values():
        assert entry.licence and entry.file and bool(entry.address) != bool(entry.repository)
