"""What docs/extend.md adds works as the page says, and a class that breaks a protocol is told what it should return."""

import dataclasses
import importlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from flax import nnx

import dydit_jax
from dydit_jax.checkpoints import Weights
from dydit_jax.data.batches import batches
from dydit_jax.data.sources import SOURCES, DataConfig, open_source, register_source
from dydit_jax.diffusion.process import PROCESSES, Diffusion, noise_first, perturb, spread_times
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.diffusion.solvers import SOLVERS
from dydit_jax.diffusion.terms import LOSS_TERMS, LossConfig, LossInputs, register_loss_term, weigh_terms
from dydit_jax.errors import InputError
from dydit_jax.fast.execution.registry import EXECUTIONS, find_execution, register_execution
from dydit_jax.models.config import DiTConfig
from dydit_jax.models.dit import Model
from dydit_jax.models.execution import MLPStep, TokenExecution
from dydit_jax.models.routing import (
    TIME_ROUTERS,
    TOKEN_ROUTERS,
    LinearTimeRouter,
    MLPTokenRouter,
    register_time_router,
    register_token_router,
)
from dydit_jax.pipeline import Pipeline
from dydit_jax.sampling.generate import SamplingRun
from dydit_jax.sampling.table import make_table
from dydit_jax.training.experiment import build_update, read_experiment
from dydit_jax.training.optimizer import build_optimizer
from dydit_jax.training.update import init_state

REGISTRIES = (TIME_ROUTERS, TOKEN_ROUTERS, LOSS_TERMS, SOURCES, EXECUTIONS, SOLVERS, PROCESSES)
SMALL = dict(depth=1, width=32, heads=2, patch=4, side=8, channels=1, classes=8, routers="free")


@pytest.fixture(autouse=True)
def registries():
    """Leave the registries as they were."""
    before = [dict(registry) for registry in REGISTRIES]
    yield
    for registry, entries in zip(REGISTRIES, before):
        registry.clear()
        registry.update(entries)


def page_blocks() -> list[str]:
    """Return the code blocks of the page."""
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "extend.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def page(monkeypatch) -> dict:
    """Run the page without its training and drawing; return its names."""
    names = {"__name__": "page"}
    monkeypatch.setattr(dydit_jax, "train", lambda config, workdir: None)
    monkeypatch.setattr(Pipeline, "load", lambda workdir: lambda labels: None)
    for block in page_blocks():
        exec(compile(block, "docs/extend.md", "exec"), names)
    return names


# --- The page ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_step_trains_what_the_page_adds(page):
    config = page["config"]
    config["model"]["depth"], config["loss"]["complete_steps"] = 1, 0
    experiment = read_experiment(config)
    model, optimizer = Model(experiment.model), build_optimizer(experiment.optimizer)
    state = init_state(jax.jit(model.init)(jax.random.key(0)), optimizer)
    state = dataclasses.replace(state, step=jnp.int32(10**6))  # the budget has come down
    source = open_source(experiment.data, experiment.model)
    batch = next(batches(source, experiment.data, start=0))
    rows = np.sort((batch["image"] > 0).sum((1, 2, 3)))
    assert batch["label"].dtype == np.int32 and rows.tolist() == [6] * 8
    after, metrics = jax.jit(build_update(experiment, model, ("gated",)))(state, batch)
    assert int(after.skipped) == 0 and {"loss/gated_min_snr", "loss/gated_vb", "loss/budget"} <= set(metrics)
    for router in (after.params["head_router"], after.params["blocks"]["token_router"]):
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(router))
    moved = jax.tree.map(lambda new, old: bool((new != old).any()), after.params, state.params)
    assert moved["head_router"]["logits"] and moved["group_router"]["logits"]
    assert moved["blocks"]["token_router"]["bias"]


def test_routers_of_the_page_decide_by_time_and_content(page):
    table = page["TableRouter"](layers=1, width=4, units=2, layout="free", rngs=nnx.Rngs(0))
    table.logits[...] = table.logits[...].at[3, 0, 1].set(-1.0)
    gates = table(jnp.asarray([299, 300, 399, 400]), None, None)
    np.testing.assert_array_equal(gates[:, 0], [[1, 1], [1, 0], [1, 0], [1, 1]])
    contrast = page["ContrastRouter"](width=4, dtype=jnp.float32, platform="cpu", rngs=nnx.Rngs(0))
    contrast.bias[...] = jnp.float32(-1.0)
    x = jnp.zeros((1, 4, 4)).at[0, 2].set(4.0)  # the mean is 1: three tokens are 1 off, one is 3 off
    np.testing.assert_allclose(contrast(x), [[0.0, 0.0, 8.0, 0.0]])


