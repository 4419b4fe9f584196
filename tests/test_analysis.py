"""`analyze.py`: losses by timestep and patch, the pictures with their numbers, the page, and wrong requests."""

import csv
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_report import assert_self_contained

from dydit_jax.checkpoints import Weights, load_weights, save_weights
from dydit_jax.diffusion.process import Diffusion
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.drawing.figures import draw_macs
from dydit_jax.drawing.loss_figures import draw_loss_maps, draw_losses
from dydit_jax.drawing.style import save_figure
from dydit_jax.errors import InputError, StopError
from dydit_jax.jobs.analyze import Analysis, _labels, _named, _parts, analyze, short_names
from dydit_jax.models.dit import Model
from dydit_jax.sampling.noise import image_keys
from dydit_jax.training.probe import patch_losses


@pytest.fixture(scope="module")
def checkpoints(tiny, tmp_path_factory):
    """A dynamic model, and a static one of other patches whose output is zero."""
    folder = tmp_path_factory.mktemp("models")
    model, params = tiny
    static = dataclasses.replace(model.config, routers="none", patch=4)
    sampling = SamplingConfig(sampler="ddim", steps="3", clip=1.0, guidance=1.0)
    about = dict(config=dict(data=dict(name="digits")))
    for name, config, leaves in (
        ("dynamic", model.config, params),
        ("static", static, jax.jit(Model(static).init)(jax.random.key(0))),
    ):
        path = folder / f"{name}.safetensors"
        save_weights(path, Weights(config, Diffusion(), sampling, jax.device_get(leaves), about))
    return folder


def request(checkpoints, *names, **settings):
    settings = dict(dict(num_examples=7, num_timesteps=3, batch_size=4, labels=("1", "2")), **settings)
    return Analysis(checkpoints=tuple(str(checkpoints / f"{name}.safetensors") for name in names), **settings)


def test_loss_of_a_silent_model_is_the_square_of_the_noise(tiny):
    config = dataclasses.replace(tiny[0].config, routers="none", depth=1)
    model = Model(config)
    params = jax.jit(model.init)(jax.random.key(0))  # a fresh DiT predicts zeros
    keys, batch = image_keys(0, jnp.arange(2)), dict(image=jnp.zeros((2, 8, 8, 1)), label=jnp.zeros(2, int))
    settings = dict(model=model, process=Diffusion(), mode="complete")
    found = patch_losses(params, batch, keys, jnp.int32(500), **settings)
    noise = np.stack([jax.random.normal(jax.random.fold_in(key, 500), (8, 8, 1)) for key in keys])
    for row in range(4):
        for column in range(4):
            patch = noise[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            np.testing.assert_allclose(found[:, 4 * row + column], (patch**2).mean((1, 2, 3)), rtol=1e-5)


def test_pictures_numbers_and_page(checkpoints, tmp_path):
    out = tmp_path / "out"
    losses = analyze(request(checkpoints, "static", "dynamic", out=str(out), report=True))
    assert {name: found.shape for name, found in losses.items()} == {"static": (7, 3), "dynamic": (7, 3)}
    names = ["losses", "loss_maps", "macs"] + [f"dynamic/{n}" for n in ("routing", "tokens", "tokens_by_layer", "plan")]
    for name in names:
        assert Image.open(out / f"{name}.png").size[0] > 400
        assert (out / f"{name}.svg").read_text().rstrip().endswith("</svg>")
    read = lambda name: list(csv.DictReader((out / f"{name}.csv").open()))
    rows = read("losses")
    assert [float(row["loss"]) for row in rows if row["model"] == "dynamic"] == pytest.approx(losses["dynamic"].mean(0))
    gap = (losses["dynamic"] - losses["static"]).mean(0)
    assert [float(row["difference"]) for row in rows if row["model"] == "dynamic"] == pytest.approx(gap)
    maps = read("loss_maps")  # 16 patches of the one, 4 of the other; their mean is the loss
    at_zero = [float(row["loss"]) for row in maps if row["model"] == "static" and row["timestep"] == "0"]
    assert len(at_zero) == 4 and np.mean(at_zero) == pytest.approx(losses["static"][:, 0].mean())
    tokens = read("dynamic/tokens")
    assert len(tokens) == 2 * 3 * 2 and {row[f"token_{n}"] for row in tokens for n in range(16)} == {"0", "1"}
    assert len(read("dynamic/routing")) == 3 * 2 and len(read("macs")) == 3
    assert_self_contained((out / "report.html").read_text(), pictures=len(names))


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a"], ["a"]),
        (["runs/a", "runs/b"], ["a", "b"]),
        (["runs/a/seed_0", "runs/b/seed_0"], ["a", "b"]),
        (["a/x", "a/y", "b/x"], ["a-x", "a-y", "b-x"]),
        (["a", "b/a"], ["a", "b-a"]),
        (["a", "a"], None),
        (
            ["https://me:key@host/m.safetensors?token=1#sha256=0", "hf://owner/name@v1", "/runs/c"],
            ["m", "name@v1", "c"],
        ),
    ],
)
def test_models_are_named_by_what_tells_their_paths_apart(paths, names):
    assert short_names([_parts(path) for path in paths]) == names


