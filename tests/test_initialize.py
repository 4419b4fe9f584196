"""Training starts from a model with other classes, or another image side: what fits is kept, bit for bit."""

import contextlib
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import STATIC, changed
from PIL import Image
from stand_ins import mean_for_autoencoder, png, small_autoencoder

from dydit_jax.checkpoints import Weights, load_weights, save_autoencoder, save_weights
from dydit_jax.convert.conversion import Conversion, convert
from dydit_jax.convert.exporting import Export, export
from dydit_jax.diffusion.process import Diffusion
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.errors import InputError
from dydit_jax.jobs import training_data
from dydit_jax.jobs.sample import Request, _labels, sample
from dydit_jax.jobs.train import train_and_evaluate
from dydit_jax.jobs.training_data import open_training_data, with_counted_classes, with_latents
from dydit_jax.loading import load_checkpoint
from dydit_jax.models.config import DiTConfig
from dydit_jax.models.dit import Model
from dydit_jax.pipeline import Pipeline
from dydit_jax.runtime.sharding import make_mesh
from dydit_jax.training.experiment import Experiment, read_experiment
from dydit_jax.training.initialize import (
    NO_ROW,
    first_params,
    kept_class_names,
    label_rows,
    starting_leaves,
    starting_weights,
)
from dydit_jax.training.update import TrainConfig

CONFIG = DiTConfig(depth=1, width=32, heads=2, patch=4, side=8, channels=1, classes=5, positions="stored")
ONE = changed(STATIC, mesh=dict(data=1, fsdp=1))  # device: split over several, sums have another order
NAMES = ("ant", "bee", "cat, house cat", "dog", "eel")
TWO_CRANES = ("crane", "tulip", "crane", "fox", "hen")  # as ImageNet has them


@pytest.fixture(scope="module")
def save(tmp_path_factory):
    """A function that saves a model of five classes, without zeros, changed as asked, and returns its path."""
    folder = tmp_path_factory.mktemp("sources")
    generator = np.random.default_rng(0)
    filled = lambda leaf: generator.standard_normal(leaf.shape).astype(np.float32) / 8
    made = jax.tree.map(filled, Model(CONFIG).abstract_params())

    def save(name="source", *, classes=5, names=(), table=None, positions=None):
        params = jax.tree.map(np.copy, made)
        rows = params["label_embed"]["table"]
        params["label_embed"]["table"] = rows[5 - classes :] if table is None else table
        if positions is not None:
            params["patch_embed"]["positions"] = positions
        config = dataclasses.replace(CONFIG, classes=classes)
        weights = Weights(config, Diffusion(), SamplingConfig(), params, dict(class_names=names))
        save_weights(folder / f"{name}.safetensors", weights)
        return str(folder / f"{name}.safetensors")

    return save


def start(path, names=(), *, classes=3, side=8, **train):
    """Return source, model and first parameters of a training from the weights at a path."""
    section = dict(positions="stored", classes=classes, side=side)
    experiment = read_experiment(changed(ONE, model=section, train=dict(init_from=path, **train)))
    model, source = Model(experiment.model), starting_weights(Model(experiment.model), experiment)
    leaves = starting_leaves(source, model, experiment, names)
    mesh = make_mesh(experiment.mesh, jax.devices()[:1])
    return source, model, first_params(model, experiment, mesh, leaves)


def chosen(path, names=(), *, classes=3, **train) -> list[int]:
    """Return the row of the weights at a path that each class starts from, then that of "no class"."""
    return label_rows(load_checkpoint(path), classes, TrainConfig(steps=1, init_from=path, **train), names).tolist()


def rows(params) -> np.ndarray:
    return np.asarray(params["label_embed"]["table"])


def test_kept_classes_give_the_outputs_of_the_source_bit_by_bit(save):
    source, model, params = start(save(), class_map="0:4,2:1")
    x, t = jnp.asarray(np.random.default_rng(1).standard_normal((3, 8, 8, 1)), jnp.float32), jnp.asarray([0, 500, 999])
    apply = jax.jit(Model.apply, static_argnums=0, static_argnames="mode")
    run = lambda config, params, labels: apply(Model(config), params, x, t, jnp.asarray(labels), mode="complete")[0]
    ours, theirs = run(model.config, params, [0, 2, 3]), run(source.model, source.params, [4, 1, 5])
    np.testing.assert_array_equal(ours, theirs)
    assert np.abs(theirs).max() > 0.1