def test_loss_term_of_the_page_is_min_snr(page):
    config = page["config"]
    assert config["loss"]["terms"][0] == "min_snr"
    noise = jnp.ones((2, 2, 2, 1))
    inputs = loss_inputs("min_snr", output=jnp.zeros((2, 2, 2, 2)), noise=noise, alphas=[0.5, 0.99])
    np.testing.assert_allclose(weigh_terms(inputs)["min_snr"], [1.0, 5 / 99], rtol=1e-4)


def test_solver_of_the_page_takes_the_mean_of_two_noises(page):
    sampling = SamplingConfig(**page["config"]["sampling"])
    table, ddim = (
        make_table(dataclasses.replace(sampling, sampler=name), Diffusion()) for name in ("two_noises", "ddim")
    )
    assert len(table) == 10 and table.form.history == 2 and table.form.noise == "none" and not table.form.base
    np.testing.assert_allclose(table.weights[1:, 0, 2], table.weights[1:, 0, 3])
    # Where both noises are the same, it is ddim, whose weights of x_0 are these.
    x, x0 = 0.7, -0.3
    noise = table.estimate_from_x0 @ [x, x0]
    moved = table.weights[:, 0, 0] * x + table.weights[:, 0, 2:].sum(1) * noise
    np.testing.assert_allclose(moved, ddim.weights[:, 0, 0] * x + ddim.weights[:, 0, 2] * x0, atol=1e-5)


def test_process_of_the_page_trains_and_samples_by_its_own_time(page):
    sections = dict(page["config"], process=dict(name="circle"), circle=dict(noisiest=0.9))
    sections |= dict(loss=dict(terms=("mse", "budget")), sampling=dict(sampler="heun", steps="4"))
    process = read_experiment(sections).process
    assert process == page["Circle"](noisiest=0.9)
    ones = jnp.ones((3, 1, 1, 1))
    half = np.sqrt(0.5)
    found = perturb(process, ones, -2 * ones, jnp.asarray([0.0, 0.5, 1.0]))[:, 0, 0, 0]
    np.testing.assert_allclose(found, [1, half - 2 * half, -2], atol=1e-6)
    table = make_table(SamplingConfig(sampler="heun", steps="4"), process)
    assert len(table) == 7 and table.timestep[0] == np.float32(0.9) and table.timestep.dtype == np.float32
    assert spread_times(process, 3)[noise_first(process, np.zeros(3))].tolist() == [1.0, 0.5, 0.0]
    with pytest.raises(InputError, match="'ddpm' has no meaning for the process circle: it has no variance"):
        read_experiment(dict(sections, sampling=dict(sampler="ddpm")))
    with pytest.raises(InputError, match="is no process: it needs levels"):
        PROCESSES.register("square")(type("Square", (), dict(vars(page["Circle"]), levels=None)))


@pytest.mark.parametrize("opened", [0, 5])
def test_execution_of_the_page_skips_empty_blocks(page, opened):
    execution = find_execution("skip_empty", "cpu")
    logits = jnp.where(jnp.arange(8).reshape(1, 8) < opened, 1.0, -1.0)
    ones, tokens = jnp.ones((1, 4)), jax.random.normal(jax.random.key(0), (1, 8, 4))
    step = MLPStep(lambda rows: rows + 1, lambda x: logits, ones, ones, ones, jnp.dtype("float32"))
    stream, gates = execution.update(tokens, step)
    expected, _ = find_execution("masked", "cpu").update(tokens, step)
    np.testing.assert_allclose(stream, expected, rtol=1e-6)
    needed = np.asarray(execution.rows_needed(gates[:, None]))
    assert execution.rows_run(needed, images=1, tokens=8).tolist() == [8 if opened else 0]


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    exec(compile("\n".join(page_blocks()), "docs/extend.md", "exec"), names)
    assert names["drawn"].pixels.shape == (3, 8, 8, 1)
    params, config = Pipeline.load("runs/stripes").weights.params, names["config"]["model"]
    pipeline = Pipeline(
        Weights(
            read_experiment(names["config"]).model,
            Diffusion(),
            SamplingConfig(sampler="ddim", steps="10", guidance=1.0),
            params,
            {},
        )
    )
    gated = pipeline([0, 3, 5], mode="gated").samples
    np.testing.assert_allclose(names["drawn"].samples.images, gated.images, atol=1e-4)
    assert config["time_router"] == "table"