@pytest.mark.parametrize(
    ("paths", "names"),
    [(["."], ["b"]), ([".."], ["a"]), (["../b", "../c.safetensors"], ["b", "c"]), ([".", "c"], ["b", "c"])],
)
def test_models_at_dots_have_the_names_of_their_folders(paths, names, checkpoints, tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    weights = load_weights(checkpoints / "static.safetensors")
    assert list(_named([weights] * len(paths), tuple(paths))) == names
    with pytest.raises(InputError, match="--checkpoints names a model twice: ., ../b"):
        _named([weights] * 2, (".", "../b"))


def test_legends_name_every_model():
    values = {name: np.ones((2, 3)) for name in ("_b", "a")}
    assert legend(draw_losses(np.arange(3), values)) == ["_b", "a"]
    timesteps, macs = (dict.fromkeys(values, np.ones(3)) for _ in range(2))
    assert legend(draw_macs(timesteps, macs, dict(_b=1, a=2)))[0] == "_b: 1.0, 100 % of complete"


def test_dollars_in_names_are_no_formulas(tmp_path):
    names = (r"a$\foo$", "b")
    figures = (
        draw_losses(np.arange(3), dict.fromkeys(names, np.ones((2, 3)))),
        draw_loss_maps(np.arange(3), dict.fromkeys(names, np.ones((3, 4)))),
        draw_macs(*(dict.fromkeys(names, np.ones(3)) for _ in range(2)), dict.fromkeys(names, 1)),
    )
    for figure in figures:
        save_figure(tmp_path / "figure.svg", figure)


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].texts]


def test_data_that_a_file_names_are_named_before_they_are_opened(checkpoints, tmp_path, tiny, caplog):
    about, path = dict(config=dict(data=dict(name="tfds", path="data/flowers/train"))), tmp_path / "strange.safetensors"
    save_weights(path, Weights(tiny[0].config, Diffusion(), SamplingConfig(), jax.device_get(tiny[1]), about))
    with caplog.at_level("INFO"), pytest.raises(InputError, match="'data/flowers/train' can't be opened"):
        analyze(Analysis((str(path),), str(tmp_path / "out")))
    assert f"The data are those that {path} names: tfds data/flowers/train" in caplog.text


def test_losses_do_not_depend_on_the_batch(checkpoints, tmp_path):
    each = [
        analyze(request(checkpoints, "static", out=str(tmp_path / str(size)), batch_size=size))["static"]
        for size in (4, 100)
    ]
    np.testing.assert_allclose(*each, rtol=1e-5)