def test_start_from_another_process_is_said(save, caplog):
    flow = dict(process=dict(name="flow"), loss=dict(terms=("mse", "budget")), sampling=dict(sampler="heun", steps="4"))
    for sections, said in ((flow, True), ({}, False)):
        model = dict(positions="stored", classes=5)
        experiment = read_experiment(changed(ONE, model=model, train=dict(init_from=save()), **sections))
        caplog.clear()
        starting_weights(Model(experiment.model), experiment)
        assert ("has another prediction to learn" in caplog.text) == said


def test_new_classes_stay_random_or_start_from_the_mean(save):
    path = save()
    source, model, params = start(path, class_map="1:3")
    _, _, others = start(path, class_map="1:2", seed=1)
    assert (rows(params)[[0, 2]] != rows(others)[[0, 2]]).all()  # random, by the seed
    np.testing.assert_allclose(rows(params)[[0, 2]].std(), model.config.label_init_std, rtol=0.3)
    np.testing.assert_array_equal(rows(params)[[1, 3]], rows(source.params)[[3, 5]])
    _, _, params = start(path, class_map="1:3", new_classes="mean")
    np.testing.assert_allclose(rows(params)[[0, 2]], rows(source.params)[:5].mean(0)[None].repeat(2, 0), atol=1e-7)
    np.testing.assert_array_equal(rows(params)[[1, 3]], rows(source.params)[[3, 5]])


@pytest.mark.parametrize(
    "theirs, ours, classes, expected",
    [
        ((), (), 5, [0, 1, 2, 3, 4, 5]),  # by number where there are as many
        ((), ("x", "y", "z"), 3, [NO_ROW, NO_ROW, NO_ROW, 5]),
        (NAMES, ("dog", "House Cat", "fox"), 3, [3, 2, NO_ROW, 5]),
        (NAMES, ("v", "w", "x", "y", "z"), 5, [NO_ROW] * 5 + [5]),
        (("0", "1", "2", "3", "4"), ("5", "6", "4"), 3, [NO_ROW, NO_ROW, 4, 5]),  # names that are numbers are names
        (("A", "B", "a", "b", "c"), ("B", "a", "b", "C"), 4, [1, 2, 3, 4, 5]),  # each its own case where there is one
        (("a", "b", "cafe\u0301", "d", "e"), ("caf\u00e9", "d"), 2, [2, 3, 5]),
        (TWO_CRANES, TWO_CRANES, 5, [0, 1, 2, 3, 4, 5]),
        ((*NAMES, "none", "x"), ("dog", "none", "x"), 3, [3, NO_ROW, NO_ROW, 5]),  # more names than classes
        (TWO_CRANES, ("crane", "fox"), 2, [NO_ROW, 3, 5]),  # which of them, nobody says
    ],
)
def test_classes_are_matched_by_name_or_by_number(save, theirs, ours, classes, expected):
    assert chosen(save("named", names=theirs), ours, classes=classes) == expected


def test_map_takes_names_and_files(save, tmp_path):
    path, table = save("named", names=NAMES), tmp_path / "map.txt"
    table.write_text("fox:dog\n\nhouse cat : house cat\n2:0\n")
    assert chosen(path, ("fox", "house cat", "gnu"), class_map=str(table)) == [3, 2, 0, 5]
    for encoding in ("utf-8-sig", "utf-16"):  # of Windows
        table.write_bytes("fox:dog\r\nhouse cat:house cat\r\n2:0\r\n".encode(encoding))
        assert chosen(path, ("fox", "house cat", "gnu"), class_map=str(table)) == [3, 2, 0, 5]
    table.write_bytes(b"fox:\xff")
    with pytest.raises(InputError, match="map.txt can't be read as text"):
        chosen(path, ("fox", "house cat", "gnu"), class_map=str(table))