# --- What breaks a protocol ----------------------------------------------------------------------


class Plain:
    """Follows no protocol."""


class NoCall(nnx.Module):
    def __init__(self, *, layers, width, units, layout, rngs):
        pass


class OtherArguments(LinearTimeRouter):
    def __call__(self, t):
        return t


class OtherMacs(MLPTokenRouter):
    def macs(self, *, width):
        return width


class NoLength:
    def __init__(self, config, model):
        self.fingerprint = "none"

    def __getitem__(self, index):
        return {}


class OtherRun(TokenExecution):
    name = "other_run"

    def run(self, tokens):
        return tokens


@pytest.mark.parametrize(
    "register, entry, message",
    [
        (register_time_router("own"), Plain, "Plain is no time router: it must be a subclass of Module"),
        (
            register_time_router("own"),
            NoCall,
            r"needs __call__\(self, t, embedding, noise\).*It must return gates \[B,L,un",
        ),
        (register_time_router("own"), OtherArguments, r"not __call__\(self, t\)\. It must return gates \[B,L,units\]"),
        (register_token_router("own"), OtherMacs, "needs macs.*It must return the multiply-adds for one token"),
        (register_token_router("mlp"), OtherMacs, "Token router 'mlp' is built in; give OtherMacs another name"),
        (register_loss_term("own"), lambda x, y: x, r"needs __call__.*not __call__\(x, y\)\. It must return the term"),
        (register_loss_term("own"), 3.0, "3.0 is no loss term.*It must return the term of each image"),
        (
            register_source("own"),
            NoLength,
            r"NoLength is no data source: it needs __len__.*return the number of ex",
        ),
        (register_source("own"), Plain, r"Plain is no data source: it needs __init__\(self, config"),
        (register_execution, OtherRun, r"OtherRun is no execution: it needs run.*It must apply a row-wise function"),
        (register_execution, TokenExecution, "needs a class attribute `name`"),
    ],
)
def test_what_does_not_follow_its_protocol_is_refused_at_once(register, entry, message):
    with pytest.raises(InputError, match=message):
        register(entry)
    assert "own" not in {**TIME_ROUTERS, **TOKEN_ROUTERS, **LOSS_TERMS, **SOURCES}


def apply_shapes(config: DiTConfig):
    """Trace a gated pass."""
    model, shape = Model(config), jax.ShapeDtypeStruct
    images, numbers = shape((2, 8, 8, 1), jnp.float32), shape((2,), jnp.int32)
    run = lambda params, x, t, labels: model.apply(params, x, t, labels, mode="gated")
    return jax.eval_shape(run, model.abstract_params(), images, numbers, numbers)


@pytest.mark.parametrize(
    "gates, came",
    [(jnp.ones((2, 1)), r"float32 \(2, 1\)"), (jnp.ones((2, 1, 2), bool), r"bool \(2, 1, 2\)"), (None, "NoneType")],
)
def test_time_router_that_returns_no_gates_is_told_what_to_return(gates, came):
    class Own(LinearTimeRouter):
        def __call__(self, t, embedding, noise):
            return gates

    register_time_router("own")(Own)
    message = rf"Own.__call__ must return gates \[B,L,units\], float32 \(2, 1, 2\), not {came}\."
    with pytest.raises(InputError, match=message):
        apply_shapes(DiTConfig(**SMALL, time_router="own"))


def test_token_router_that_returns_no_logits_is_told_what_to_return():
    class Own(MLPTokenRouter):
        def __call__(self, x):
            return x

    register_token_router("own")(Own)
    with pytest.raises(
        InputError, match=r"Own.__call__ must return logits \[B,N\], float32 \(2, 4\), not float32 \(2, 4, 32"
    ):
        apply_shapes(DiTConfig(**SMALL, token_router="own"))


def test_router_with_other_state_than_parameters_is_refused():
    class Own(MLPTokenRouter):
        def __init__(self, *, width, dtype, platform, rngs):
            super().__init__(width=width, dtype=dtype, platform=platform, rngs=rngs)
            self.seen = nnx.BatchStat(jnp.zeros(3))

    register_token_router("own")(Own)
    with pytest.raises(InputError, match=r"may hold no state but nnx\.Param; blocks/token_router/seen is a BatchStat"):
        apply_shapes(DiTConfig(**SMALL, token_router="own"))