@pytest.mark.parametrize(
    "routers, classes, labels, drawn",
    [
        ("first_on", 10, None, (0, 1, 2, 3)),
        ("first_on", 2, None, (0, 1)),
        ("first_on", 0, None, (0,)),  # the label of no class
        ("first_on", 2, ("2", " 0"), (2, 0)),
        ("none", 2, ("11",), ()),  # of a model that is not sampled
        ("first_on", 2, ("tulip", "0"), (1, 0)),
    ],
)
def test_images_are_drawn_with_labels_that_the_model_has(tiny_config, routers, classes, labels, drawn):
    config = dataclasses.replace(tiny_config, routers=routers, classes=classes)
    about = dict(class_names=["rose", "tulip"])
    models = dict(model=Weights(config, Diffusion(), SamplingConfig(guidance=1.0), {}, about))
    assert _labels(Analysis(("model",), "out", labels=labels), models) == drawn


@pytest.mark.parametrize(
    ("autoencoder", "message"),
    [
        ("", "model draws 4, which are latents; name their decoder"),
        ("nowhere", "no published autoencoder of that name"),
    ],
)
def test_models_whose_images_could_not_be_shown_are_refused_at_once(
    tiny_config, tmp_path, monkeypatch, autoencoder, message
):
    config, sampling = dataclasses.replace(tiny_config, channels=4), SamplingConfig(autoencoder=autoencoder)
    latents = Weights(config, Diffusion(), sampling, {}, {})
    monkeypatch.setattr("dydit_jax.jobs.analyze.load_checkpoint", lambda *_, **__: latents)
    with pytest.raises(InputError, match=message):
        analyze(Analysis(("latents",), str(tmp_path / "out"), data="synthetic"))
    assert not (tmp_path / "out").exists()


def test_losses_that_are_not_finite_are_named(checkpoints, tmp_path, tiny):
    model, params = tiny
    params = jax.tree.map(np.array, params)
    params["label_embed"]["table"][:] = np.nan
    sampling, about = SamplingConfig(), dict(config=dict(data=dict(name="digits")))
    save_weights(tmp_path / "nan.safetensors", Weights(model.config, Diffusion(), sampling, params, about))
    with pytest.raises(StopError, match="loss of nan on example 0 at timestep 0 is not finite"):
        analyze(request(tmp_path, "nan", out=str(tmp_path / "out")))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["analysis.json"]


def test_wrong_requests_are_refused(checkpoints, tmp_path, tiny):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("")
    other = tmp_path / "other.safetensors"
    wide = dataclasses.replace(tiny[0].config, channels=3, routers="none")
    params = jax.device_get(jax.jit(Model(wide).init)(jax.random.key(0)))
    save_weights(other, Weights(wide, Diffusion(), SamplingConfig(), params, {}))
    out = str(tmp_path / "new")
    for message, make in (
        ("is not empty", lambda: request(checkpoints, "static", out=str(full))),
        ("names a model twice", lambda: request(checkpoints, "static", "static", out=out)),
        ("--num_examples", lambda: request(checkpoints, "static", out=out, num_examples=1)),
        ("--num_timesteps", lambda: request(checkpoints, "static", out=out, num_timesteps=10**12)),
        ("--batch_size", lambda: request(checkpoints, "static", out=out, batch_size=10**9)),
        ("--labels", lambda: request(checkpoints, "dynamic", out=out, labels=("9" * 5000,))),
        ("--labels must hold .*, not cat", lambda: request(checkpoints, "dynamic", out=out, labels=("cat",))),
        ("--labels must hold .*, not nothing", lambda: request(checkpoints, "dynamic", out=out, labels=())),
        ("can't be compared", lambda: Analysis((str(checkpoints / "static.safetensors"), str(other)), out)),
        ("does not say what it was trained on", lambda: Analysis((str(other),), out)),
        ("Unknown dataset", lambda: request(checkpoints, "static", out=out, data="birds")),
        (
            "--labels must hold numbers from 0 to 9 .10 for no class., not 11[.]",
            lambda: request(checkpoints, "dynamic", out=out, labels=("11",)),
        ),
    ):
        with pytest.raises(InputError, match=message):
            analyze(make())
        assert not (tmp_path / "new").exists()
