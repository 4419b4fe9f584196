"""Checkpoints by address: fetched once from a server of the tests' own, checked, converted; and sent with a card."""

import dataclasses
import hashlib
import json
import shutil

import jax
import numpy as np
import pytest
from hubs import MAIN, OLD, Hub

from dydit_jax.checkpoints import (
    Weights,
    describe_base,
    format_of,
    load_weights,
    read_arrays,
    save_adapter,
    save_weights,
)
from dydit_jax.checkpoints.arrays import read_metadata
from dydit_jax.convert.exporting import Export, export
from dydit_jax.convert.hub import choose_files, split_hub_address
from dydit_jax.convert.published import SHIPPED
from dydit_jax.convert.publishing import _use, push
from dydit_jax.diffusion.process import Diffusion
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.errors import InputError
from dydit_jax.loading import find_autoencoder_config, find_weights, load_checkpoint
from dydit_jax.models.config import DiTConfig
from dydit_jax.models.dit import Model
from dydit_jax.models.trainable import split_params
from dydit_jax.trees import flatten

CONFIG = DiTConfig(depth=2, width=32, heads=2, patch=2, side=8, classes=3)


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
    weights = Weights(CONFIG, Diffusion("squared_cosine"), SamplingConfig(), params, about)
    save_weights(folder / "ours" / "weights.safetensors", weights)
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
    assert Hub.asked == ["/api/models/me/flowers", f"/me/flowers/resolve/{MAIN}/weights.safetensors"]


def test_base_that_an_adapter_names_is_fetched_when_asked_for(hub, folders, tmp_path):
    Hub.repositories["me/flowers"] = content_of(folders / "ours")
    complete = load_weights(folders / "ours" / "weights.safetensors")
    part = dataclasses.replace(complete, params=split_params(complete.params, ("labels",))[0])
    save_adapter(tmp_path / "a.safetensors", part, describe_base("hf://me/flowers", complete))
    with pytest.raises(InputError, match="is not fetched unasked; give --base=hf://me/flowers"):
        load_checkpoint(tmp_path / "a.safetensors")
    assert not Hub.asked
    for base in ("hf://me/flowers", ""):  # then it is here
        found = load_checkpoint(tmp_path / "a.safetensors", base=base)
        jax.tree.map(np.testing.assert_array_equal, found.params, complete.params)


def test_pipeline_of_diffusers_is_fetched_and_converted_once(hub, folders, tmp_path):
    Hub.repositories["me/pipe"] = content_of(folders / "theirs") | {"vae/big.bin": b"not asked for"}
    found = load_checkpoint("hf://me/pipe")
    expected = load_weights(folders / "ours" / "weights.safetensors")
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    assert found.class_names == expected.class_names and found.model == CONFIG
    asked = [path.removeprefix(f"/me/pipe/resolve/{MAIN}/") for path in Hub.asked[1:]]
    assert asked == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    ]
    assert found.process == expected.process == Diffusion("squared_cosine")
    load_checkpoint("hf://me/pipe")
    load_checkpoint("hf://me/pipe/transformer")  # another address of the same files
    assert Hub.asked[5:] == ["/api/models/me/pipe"]
    record = tmp_path / f"cache/hub/me/pipe/{MAIN}/transformer/config.json.sha256"
    assert record.read_text().startswith(
        hashlib.sha256(Hub.repositories["me/pipe"]["transformer/config.json"]).hexdigest()
    )