def test_half_open_gates_are_refused_before_a_run():
    class Own(LinearTimeRouter):
        def __call__(self, t, embedding, noise):
            return jnp.full((len(t), 1, 2), 0.5)

    register_time_router("own")(Own)
    model = Model(DiTConfig(**SMALL, time_router="own"))
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), model.abstract_params())
    run = SamplingRun(model, params, sampling=SamplingConfig(steps="2", guidance=1.0), process=Diffusion())
    with pytest.raises(InputError, match=r"Own.__call__ must return gates that are exactly 0 or 1"):
        run.plan()


@pytest.mark.parametrize("macs", [None, 1.5, -1])
def test_macs_that_are_no_count_are_refused(macs):
    class Own(MLPTokenRouter):
        @staticmethod
        def macs(*, width):
            return macs

    register_token_router("own")(Own)
    with pytest.raises(InputError, match=rf"Own.macs must return its multiply-adds, an int of at least 0, not {macs}"):
        DiTConfig(**SMALL, token_router="own").macs  # noqa: B018


def test_macs_of_routers_of_ones_own_are_counted():
    class OwnToken(MLPTokenRouter):
        @staticmethod
        def macs(*, width):
            return 3 * width

    class OwnTime(LinearTimeRouter):
        @staticmethod
        def macs(*, width, units, layout):
            return {"free": 5, "first_on": 0}[layout] + width + units

    register_token_router("own")(OwnToken)
    register_time_router("own")(OwnTime)
    macs = DiTConfig(**SMALL, token_router="own", time_router="own").macs
    assert (macs.token_router, macs.time_routers) == (4 * 3 * 32, 2 * (5 + 32 + 2))
    assert DiTConfig(**SMALL, time_router="linear,own").macs.time_routers == 32 * 2 + (5 + 32 + 2)


def test_heads_and_groups_have_routers_of_their_own():
    class Shut(LinearTimeRouter):
        def __call__(self, t, embedding, noise):
            return jnp.zeros((len(t), 1, 2))

    register_time_router("shut")(Shut)
    gates = {}
    for names in ("linear,shut", "shut, linear"):
        model = Model(DiTConfig(**SMALL, time_router=names))
        params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), model.abstract_params())
        run = SamplingRun(model, params, sampling=SamplingConfig(steps="2", guidance=1.0), process=Diffusion())
        gates[names] = [units.mean() for units in run.time_gates]
    assert gates == {"linear,shut": [1, 0], "shut, linear": [0, 1]}


def loss_inputs(*terms: str, output, noise, alphas=(0.5, 0.5), weights=()) -> LossInputs:
    """Return the inputs of loss terms that look at little."""

    class Coefficients:
        alpha_cumprod = jnp.asarray(alphas).reshape(-1, 1, 1, 1)

    fields = dict.fromkeys(("x0", "xt", "target", "alpha", "sigma", "routing", "ratio", "step"))
    labels, config = jnp.zeros(len(noise), int), LossConfig(terms=terms, weights=weights)
    return LossInputs(
        "gated", output=output, noise=noise, labels=labels, coefficients=Coefficients, config=config, **fields
    )


@pytest.mark.parametrize(
    "value, came",
    [(jnp.ones((2, 2)), r"float32 \(2, 2\)"), (0.5, "float"), (jnp.ones(2, jnp.int32), r"int32 \(2,\)")],
)
def test_loss_term_that_returns_something_else_is_told_what_to_return(value, came):
    register_loss_term("own")(lambda inputs: value)
    with pytest.raises(
        InputError, match=rf"loss term 'own' must return a number for each image \[B\], a scalar.*not {came}"
    ):
        weigh_terms(loss_inputs("own", output=None, noise=jnp.ones((2, 1))))


def test_terms_have_their_weights_and_none_is_left_out():
    register_loss_term("of_images")(lambda inputs: jnp.asarray([1.0, 2.0]))
    register_loss_term("of_all")(lambda inputs: jnp.float32(3.0))
    register_loss_term("nothing")(lambda inputs: None)
    terms = weigh_terms(
        loss_inputs("of_images", "of_all", "nothing", weights=(2.0, 0.5, 1.0), output=None, noise=jnp.ones((2, 1)))
    )
    assert {name: np.asarray(value).tolist() for name, value in terms.items()} == dict(of_images=[2, 4], of_all=1.5)


IMAGE = np.zeros((8, 8, 1), np.float32)


