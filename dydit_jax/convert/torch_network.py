"""The same network in PyTorch, run straight from a source's tensors: the other side of `--verify`.

Written from the description of the model, on the source's names and axes, so that a mistake in the tables or in our
layers shows as a difference. Slow and plain on purpose; needs the extra `torch`.
"""

import math
from collections.abc import Mapping

import numpy as np

from dydit_jax.convert.tables import POSITION_NAME
from dydit_jax.errors import InputError
from dydit_jax.models.layers import position_table


def run_torch(source: Mapping[str, np.ndarray], heads: int, x, t, labels, *, mode: str) -> np.ndarray:
    """Run the network on the CPU in float32.

    Args:
      source: PyTorch tensors by name, as arrays; their names and shapes say what the network is.
      heads: H, the one thing that they do not say.
      x: [B,side,side,C].
      t, labels: [B]; a label is a row of the label table.
      mode: "complete" or "gated".

    Returns:
      [B,side,side,2C], or C channels where the source has no more.

    Raises:
      InputError: PyTorch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise InputError("Running the other network needs PyTorch: pip install 'dydit-jax[torch]'.") from error
    with torch.no_grad():
        return _TorchNetwork(torch, source, heads, mode).run(x, t, labels)


class _TorchNetwork:
    """The forward pass on tensors by name, channels first, with `torch` handed in: it may not be installed."""

    def __init__(self, torch, source: Mapping[str, np.ndarray], heads: int, mode: str):
        self.torch, self.functional = torch, torch.nn.functional
        self.source, self.heads = source, heads
        self.width, _, self.patch, _ = source["x_embedder.proj.weight"].shape
        self.outputs = len(source["final_layer.linear.bias"]) // self.patch**2
        self.gated = mode == "gated" and "blocks.0.attn_rate.router.weight" in source

    def run(self, x, t, labels) -> np.ndarray:
        torch, side, grid, patch = self.torch, x.shape[1], x.shape[1] // self.patch, self.patch
        image = torch.from_numpy(np.array(x, np.float32)).permute(0, 3, 1, 2)
        kernel, bias = self.tensor("x_embedder.proj.weight"), self.tensor("x_embedder.proj.bias")
        tokens = self.functional.conv2d(image, kernel, bias, stride=patch).flatten(2).transpose(1, 2)
        tokens = tokens + self.positions(grid)
        time = self.embed_time(torch.tensor(np.array(t), dtype=torch.float32))
        condition = time + self.tensor("y_embedder.embedding_table.weight")[torch.tensor(np.array(labels)).long()]
        layer = 0
        while f"blocks.{layer}.attn.qkv.weight" in self.source:
            tokens = self.block(tokens, f"blocks.{layer}", condition, time)
            layer += 1
        shift, scale = self.modulation(condition, "final_layer.adaLN_modulation.1", 2)
        patches = self.linear(self.normalised(tokens, shift, scale), "final_layer.linear")
        patches = patches.view(-1, grid, grid, patch, patch, self.outputs).permute(0, 1, 3, 2, 4, 5)
        return patches.reshape(-1, side, side, self.outputs).numpy()

    def block(self, x, name, condition, time):
        vectors = self.modulation(condition, f"{name}.adaLN_modulation.1", 6)
        heads = self.open_units(f"{name}.attn_rate.router", time) if self.gated else None
        groups = self.open_units(f"{name}.mlp_rate.router", time) if self.gated else None
        x = x + vectors[2][:, None] * self.attention(self.normalised(x, *vectors[:2]), f"{name}.attn", heads)
        update = vectors[5][:, None] * self.mlp(self.normalised(x, *vectors[3:5]), f"{name}.mlp", groups)
        if self.gated:
            router = f"{name}.token_selection.mlp_head"
            hidden = self.functional.relu(self.linear(x, f"{router}.0"))
            update = update * (self.linear(hidden, f"{router}.2") > 0)
        return x + update

    def attention(self, x, name, gates):
        batch, tokens, width = x.shape
        qkv = self.linear(x, f"{name}.qkv").view(batch, tokens, 3, self.heads, -1)
        heads = self.functional.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        if gates is not None:
            heads = heads * gates[:, :, None, None]
        return self.linear(heads.transpose(1, 2).reshape(batch, tokens, width), f"{name}.proj")

    def mlp(self, x, name, gates):
        hidden = self.linear(x, f"{name}.fc1")
        if gates is not None:
            hidden = hidden * gates.repeat_interleave(hidden.shape[-1] // self.heads, dim=1)[:, None]
        return self.linear(self.functional.gelu(hidden, approximate="tanh"), f"{name}.fc2")

    def open_units(self, name, time):
        """Gates [B,H] of a router; the layout shows in the number of outputs."""
        gates = (self.linear(time, name) > 0).float()
        always = self.torch.ones(len(gates), self.heads - gates.shape[1])
        return self.torch.cat([always, gates], dim=1)

    def embed_time(self, t):
        angle = t[:, None] * self.torch.exp(-math.log(10_000) * self.torch.arange(128) / 128)
        features = self.torch.cat([angle.cos(), angle.sin()], dim=1)
        hidden = self.functional.silu(self.linear(features, "t_embedder.mlp.0"))
        return self.linear(hidden, "t_embedder.mlp.2")

    def positions(self, grid):
        if POSITION_NAME in self.source:
            return self.tensor(POSITION_NAME)
        return self.torch.from_numpy(position_table(grid, self.width))

    def modulation(self, condition, name, parts):
        return self.linear(self.functional.silu(condition), name).chunk(parts, dim=1)

    def normalised(self, x, shift, scale):
        x = self.functional.layer_norm(x, x.shape[-1:], eps=1e-6)
        return x * (1 + scale[:, None]) + shift[:, None]

    def linear(self, x, name):
        return self.functional.linear(x, self.tensor(f"{name}.weight"), self.tensor(f"{name}.bias"))

    def tensor(self, name):
        return self.torch.from_numpy(np.array(self.source[name], np.float32))