@pytest.mark.parametrize(
    "text, message",
    [
        ("3:1", "names the class '3', which this model does not have; its classes are 0 to 2"),
        ("0:5", "names the class '5', which train.init_from does not have; its classes are 0 to 4"),
        ("0:1,fox:2,0:2", "names the own class '0' twice"),
        ("fxo:1", "names the class 'fxo', which this model does not have.*Did you mean 'fox'"),
        ("fox:bea", "names the class 'bea', which train.init_from does not have.*Did you mean 'bee'"),
        ("0:1,2", "has '2'; a pair is <own class>:<class of train.init_from>"),
        ("map.txt", "'map.txt' is neither a file nor a map such as 0:207,1:360"),
    ],
)
def test_maps_that_do_not_fit_are_refused(save, text, message):
    with pytest.raises(InputError, match=message):
        chosen(save("named", names=NAMES), ("gnu", "fox", "hen"), class_map=text)


def test_map_without_a_source_and_an_unknown_way_are_refused():
    with pytest.raises(InputError, match="train.class_map '0:1' needs train.init_from"):
        read_experiment(changed(STATIC, train=dict(class_map="0:1")))
    with pytest.raises(InputError, match="Unknown train.new_classes 'zero'; known: mean, random"):
        read_experiment(changed(STATIC, train=dict(new_classes="zero")))


def test_unconditional_model_gives_its_only_row(save):
    source, _, params = start(save("unconditional", classes=0))
    assert rows(source.params).shape == (1, 32)
    np.testing.assert_array_equal(rows(params)[3], rows(source.params)[0])
    assert (rows(params)[:3] != rows(source.params)).all()
    with pytest.raises(InputError, match="'mean' needs classes to average"):
        start(save("unconditional", classes=0), new_classes="mean")


def test_unconditional_model_comes_from_pytorch_and_is_not_guided(save, tmp_path):
    path = save("unconditional", classes=0)
    export(Export(path, str(tmp_path / "theirs.safetensors")))
    convert(Conversion(str(tmp_path / "theirs.safetensors"), str(tmp_path / "ours.safetensors"), heads=2))
    found = load_checkpoint(tmp_path / "ours.safetensors")
    assert found.model.classes == 0 and found.sampling.guidance == 1.0
    jax.tree.map(np.testing.assert_array_equal, found.params, load_checkpoint(path).params)
    with pytest.raises(InputError, match="Guidance needs classes, and this model has none"):
        sample(Request(str(tmp_path / "ours.safetensors"), str(tmp_path / "out"), ["0"], overrides=dict(guidance=2.0)))


def test_stored_positions_are_interpolated_to_another_side(save, caplog):
    # Linear over the picture in one channel, constant in the others; and a larger grid to come from.
    line, column = np.mgrid[0:8, 0:8] / 8
    positions = np.tile(np.arange(32.0, dtype=np.float32), (8, 8, 1))
    positions[..., 0], positions[..., 1] = line, column
    config = dataclasses.replace(CONFIG, side=32)
    weights = load_weights(save())
    weights.params["patch_embed"]["positions"] = positions.reshape(64, 32)
    path = save() + ".side32.safetensors"
    save_weights(path, dataclasses.replace(weights, model=config))
    with caplog.at_level("INFO"):
        source, _, params = start(path, side=64)
    resized = np.asarray(params["patch_embed"]["positions"]).reshape(16, 16, 32)
    middle = slice(4, 12)  # the edges have no neighbours on one side
    expected = (np.arange(16)[middle] + 0.5) / 16 - 0.5 / 8
    np.testing.assert_allclose(resized[middle, middle, 0], np.tile(expected[:, None], (1, 8)), atol=1e-6)
    np.testing.assert_allclose(resized[middle, middle, 1], np.tile(expected, (8, 1)), atol=1e-6)
    np.testing.assert_allclose(resized[..., 2:], np.broadcast_to(np.arange(2.0, 32), (16, 16, 30)), rtol=1e-6)
    assert "position table of side 32 is interpolated to side 64" in caplog.text
    others = lambda params: {name: leaf for name, leaf in params.items() if name not in ("label_embed", "patch_embed")}
    jax.tree.map(np.testing.assert_array_equal, others(params), others(source.params))


