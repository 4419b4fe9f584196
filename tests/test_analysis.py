"""`analyze.py`: losses by timestep and patch, the pictures with their numbers, the page, and wrong requests."""

import csv
import dataclasses
import html.parser
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dydit_jax.checkpoints import Weights, save_weights
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.diffusion.schedules import DiffusionConfig
from dydit_jax.drawing.report import write_report
from dydit_jax.errors import InputError, StopError
from dydit_jax.jobs.analyze import Analysis, analyze
from dydit_jax.models.dit import Model
from dydit_jax.sampling.noise import image_keys
from dydit_jax.training.update import patch_losses


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
        save_weights(path, Weights(config, DiffusionConfig(), sampling, jax.device_get(leaves), about))
    return folder


def request(checkpoints, *names, **settings):
    settings = dict(dict(num_examples=7, num_timesteps=3, batch_size=4, labels=("1", "2")), **settings)
    return Analysis(checkpoints=tuple(str(checkpoints / f"{name}.safetensors") for name in names), **settings)


def test_loss_of_a_silent_model_is_the_square_of_the_noise(tiny):
    config = dataclasses.replace(tiny[0].config, routers="none", depth=1)
    model = Model(config)
    params = jax.jit(model.init)(jax.random.key(0))  # a fresh DiT predicts zeros
    keys, start = image_keys(0, jnp.arange(2)), jnp.zeros((2, 8, 8, 1))
    settings = dict(model=model, diffusion=DiffusionConfig(), mode="complete")
    found = patch_losses(params, start, jnp.zeros(2, int), keys, jnp.int32(500), **settings)
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


def test_losses_do_not_depend_on_the_batch(checkpoints, tmp_path):
    each = [
        analyze(request(checkpoints, "static", out=str(tmp_path / str(size)), batch_size=size))["static"]
        for size in (4, 100)
    ]
    np.testing.assert_allclose(*each, rtol=1e-5)


def test_losses_that_are_not_finite_are_named(checkpoints, tmp_path, tiny):
    model, params = tiny
    params = jax.tree.map(np.array, params)
    params["label_embed"]["table"][:] = np.nan
    sampling, about = SamplingConfig(), dict(config=dict(data=dict(name="digits")))
    save_weights(tmp_path / "nan.safetensors", Weights(model.config, DiffusionConfig(), sampling, params, about))
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
    save_weights(other, Weights(wide, DiffusionConfig(), SamplingConfig(), params, {}))
    out = str(tmp_path / "new")
    for told, make in (
        ("is not empty", lambda: request(checkpoints, "static", out=str(full))),
        ("names a model twice", lambda: request(checkpoints, "static", "static", out=out)),
        ("--num_examples", lambda: request(checkpoints, "static", out=out, num_examples=1)),
        ("--num_timesteps", lambda: request(checkpoints, "static", out=out, num_timesteps=10**12)),
        ("--batch_size", lambda: request(checkpoints, "static", out=out, batch_size=10**9)),
        ("--labels", lambda: request(checkpoints, "static", out=out, labels=("9" * 5000,))),
        ("--labels", lambda: request(checkpoints, "static", out=out, labels=("cat",))),
        ("can't be compared", lambda: Analysis((str(checkpoints / "static.safetensors"), str(other)), out)),
        ("does not say what it was trained on", lambda: Analysis((str(other),), out)),
        ("Unknown dataset", lambda: request(checkpoints, "static", out=out, data="birds")),
        ("--labels must be numbers from 0 to 9", lambda: request(checkpoints, "dynamic", out=out, labels=("11",))),
    ):
        with pytest.raises(InputError, match=told):
            analyze(make())
        assert not (tmp_path / "new").exists()


# --- The page ------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """Collects what a page points to and checks that its tags are closed."""

    def __init__(self):
        super().__init__()
        self.sources, self.open = [], []

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def assert_self_contained(text: str, pictures: int) -> None:
    page = Page()
    page.feed(text)
    assert not page.open and len(page.sources) == pictures
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)


def test_page_holds_what_lies_in_the_folder(tmp_path):
    sampling = dict(sampler="ddpm", steps="250", guidance=1.5, guided_channels="all")
    manifest = dict(
        dict.fromkeys(("checksum", "num_images", "seed", "mode", "precision", "matmul_precision", "device"), "x"),
        checkpoint="<b>runs</b>",
        sampling=sampling,
        model=dict(depth=2, width=32, heads=4, patch=2),
        versions=dict(jax="1"),
    )
    cost = dict(macs=5e9, macs_complete=1e10, heads=0.5, groups=0.5, tokens=0.5, images=4, seconds=2.0)
    found = dict(fid=2.5, inception_score=9.0, samples=dict(name="s", count=10), reference=None)
    for name, content in (("manifest", manifest), ("cost", cost), ("evaluation", [found])):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "images").mkdir()
    for number in range(30):
        Image.new("L", (8, 8)).save(tmp_path / "images" / f"{number:06d}.png")
    text = write_report(tmp_path).read_text()
    assert_self_contained(text, pictures=1)
    for told in ("&lt;b&gt;runs", "ddpm, 250 steps", "5.0000 (50.0 %)", "2.5000", "The first images of the set"):
        assert told in text
