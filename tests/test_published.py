"""Published models are fetched once, resumed, checked and converted; without a network the message helps."""

import hashlib
import http.server
import threading

import numpy as np
import pytest
from conftest import CHECKPOINTS, GOLDEN

from dydit_jax.convert import published
from dydit_jax.convert.published import PUBLISHED, Published, fetch, fetch_address, require_checksum
from dydit_jax.errors import InputError
from dydit_jax.loading import load_checkpoint

CONTENT = bytes(range(256)) * 4096


class Server(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT, honours ranges, and remembers what was asked."""

    asked: list = []

    def do_GET(self):  # noqa: N802 (the base class's name)
        if self.path != "/file.bin":
            self.send_error(404)
            return
        asked = self.headers.get("Range")
        Server.asked.append(asked)
        first = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        if first >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(CONTENT) - first))
        self.end_headers()
        self.wfile.write(CONTENT[first:])

    def log_message(self, *_):
        pass


@pytest.fixture
def address():
    Server.asked.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DYDIT_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_download_goes_on_where_it_stopped(address, tmp_path):
    partial = tmp_path / "file.partial"
    partial.write_bytes(CONTENT[:1000])
    fetch_address(f"{address}/file.bin", partial)
    assert partial.read_bytes() == CONTENT and Server.asked == ["bytes=1000-"]
    fetch_address(f"{address}/file.bin", partial)  # nothing is left
    assert partial.read_bytes() == CONTENT


def test_file_is_fetched_once(address, monkeypatch, cache):
    monkeypatch.setitem(PUBLISHED, "thing", Published("free", "file.bin", address=address))
    path = fetch("thing")
    assert path.read_bytes() == CONTENT and path.is_relative_to(cache)
    assert fetch("thing") == path and Server.asked == [None]
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]


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
    with pytest.raises(InputError, match="known: dit-xl2-256, dit-xl2-512, dydit-xl2-256-0.7"):
        load_checkpoint("dit-xl3")


def test_damaged_download_is_refused_and_removed(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    require_checksum(path, hashlib.sha256(b"content").hexdigest())
    require_checksum(path, 'W/"not-a-checksum"')
    with pytest.raises(InputError, match="damaged on the way"):
        require_checksum(path, hashlib.sha256(b"other").hexdigest())
    assert not path.exists()


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
        "sd-vae-ft-ema",
        "sd-vae-ft-mse",
        "inception-2015",
    }
    for entry in PUBLISHED.values():
        assert entry.licence and entry.file and bool(entry.address) != bool(entry.repository)