# --- From a folder of class folders --------------------------------------------------------------


@pytest.mark.parametrize(
    "theirs, classes, train, expected",
    [
        (NAMES, 5, {}, NAMES),  # by number
        (TWO_CRANES, 5, {}, TWO_CRANES),
        (NAMES, 2, dict(class_map="0:dog,1:1"), ("dog", "bee")),
        (NAMES, 3, dict(class_map="0:dog,1:1"), ()),  # one is new
        (NAMES, 2, dict(class_map="0:dog,1:3"), ()),  # two would have one name
        (NAMES, 3, {}, ()),
        ((), 5, {}, ()),
    ],
)
def test_classes_of_data_without_names_keep_those_that_they_start_from(save, theirs, classes, train, expected):
    path = save("start", names=theirs)
    section = dict(positions="stored", classes=classes)
    experiment = read_experiment(changed(ONE, model=section, train=dict(init_from=path, **train)))
    assert kept_class_names(load_checkpoint(path), experiment) == expected


@pytest.mark.slow
def test_names_are_kept_over_a_resumed_run(save, tmp_path):
    def names_after(steps):
        sections = dict(train=dict(init_from=save("start", names=NAMES), steps=steps), checkpoint=dict(every_steps=1))
        sections["data"] = dict(name="synthetic", batch_size=4)
        train_and_evaluate(changed(STATIC, model=dict(classes=5, positions="stored"), **sections), tmp_path / "run")
        return [load_checkpoint(tmp_path / place).class_names for place in ("run", "run/weights.safetensors")]

    assert names_after(1) == names_after(2) == [NAMES, NAMES]


