"""Checkpoints by address: fetched once from a server of the tests' own, checked, converted; and sent with a card."""

import base64
import hashlib
import http.server
import json
import threading

import jax
import numpy as np
import pytest

from dydit_jax.checkpoints import Weights, load_weights, save_weights
from dydit_jax.convert.exporting import Export, export
from dydit_jax.convert.hub import choose_files, split_hub_address
from dydit_jax.convert.publishing import push
from dydit_jax.diffusion.process import Diffusion
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.errors import InputError
from dydit_jax.loading import find_autoencoder_config, load_checkpoint
from dydit_jax.models.config import DiTConfig
from dydit_jax.models.dit import Model

CONFIG = DiTConfig(depth=2, width=32, heads=2, patch=2, side=8, classes=3)


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub with the files of `repositories`, by repository and name; remembers what was asked for and committed."""

    repositories, asked, commits = {}, [], []

    def do_HEAD(self):  # noqa: N802 (the base class's name)
        self.answer(with_content=False)

    def do_GET(self):  # noqa: N802
        self.answer(with_content=True)

    def answer(self, with_content: bool) -> None:
        path = self.path.partition("?")[0]
        if with_content and ("/resolve/" in path or path.startswith("/api/models/")):
            self.asked.append(path)
        if path.startswith("/api/models/"):
            files = self.repositories.get(path.removeprefix("/api/models/"))
            if files is None:
                self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            else:
                listed = dict(id=path, sha="0" * 40, siblings=[dict(rfilename=name) for name in files])
                self.send(200, json.dumps(listed).encode())
            return
        repository, _, name = path.strip("/").partition("/resolve/main/")
        if repository == "someone/gated":
            self.send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif name not in self.repositories.get(repository, {}):
            self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        else:
            content = self.repositories[repository][name]
            tag = f'"{hashlib.sha256(content).hexdigest()}"'
            self.send(200, content, {"ETag": tag, "X-Linked-Etag": tag, "X-Repo-Commit": "0" * 40}, with_content)

    def do_POST(self):  # noqa: N802
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.path == "/api/repos/create":
            request = json.loads(body)
            name = "/".join(filter(None, (request.get("organization"), request["name"])))
            self.repositories.setdefault(name, {})
            self.send(200, json.dumps(dict(url=f"https://huggingface.co/{name}", name=name)).encode())
        elif self.path.endswith("/preupload/main"):
            files = [
                dict(path=file["path"], uploadMode="regular", shouldIgnore=False) for file in json.loads(body)["files"]
            ]
            self.send(200, json.dumps(dict(files=files)).encode())
        elif self.path.endswith("/commit/main"):
            lines = [json.loads(line) for line in body.splitlines()]
            added = [line["value"] for line in lines if line["key"] == "file"]
            self.commits.append({file["path"]: base64.b64decode(file["content"]) for file in added})
            self.send(
                200, json.dumps(dict(commitUrl="https://huggingface.co/me/it/commit/1", commitOid="1" * 40)).encode()
            )
        else:
            self.send(200, json.dumps(dict(errors=[], warnings=[])).encode())  # what checks a card

    def send(self, code: int, content: bytes, headers=None, with_content: bool = True) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_content:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The server's address, in the place of Hugging Face's, and an empty cache."""
    from huggingface_hub import constants

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setenv("DYDIT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Hub, "repositories", {})
    monkeypatch.setattr(Hub, "asked", [])
    monkeypatch.setattr(Hub, "commits", [])
    yield address
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of finished weights, and one of diffusers' with the same model, as {name: content} each."""
    folder = tmp_path_factory.mktemp("finished")
    generator = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: generator.standard_normal(leaf.shape).astype(np.float32), Model(CONFIG).abstract_params()
    )
    about = dict(
        class_names=["ant", "golden retriever", "hen"],
        config=dict(train=dict(init_from="dit-xl2-256"), data=dict(name="images")),
        step=20,
        versions=dict(jax="1.2.3"),
    )
    save_weights(folder / "ours" / "weights.safetensors", Weights(CONFIG, Diffusion(), SamplingConfig(), params, about))
    export(Export(str(folder / "ours"), str(folder / "theirs"), layout="diffusers"))
    return folder


