"""The weights of a segment hold what it keeps, and share what they can."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dydit_jax.fast import narrow as narrowing
from dydit_jax.fast.narrow import DeferredBlocks, NarrowedBlocks, cast_for_products, narrow
from dydit_jax.runtime.sharding import MeshConfig, make_mesh, replicated


def test_narrowed_weights_have_what_is_kept(tiny):
    _, params = tiny
    kept_heads, kept_groups = ((0, 2), ()), ((1,), (0, 1, 2, 3))
    layers = narrow(params["blocks"], heads=kept_heads, groups=kept_groups, dtype=jnp.dtype("float32"))
    attention, mlp = (jax.tree.map(np.asarray, params["blocks"][name]) for name in ("attention", "mlp"))
    for layer, narrowed in enumerate(layers):
        heads, groups = list(kept_heads[layer]), list(kept_groups[layer])
        wanted = dict(
            attention=dict(
                qkv=tuple(attention["qkv"][layer][:, :, heads]),
                qkv_bias=tuple(attention["qkv_bias"][layer][:, heads]),
                out=attention["out"][layer][heads],
                out_bias=attention["out_bias"][layer],
            ),
            mlp=dict(
                up=mlp["up"][layer][:, groups],
                up_bias=mlp["up_bias"][layer][groups],
                down=mlp["down"][layer][groups],
                down_bias=mlp["down_bias"][layer],
            ),
        )
        chex.assert_trees_all_equal({name: narrowed[name] for name in wanted}, wanted)


def test_only_what_products_read_is_in_their_dtype(tiny):
    _, params = tiny
    half, single = jnp.dtype("bfloat16"), jnp.dtype("float32")
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, cast_for_products(params["blocks"], half))
    assert dtypes["modulation"] == dict(kernel=half, bias=single)
    assert {*dtypes["attention"].values(), *dtypes["mlp"].values()} == {half}
    assert set(dtypes["token_router"].values()) == {single}
    unchanged = cast_for_products(params["blocks"], single)
    assert all(new is old for new, old in zip(jax.tree.leaves(unchanged), jax.tree.leaves(params["blocks"])))


def test_the_next_segment_takes_over_what_it_shares_with_the_last(tiny):
    model, params = tiny
    narrowed = NarrowedBlocks(params["blocks"], dtype=jnp.dtype("float32"), platform="cpu")
    every, fewer = tuple(range(model.config.heads)), tuple(range(1, model.config.heads))
    depth = model.config.depth
    before = narrowed.narrow_to((every,) * depth, (every,) * depth)
    kept = [dict(layer) for layer in before]
    wanted = dict(heads=(fewer,) + (every,) * (depth - 1), groups=(every,) * (depth - 1) + (fewer,))
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), narrowed.shapes(**wanted))
    layers = narrowed.narrow_to(**wanted)
    assert layers[0]["attention"] is not before[0]["attention"]
    assert layers[0]["mlp"] is before[0]["mlp"]
    assert layers[-1]["attention"] is before[-1]["attention"]
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), layers) == shapes
    assert all(layer[name] is own[name] for layer, own in zip(before, kept) for name in own)  # not changed by the next
    chex.assert_trees_all_equal(layers, narrow(params["blocks"], dtype=jnp.dtype("float32"), **wanted))


def test_on_an_accelerator_the_program_narrows(tiny):
    model, params = tiny
    depth, units = model.config.depth, model.config.heads
    wanted = dict(heads=((0, 2), *[()] * (depth - 1)), groups=(*[(1,)] * (depth - 1), tuple(range(units))))
    given = NarrowedBlocks(params["blocks"], dtype=jnp.dtype("float32"), platform="gpu")
    chex.assert_trees_all_equal_shapes_and_dtypes(given.shapes(**wanted), given.narrow_to(**wanted))
    layers = jax.jit(DeferredBlocks.narrowed)(given.narrow_to(**wanted))
    chex.assert_trees_all_equal(layers, narrow(params["blocks"], dtype=jnp.dtype("float32"), **wanted))
    # Where nothing is left out, the blocks are cut apart once for all segments.
    everything = dict.fromkeys(("heads", "groups"), (tuple(range(units)),) * depth)
    cut = given.narrow_to(**everything)
    chex.assert_trees_all_equal(cut, narrow(params["blocks"], dtype=jnp.dtype("float32"), **everything))
    chex.assert_trees_all_equal_shapes_and_dtypes(given.shapes(**everything), cut)
    assert given.narrow_to(**everything)[0]["mlp"] is cut[0]["mlp"]


def test_blocks_are_narrowed_without_arrays(tiny):
    """As the benchmarks do that only compile."""
    model, params = tiny
    wanted = dict(heads=((0, 2), ()), groups=((1,), (0, 1, 2, 3)))
    shapes = jax.eval_shape(lambda blocks: narrow(blocks, **wanted, dtype=jnp.dtype("float32")), params["blocks"])
    chex.assert_trees_all_equal_shapes_and_dtypes(
        shapes, narrow(params["blocks"], **wanted, dtype=jnp.dtype("float32"))
    )


@pytest.mark.parametrize("on_mesh", [False, True])
def test_blocks_in_a_cpus_memory_are_cut_without_compiling(tiny, monkeypatch, on_mesh):
    """The program of an accelerator, which cuts them as well, is the other way to the same numbers."""
    model, params = tiny
    depth, units = model.config.depth, model.config.heads
    wanted = dict(heads=((0, 2), *[()] * (depth - 1)), groups=(*[(1,)] * (depth - 1), tuple(range(units))))
    place = replicated(make_mesh(MeshConfig())) if on_mesh else None
    blocks = params["blocks"] if place is None else jax.device_put(params["blocks"], place)
    settings = dict(dtype=jnp.dtype("bfloat16"))
    deferred = NarrowedBlocks(blocks, **settings, platform="gpu").narrow_to(**wanted)
    compiled = jax.jit(DeferredBlocks.narrowed)(deferred)
    given = NarrowedBlocks(blocks, **settings, platform="cpu")
    for name in ("_take_units", "_take_layer"):
        monkeypatch.delattr(narrowing, name)
    cut = given.narrow_to(**wanted)
    chex.assert_trees_all_equal(cut, compiled)
    placed = lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding if leaf.committed else None)
    assert jax.tree.map(placed, cut) == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, place), cut)