@pytest.mark.parametrize(
    "attributes, message",
    [
        (dict(fingerprint=None), "Own.__init__ must set `fingerprint`, a text"),
        (dict(count=0), "Own.__len__ must return the number of examples, at least 1, not 0"),
        (dict(example=IMAGE), r'Own.__getitem__ must return \{"image": ..., "label": ...\}, not array'),
        (dict(example=dict(image=IMAGE)), r'Own.__getitem__ must return \{"image": ..., "label": ...\}, not \{\'image'),
        (
            dict(example=dict(image=IMAGE[:4], label=1)),
            r'the "image", float32 \(8, 8, 1\), not float32 \(4, 8, 1\)',
        ),
        (dict(example=dict(image=np.float64(IMAGE), label=1)), r'the "image", float32 \(8, 8, 1\), not float64'),
        (
            dict(example=dict(image=IMAGE, label=[1, 2])),
            r'return one "label", a whole number, not an array \(2,\)',
        ),
        (dict(example=dict(image=IMAGE, label=8)), "Own.__getitem__ has label 8; labels are whole numbers from 0 to 7"),
        (dict(draw=lambda example, generator: None), r'Own.draw must return \{"image": ..., "label": ...\}, not None'),
    ],
)
def test_source_that_returns_something_else_is_told_what_to_return(attributes, message):
    attributes = dict(fingerprint="own", count=4, example=dict(image=IMAGE, label=1)) | attributes

    class Own:
        def __init__(self, config, model):
            for name, value in attributes.items():
                setattr(self, name, value)

        def __len__(self):
            return self.count

        def __getitem__(self, index):
            return self.example

    register_source("own")(Own)
    with pytest.raises(InputError, match=message):
        open_source(DataConfig("own", batch_size=2), DiTConfig(**SMALL))


def test_execution_that_loses_tokens_is_told_what_to_return():
    @register_execution
    class Own(TokenExecution):
        name = "own"

        def run(self, function, tokens, gates, ranks):
            return function(tokens)[:, :2]

    ones, tokens = jnp.ones((1, 4)), jnp.ones((1, 8, 4))
    step = MLPStep(lambda rows: rows, lambda x: x[..., 0], ones, ones, ones, jnp.dtype("float32"))
    with pytest.raises(
        InputError, match=r"Own.run must return the gated result \[B,N,D\], \(1, 8, 4\), not .*\(1, 2, 4\)"
    ):
        find_execution("own", "cpu").update(tokens, step)


def test_unknown_names_say_how_ones_own_become_known():
    with pytest.raises(InputError, match=r"model.token_router 'own'; known: mlp\. A token router of your own is"):
        DiTConfig(**SMALL, token_router="own")


# --- Programs and plans --------------------------------------------------------------------------

ROUTER = """
import jax.numpy as jnp
from flax import nnx
from dydit_jax import register_time_router


@register_time_router("edited")
class Edited(nnx.Module):
    def __init__(self, *, layers, width, units, layout, rngs):
        self.open = nnx.Param(jnp.asarray([1.0, 1.0]))

    def __call__(self, t, embedding, noise):
        return jnp.broadcast_to(self.open[...] * jnp.asarray({open}), (len(t), 1, 2))

    @staticmethod
    def macs(*, width, units, layout):
        return 0
"""


def test_an_edited_router_takes_effect_with_a_warm_cache(tmp_path, program_folder, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("DYDIT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # two edits within a second
    sampling, images = SamplingConfig(sampler="ddim", steps="ddim2", guidance=1.0), {}
    generator = np.random.default_rng(0)
    random = lambda leaf: 0.1 * generator.standard_normal(leaf.shape, np.float32)
    params = jax.tree.map(random, Model(DiTConfig(**SMALL)).abstract_params())
    params |= {router: dict(open=np.ones(2, np.float32)) for router in ("head_router", "group_router")}
    for gates in ([1.0, 1.0], [1.0, 0.0]):
        (tmp_path / "edited_router.py").write_text(ROUTER.replace("{open}", str(gates)))
        importlib.invalidate_caches()
        sys.modules.pop("edited_router", None)
        importlib.import_module("edited_router")
        config = DiTConfig(**SMALL, time_router="edited")
        drawn = Pipeline(Weights(config, Diffusion(), sampling, params, {}))([0, 1, 2, 3])
        np.testing.assert_array_equal(drawn.samples.routing.heads, np.broadcast_to(gates, (2, 1, 2)))
        images[gates[1]] = drawn.samples.images
    assert np.abs(images[1.0] - images[0.0]).max() > 1e-3
    assert not list(program_folder.glob("*.program")) and not list((tmp_path / "cache").rglob("*.npz"))