def content_of(folder) -> dict:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_weights_of_ours_are_fetched_once(hub, folders):
    Hub.repositories["me/flowers"] = content_of(folders / "ours") | {"README.md": b"of no use here"}
    first, second = load_checkpoint("hf://me/flowers"), load_checkpoint("hf://me/flowers")
    expected = load_weights(folders / "ours" / "weights.safetensors")
    jax.tree.map(np.testing.assert_array_equal, first.params, expected.params)
    assert second.class_names == expected.class_names
    assert Hub.asked == ["/api/models/me/flowers", "/me/flowers/resolve/main/weights.safetensors"]


def test_pipeline_of_diffusers_is_fetched_and_converted_once(hub, folders, tmp_path):
    Hub.repositories["me/pipe"] = content_of(folders / "theirs") | {"vae/big.bin": b"not asked for"}
    found = load_checkpoint("hf://me/pipe")
    expected = load_weights(folders / "ours" / "weights.safetensors")
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    assert found.class_names == expected.class_names and found.model == CONFIG
    asked = [path.removeprefix("/me/pipe/resolve/main/") for path in Hub.asked[1:]]
    assert asked == ["model_index.json", "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"]
    load_checkpoint("hf://me/pipe")
    load_checkpoint("hf://me/pipe/transformer")  # another address of the same files
    assert Hub.asked[4:] == ["/api/models/me/pipe"]
    record = tmp_path / "cache/hub/me/pipe/transformer/config.json.sha256"
    assert record.read_text().startswith(
        hashlib.sha256(Hub.repositories["me/pipe"]["transformer/config.json"]).hexdigest()
    )


def test_shards_of_an_index_are_fetched(hub, folders):
    import safetensors.numpy

    files = content_of(folders / "theirs")
    tensors = safetensors.numpy.load(files.pop("transformer/diffusion_pytorch_model.safetensors"))
    names = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for shard in set(names.values()):
        kept = {name: tensor for name, tensor in tensors.items() if names[name] == shard}
        files[f"transformer/{shard}"] = safetensors.numpy.save(kept)
    files["transformer/diffusion_pytorch_model.safetensors.index.json"] = json.dumps(dict(weight_map=names)).encode()
    Hub.repositories["me/parts"] = files
    found, expected = load_checkpoint("hf://me/parts"), load_weights(folders / "ours" / "weights.safetensors")
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    Hub.repositories["me/lost"] = {name: content for name, content in files.items() if "part-1" not in name}
    with pytest.raises(
        InputError, match="hf://me/lost/transformer/part-1.safetensors can't be fetched .the repository"
    ):
        load_checkpoint("hf://me/lost")


def test_plain_address_is_fetched_once_and_checked(hub, folders, tmp_path):
    content = (folders / "ours" / "weights.safetensors").read_bytes()
    Hub.repositories["me/plain"] = {"w.safetensors": content}
    address, digest = f"{hub}/me/plain/resolve/main/w.safetensors", hashlib.sha256(content).hexdigest()
    with pytest.raises(InputError, match=f"damaged on the way: SHA-256 {digest}, should be {'0' * 64}"):
        load_checkpoint(f"{address}#sha256={'0' * 64}")
    before = len(Hub.asked)
    for name in (address, f"{address}#sha256={digest}", address):
        assert load_checkpoint(name).model == CONFIG
    assert len(Hub.asked) == before + 1
    with pytest.raises(InputError, match=f"has the SHA-256 {digest}, not {'0' * 64}; it lies at"):
        load_checkpoint(f"{address}#sha256={'0' * 64}")
    assert len(Hub.asked) == before + 1