@pytest.fixture
def pictures(tmp_path):
    """A folder with two pictures of each of three classes."""
    generator = np.random.default_rng(0)
    for name in ("fox", "golden retriever", "hen"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(2):
            pixels = generator.integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{number}.png")
    return str(tmp_path / "pictures")


@pytest.mark.slow
def test_folder_of_classes_is_trained_on_and_drawn_by_name(save, pictures, tmp_path):
    config = changed(
        STATIC,
        model=dict(classes=-1, positions="stored"),
        data=dict(name="images", path=pictures, batch_size=4),
        train=dict(init_from=save("named", names=NAMES), steps=1),
        checkpoint=dict(every_steps=1),
        sampling=dict(sampler="ddim", steps="2", clip=1.0, guidance=1.0),
    )
    train_and_evaluate(config, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["classes"] == 3
    for place in ("run", "run/weights.safetensors"):
        assert load_checkpoint(tmp_path / place).class_names == ("fox", "golden retriever", "hen")
    drawn = lambda label, out: sample(Request(str(tmp_path / "run"), str(tmp_path / out), labels=[label])).images
    np.testing.assert_array_equal(drawn("golden retriever", "by_name"), drawn("1", "by_number"))
    with pytest.raises(InputError, match="--labels must hold .*not golden retreiver.* mean 'golden retriever'"):
        drawn("golden retreiver", "typo")


def test_checkpoint_keeps_the_names_that_labels_may_be(save, tmp_path, monkeypatch):
    path, asked = save("named", names=NAMES), []
    monkeypatch.setattr(Pipeline, "draw", lambda self, job: asked.append(job.labels.tolist()) or iter(()))
    pipe = Pipeline.load(path)
    for labels in ("house cat", [0, "eel"], np.asarray([2, 5]), jnp.asarray([1])):
        with contextlib.suppress(ValueError):  # nothing is drawn
            pipe(labels)
    assert asked == [[2], [0, 4], [2, 5], [1]]
    with pytest.raises(InputError, match="labels must hold numbers .* or names of classes, not eal.* mean 'eel'"):
        pipe("eal")
    (tmp_path / "labels.txt").write_text("House cat\n3 1\neel\n")
    labels = lambda **given: _labels(Request(path, "out", **given), load_checkpoint(path)).tolist()
    assert labels(labels_file=str(tmp_path / "labels.txt")) == [2, 3, 1, 4]
    assert labels(labels=["cat", "0"], rows=2) == [2, 0, 2, 0]
    with pytest.raises(InputError, match="--labels must hold .*not eal.* mean 'eel'"):
        sample(Request(path, str(tmp_path / "out"), labels=["eal"]))
    assert not (tmp_path / "out").exists()


def test_more_classes_than_the_config_has_are_named(pictures):
    config = changed(STATIC, model=dict(classes=1, side=16, channels=3), data=dict(name="images", path=pictures))
    with pytest.raises(InputError, match="3 classes; .* and 1. No row is left for 'golden retriever', 'hen'"):
        open_training_data(read_experiment(config))


@pytest.mark.parametrize("name, path, classes", [("digits", "", 10), ("images", "pictures", 3)])
def test_classes_are_counted(pictures, tmp_path, name, path, classes):
    path = str(tmp_path / path) if path else ""
    config = changed(STATIC, model=dict(classes=-1), data=dict(name=name, path=path))
    assert with_counted_classes(config)["model"]["classes"] == classes
    with pytest.raises(InputError, match="data.name=synthetic has none to count"):
        with_counted_classes(changed(config, data=dict(name="synthetic")))


def in_latents(pictures, autoencoder: str) -> Experiment:
    """Return the experiment of a model of 4 channels in the latents of pictures."""
    config = changed(
        STATIC,
        model=dict(classes=-1, side=2, patch=1, channels=4),
        data=dict(name="images", path=pictures),
        sampling=dict(autoencoder=autoencoder),
    )
    return read_experiment(with_counted_classes(config))


def test_pictures_of_a_model_in_latents_are_encoded_once(pictures, tmp_path):
    experiment = in_latents(pictures, "sd-vae-ft-ema")
    with mean_for_autoencoder() as given:
        first = with_latents(experiment, tmp_path / "run")
        second = with_latents(experiment, tmp_path / "run")
    assert first == second and first.data.path == str(tmp_path / "run.latents") and sum(given) == 12
    data = open_training_data(first)
    assert (len(data), data.class_names) == (6, ("fox", "golden retriever", "hen"))
    assert experiment.data.name == "images" and first.data.name == "latents"


def test_latents_that_a_training_can_not_make_are_refused_in_its_own_words(pictures, tmp_path):
    experiment = in_latents(pictures, "sd-vae-ft-ema")
    with mean_for_autoencoder():
        with pytest.raises(InputError, match="beside the work directory, and gs://b/run is not a folder on a disk"):
            with_latents(experiment, "gs://b/run")
        with_latents(experiment, tmp_path / "run")
        (tmp_path / "pictures" / "hen" / "more.png").write_bytes(png(9))
        message = r"made otherwise \(source, count differ\); give the pictures back .* or name another --workdir"
        with pytest.raises(InputError, match=message):
            with_latents(experiment, tmp_path / "run")


def test_an_autoencoder_of_other_channels_is_refused_before_a_picture_is_encoded(pictures, tmp_path):
    save_autoencoder(tmp_path / "vae.safetensors", small_autoencoder(channels=8), {})
    experiment = in_latents(pictures, str(tmp_path / "vae.safetensors"))
    with pytest.raises(InputError, match="The model draws 4 channels, but the latents of the autoencoder .* have 8"):
        with_latents(experiment, tmp_path / "run")
    assert not (tmp_path / "run.latents").exists()


def test_pictures_have_the_side_that_their_autoencoder_makes_the_models_of(pictures, tmp_path, monkeypatch):
    """Also that of an address that nothing was fetched from yet."""
    own, requests = small_autoencoder(widths=(32,) * 5), []
    monkeypatch.setattr(training_data, "load_autoencoder", lambda name: {"hf://owner/vae": own}[name])
    prepare = lambda request, **_: (requests.append(request), request.out)[1]
    monkeypatch.setattr(training_data, "prepare_latents", prepare)
    with_latents(in_latents(pictures, "hf://owner/vae"), tmp_path / "run")
    assert requests[0].side == 2 * own.config.factor == 32