def test_names_and_addresses_are_exported(hub, folders, tmp_path):
    Hub.repositories["me/pipe"] = content_of(folders / "theirs")
    out = tmp_path / "back.safetensors"
    assert export(Export("hf://me/pipe", str(out)), load_checkpoint, find_weights) == out and out.is_file()
    assert find_weights("digits") == SHIPPED["digits"]
    assert find_weights(folders / "ours") == folders / "ours" / "weights.safetensors"
    for wrong in ("nothing", folders / "theirs"):
        with pytest.raises(InputError, match="no published model of that name|is neither a run's work directory nor"):
            find_weights(wrong)


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
    address, digest = f"{hub}/me/plain/resolve/{MAIN}/w.safetensors", hashlib.sha256(content).hexdigest()
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
        ("hf://me/texts@", "hf://me/texts@ must be hf://owner/name, or .*; a revision comes last"),
        ("hf://me/texts@v1/../x", "a revision comes last, as @<branch, tag or commit>"),
        (
            "hf://me/texts@v2",
            "hf://me/texts@v2 can't be looked up: the repository has no such revision: a branch, a tag",
        ),
        ("hf://me/texts@main/a.txt", "has no such revision: .* the last part of the address"),
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
            ["transformer/w.pt", "scheduler/scheduler_config.json"],
            "transformer/w.pt",
            ("transformer/w.pt", ["transformer/w.pt", "scheduler/scheduler_config.json"]),
        ),
        (
            ["vae/config.json", "vae/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.fp16.bin"],
            "vae",
            ("vae", ["vae/config.json", "vae/diffusion_pytorch_model.bin"]),
        ),
    ],
)
def test_only_what_is_needed_is_chosen(listed, path, expected):
    assert choose_files(listed, path, "hf://me/it") == expected


@pytest.mark.parametrize(
    "address, parts",
    [
        ("hf://me/flowers-1.0/a/b.pt", ("me/flowers-1.0", "a/b.pt", "")),
        ("hf://me/flowers@v1.0", ("me/flowers", "", "v1.0")),
        ("hf://me/flowers/a/b.pt@refs/pr/1", ("me/flowers", "a/b.pt", "refs/pr/1")),
    ],
)
def test_address_is_split(address, parts):
    assert split_hub_address(address) == parts


def test_revision_is_pinned_and_its_commit_recorded(hub, folders, tmp_path):
    """Of one repository the newest weights, and those of an earlier commit, by its tag, its branch and its name."""
    ours, theirs = content_of(folders / "ours"), content_of(folders / "theirs")
    old = {f"{OLD}@{name}": content for name, content in theirs.items()}
    Hub.repositories["me/flowers"] = {"weights.safetensors": ours["weights.safetensors"]} | old
    assert "origin" not in load_checkpoint("hf://me/flowers").about
    pinned = load_checkpoint("hf://me/flowers@v1")
    assert pinned.about["origin"] == f"hf://me/flowers@{OLD}"
    expected = load_weights(folders / "ours" / "weights.safetensors")
    jax.tree.map(np.testing.assert_array_equal, pinned.params, expected.params)
    before = len(Hub.asked)
    for revision in ("v1", "refs/pr/1", OLD):
        assert load_checkpoint(f"hf://me/flowers@{revision}").about == pinned.about
    assert [path for path in Hub.asked[before:] if "/resolve/" in path] == []
    file = "transformer/diffusion_pytorch_model.safetensors"
    assert load_checkpoint(f"hf://me/flowers/{file}@v1").about["origin"] == f"hf://me/flowers/{file}@{OLD}"
    [record] = [
        read
        for path in (tmp_path / "cache/addresses").glob("*.json")
        for read in [json.loads(path.read_text())]
        if read["address"] == "hf://me/flowers"
    ]
    assert record["exact"] == f"hf://me/flowers@{MAIN}"


def test_commit_that_is_no_commit_names_no_folder(hub, folders, monkeypatch):
    monkeypatch.setitem(Hub.revisions, "main", "../../elsewhere")
    Hub.repositories["me/flowers"] = content_of(folders / "ours")
    with pytest.raises(InputError, match="has the commit '../../elsewhere', which is none"):
        load_checkpoint("hf://me/flowers")


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


@pytest.mark.parametrize(
    "names, label",
    [(("ant", "hen"), "'ant'"), (("5", "0"), "0"), (("crane", "crane"), "0"), ((), "0")],
)
def test_card_draws_the_first_class_by_what_stands_for_it_alone(names, label):
    weights = Weights(CONFIG, Diffusion(), SamplingConfig(), {}, dict(class_names=names))
    assert f"pipe([{label}], seed=1)" in _use(weights, "hf://me/flowers")