@pytest.mark.parametrize(
    "address, message",
    [
        (
            "hf://me/nothing",
            "hf://me/nothing can't be looked up: there is no such repository, or it is private: .*HF_TOKEN",
        ),
        (
            "hf://someone/gated",
            "can't be fetched .its owner gives it to accounts that have accepted the terms.*HF_TOKEN",
        ),
        ("hf://me/texts", "has no weights.safetensors and no model of diffusers'; name one of its files: a.txt, b.txt"),
        ("hf://me/texts/c.txt", "name one of its files: a.txt, b.txt"),
        ("hf://me/other", "model_index.json is of a 'StableDiffusionPipeline', which is none of DiTPipeline"),
        ("hf://me", "hf://me must be hf://owner/name, or"),
        ("hf://me/../name", "must be hf://owner/name, or"),
        ("https://127.0.0.1:1/", "must end with the name of a file of weights"),
        ("https://127.0.0.1:1/w.pt#sha256=12", "must be sha256= and 64 hexadecimal digits"),
        ("https://127.0.0.1:1/w.pt", "https://127.0.0.1:1/w.pt can't be fetched .*refused"),
    ],
)
def test_addresses_that_lead_nowhere_end_in_one_error(hub, folders, address, message, tmp_path):
    files = content_of(folders / "theirs")
    Hub.repositories["someone/gated"] = files
    Hub.repositories["me/texts"] = {"b.txt": b"", "a.txt": b""}
    Hub.repositories["me/other"] = files | {"model_index.json": b'{"_class_name": "StableDiffusionPipeline"}'}
    with pytest.raises(InputError, match=message):
        load_checkpoint(address)
    assert not list(tmp_path.rglob("*.converted.safetensors")) and not list(tmp_path.rglob("*.partial"))


def test_address_of_an_autoencoder_is_not_fetched_to_look_at_it(hub):
    assert find_autoencoder_config("hf://me/pipe/vae") is None and not Hub.asked


@pytest.mark.parametrize(
    "listed, path, expected",
    [
        (["weights.safetensors", "README.md"], "", ("weights.safetensors", ["weights.safetensors"])),
        (["a/w.pt", "a/config.json"], "a/w.pt", ("a/w.pt", ["a/w.pt", "a/config.json"])),
        (
            ["vae/config.json", "vae/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.fp16.bin"],
            "vae",
            ("vae", ["vae/config.json", "vae/diffusion_pytorch_model.bin"]),
        ),
    ],
)
def test_only_what_is_needed_is_chosen(listed, path, expected):
    assert choose_files(listed, path, "hf://me/it") == expected


def test_address_is_split():
    assert split_hub_address("hf://me/flowers-1.0/a/b.pt") == ("me/flowers-1.0", "a/b.pt")


# --- Sending -------------------------------------------------------------------------------------


def test_finished_folder_is_sent_with_a_card_and_loads_from_there(hub, folders, tmp_path):
    record = dict(
        fid=12.34567, precision=None, samples=dict(count=5000), reference=dict(name="in256.npz"), date="2026-11-30"
    )
    (folders / "ours" / "evaluation.json").write_text(json.dumps([record]))
    push(folders / "ours", "hf://me/flowers")
    [commit] = Hub.commits
    assert set(commit) == {"weights.safetensors", "README.md"}
    card = commit["README.md"].decode()
    for text in (
        "library_name: dydit-jax",
        "A static DiT: depth 2, width 32, 2 heads",
        'Pipeline.load("hf://me/flowers")',
        "pipe(['ant'], seed=1)",
        "3 classes: ant, golden retriever, hen.",
        "Trained for 20 steps on data of the kind `images`, from dit-xl2-256.",
        "Versions: jax 1.2.3.",
        "| FID 12.35 | 5000 | in256.npz | 2026-11-30 |",
    ):
        assert text in card
    Hub.repositories["me/flowers"] = commit
    assert load_checkpoint("hf://me/flowers").class_names == ("ant", "golden retriever", "hen")
    (folders / "ours" / "evaluation.json").unlink()


def test_nothing_is_replaced_unless_asked_for(hub, folders):
    Hub.repositories["me/pipe"] = {"model_index.json": b"{}"}
    with pytest.raises(InputError, match="hf://me/pipe has model_index.json already; give --overwrite"):
        push(folders / "theirs", "hf://me/pipe")
    assert not Hub.commits
    push(folders / "theirs", "hf://me/pipe", overwrite=True)
    [commit] = Hub.commits
    assert "transformer/config.json" in commit and "library_name: diffusers" in commit["README.md"].decode()


@pytest.mark.parametrize("address", ["me/flowers", "hf://me/flowers/file.bin", "https://me/flowers"])
def test_push_wants_a_repository(folders, address):
    with pytest.raises(InputError, match="--push wants hf://owner/name"):
        push(folders / "ours", address)


def test_unfinished_folder_is_not_sent(hub, tmp_path):
    with pytest.raises(InputError, match="is not finished: it has neither weights.safetensors"):
        push(tmp_path, "hf://me/flowers")
    assert not Hub.asked and not Hub.repositories
