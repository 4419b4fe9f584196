"""The same network in PyTorch, run straight from a source's tensors: the other side of `--verify`.

Written from the description of the model, on the source's names and axes, so that a mistake in the tables or in our
layers shows as a difference. Slow and plain on purpose; needs the extra `torch`.
"""

import math
from collections.abc import Mapping

import numpy as np

from dydit_jax.errors import InputError
from dydit_jax.models.dit import DiTConfig


def run_torch(source: Mapping[str, np.ndarray], config: DiTConfig, x, t, labels, *, mode: str) -> np.ndarray:
    """Run the network on the CPU in float32.

    Args:
      source: PyTorch tensors by name, as arrays.
      config: the model that they make.
      x: [B,side,side,C].
      t, labels: [B].
      mode: "complete" or "gated".

    Returns:
      [B,side,side,2C].

    Raises:
      InputError: PyTorch is not installed.
    """
    try:
        import torch
        from torch.nn import functional
    except ImportError as error:
        raise InputError("Running the other network needs PyTorch: pip install 'dydit-jax[torch]'.") from error

    def tensor(name):
        return torch.from_numpy(np.array(source[name], np.float32))

    def linear(x, name):
        return functional.linear(x, tensor(f"{name}.weight"), tensor(f"{name}.bias"))

    def norm(x):
        return functional.layer_norm(x, x.shape[-1:], eps=1e-6)

    def modulate(x, shift, scale):
        return x * (1 + scale[:, None]) + shift[:, None]

    def open_units(name, time):
        """Gates [B,H] of a router; the layout shows in the number of outputs."""
        gates = (linear(time, name) > 0).float()
        always = torch.ones(len(gates), config.heads - gates.shape[1])
        return torch.cat([always, gates], dim=1)

    def attend(x, name, gates):
        batch, tokens, width = x.shape
        query, key, value = linear(x, f"{name}.qkv").view(batch, tokens, 3, config.heads, -1).permute(2, 0, 3, 1, 4)
        heads = functional.scaled_dot_product_attention(query, key, value)
        if gates is not None:
            heads = heads * gates[:, :, None, None]
        return linear(heads.transpose(1, 2).reshape(batch, tokens, width), f"{name}.proj")

    def transform(x, name, gates):
        hidden = linear(x, f"{name}.fc1")
        if gates is not None:
            hidden = hidden * gates.repeat_interleave(config.hidden // config.heads, dim=1)[:, None]
        return linear(functional.gelu(hidden, approximate="tanh"), f"{name}.fc2")

    def run_block(x, name, condition, time):
        vectors = linear(functional.silu(condition), f"{name}.adaLN_modulation.1").chunk(6, dim=1)
        gated = mode == "gated" and config.routers != "none"
        heads = open_units(f"{name}.attn_rate.router", time) if gated else None
        groups = open_units(f"{name}.mlp_rate.router", time) if gated else None
        x = x + vectors[2][:, None] * attend(modulate(norm(x), *vectors[:2]), f"{name}.attn", heads)
        update = vectors[5][:, None] * transform(modulate(norm(x), *vectors[3:5]), f"{name}.mlp", groups)
        if gated:
            router = f"{name}.token_selection.mlp_head"
            update = update * (linear(functional.relu(linear(x, f"{router}.0")), f"{router}.2") > 0)
        return x + update

    with torch.no_grad():
        image = torch.from_numpy(np.array(x, np.float32)).permute(0, 3, 1, 2)
        kernel, bias = tensor("x_embedder.proj.weight"), tensor("x_embedder.proj.bias")
        tokens = functional.conv2d(image, kernel, bias, stride=config.patch).flatten(2).transpose(1, 2)
        tokens = tokens + (tensor("pos_embed") if "pos_embed" in source else _positions(torch, config))
        frequency = torch.exp(-math.log(10_000) * torch.arange(128) / 128)
        angle = torch.tensor(np.array(t), dtype=torch.float32)[:, None] * frequency
        features = torch.cat([angle.cos(), angle.sin()], dim=1)
        time = linear(functional.silu(linear(features, "t_embedder.mlp.0")), "t_embedder.mlp.2")
        condition = time + tensor("y_embedder.embedding_table.weight")[torch.tensor(np.array(labels)).long()]
        for layer in range(config.depth):
            tokens = run_block(tokens, f"blocks.{layer}", condition, time)
        shift, scale = linear(functional.silu(condition), "final_layer.adaLN_modulation.1").chunk(2, dim=1)
        patches = linear(modulate(norm(tokens), shift, scale), "final_layer.linear")
    grid, patch = config.side // config.patch, config.patch
    patches = patches.view(-1, grid, grid, patch, patch, 2 * config.channels).permute(0, 1, 3, 2, 4, 5)
    return patches.reshape(-1, config.side, config.side, 2 * config.channels).numpy()


def _positions(torch, config: DiTConfig):
    from dydit_jax.models.layers import position_table

    return torch.from_numpy(position_table(config.side // config.patch, config.width))