def test_a_card_of_ones_own_is_sent_as_it_is(hub, folders, tmp_path):
    for name in ("ours", "theirs"):
        shutil.copytree(folders / name, tmp_path / name)
        (tmp_path / name / "README.md").write_text("my words")
        push(tmp_path / name, f"hf://me/{name}")
        assert Hub.commits[-1]["README.md"] == b"my words"


def test_nothing_is_replaced_unless_asked_for(hub, folders):
    Hub.repositories["me/pipe"] = {"model_index.json": b"{}"}
    with pytest.raises(InputError, match="hf://me/pipe has model_index.json already; give --overwrite"):
        push(folders / "theirs", "hf://me/pipe")
    assert not Hub.commits
    push(folders / "theirs", "hf://me/pipe", overwrite=True)
    [commit] = Hub.commits
    assert "transformer/config.json" in commit and "library_name: diffusers" in commit["README.md"].decode()


@pytest.mark.parametrize("kind", ["weights", "adapter"])
def test_nothing_that_is_sent_names_a_place_of_this_machine(hub, folders, tmp_path, kind):
    weights, home = load_weights(folders / "ours" / "weights.safetensors"), str(tmp_path / "home")
    config = dict(
        data=dict(name="images", path=f"{home}/flowers"),
        train=dict(init_from=f"{home}/runs/dit", class_map="0:1"),
        tracking=dict(reference="gs://bucket/statistics.npz", name="runs/relative"),
    )
    sampling = SamplingConfig(autoencoder=f"{home}/vae.safetensors")
    weights = dataclasses.replace(weights, about=weights.about | dict(config=config), sampling=sampling)
    base = dict(checkpoint=f"{home}/runs/dit", checksum="12")
    file = tmp_path / "run" / "weights.safetensors"
    save_adapter(file, weights, base) if kind == "adapter" else save_weights(file, weights)
    described = description_of(file)
    assert described["sampling"]["autoencoder"] == f"{home}/vae.safetensors"  # which this machine needs
    assert described["about"]["config"]["data"] == dict(name="images", path="flowers")
    (file.parent / "evaluation.json").write_text(json.dumps([dict(fid=1.0, reference=dict(name=f"{home}/in.npz"))]))
    push(file.parent, "hf://me/flowers")
    [commit] = Hub.commits
    assert home.encode() not in b"".join(commit.values()) and b"bucket" not in b"".join(commit.values())
    assert "| FID 1 | None | in.npz |" in commit["README.md"].decode()
    (tmp_path / "sent.safetensors").write_bytes(commit["weights.safetensors"])
    described = description_of(tmp_path / "sent.safetensors")
    assert described["sampling"]["autoencoder"] == "vae.safetensors"
    assert described["about"]["config"]["train"] == dict(init_from="dit", class_map="0:1")
    assert described["about"]["config"]["tracking"] == dict(reference="statistics.npz", name="runs/relative")
    sent, _ = read_arrays(tmp_path / "sent.safetensors", format_of(file))
    jax.tree.map(np.testing.assert_array_equal, sent, flatten(weights.params))


def description_of(file) -> dict:
    return json.loads(read_metadata(file)["description"])


def test_only_the_files_of_the_model_are_sent(hub, folders, tmp_path):
    shutil.copytree(folders / "theirs", tmp_path / "pipe")
    for name in ("notes.txt", ".git/config", "transformer/.token.json", "transformer/log.txt", "old/model.bin"):
        (tmp_path / "pipe" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "pipe" / name).write_text("of this machine")
    push(tmp_path / "pipe", "hf://me/pipe")
    assert set(Hub.commits[0]) == {*content_of(folders / "theirs"), "README.md"}


@pytest.mark.parametrize(
    "address", ["me/flowers", "hf://me/flowers/file.bin", "hf://me/flowers@v1", "https://me/flowers"]
)
def test_push_wants_a_repository(folders, address):
    with pytest.raises(InputError, match="--push wants hf://owner/name"):
        push(folders / "ours", address)


def test_unfinished_folder_is_not_sent(hub, tmp_path):
    with pytest.raises(InputError, match="is not finished: it has neither weights.safetensors"):
        push(tmp_path, "hf://me/flowers")
    assert not Hub.asked and not Hub.repositories
