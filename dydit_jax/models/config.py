"""What fixes a model: its sizes, its routers, its published names.

Sources: DiT, https://arxiv.org/abs/2212.09748; DyDiT, https://arxiv.org/abs/2410.03456.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

from dydit_jax.errors import InputError, require_known
from dydit_jax.models import cost
from dydit_jax.models.routing import LAYOUTS, TIME_ROUTERS, TOKEN_ROUTERS, time_router_names
from dydit_jax.records import read_record, require_range

# The published sizes: depth, width, heads.
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
PATCHES = (2, 4, 8)
# Far beyond any model, and small enough to be described.
MOST = dict(
    depth=1024, width=65_536, heads=1024, patch=4096, side=4096, channels=4096, classes=10_000_000, mlp_ratio=64
)
POSITIONS = ("sine_cosine", "stored")


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Everything that fixes the parameter tree, its meaning and its initial values.

    Attributes:
      depth: number of blocks, L.
      width: channels of a token, D.
      heads: attention heads, H; the MLP has one group of channels for each.
      patch: side of a patch, P, in pixels of the input.
      side: side of the square input, in pixels (image side / 8 for latents).
      channels: channels of the input, C; the output has 2C, noise first, then variance.
      classes: number of labels; one more row stands for "no class". 0: an unconditional model, which has only that row
        and is trained without the data's labels. For training, -1 takes the number that the data have.
      mlp_ratio: hidden channels of the MLP per channel of the width.
      routers: "none", "free" or "first_on", see `routing`.
      positions: "sine_cosine", the fixed table that DiT is trained with, or "stored": a table of the checkpoint's own,
        which training leaves alone.
      token_capacity: share of an image's tokens that pass the MLP at most, one number for all blocks or one per block;
        empty leaves the choice to the routers alone. See `execution`.
      time_router: key of `TIME_ROUTERS`, or two with a comma between them, for heads and for groups; published models
        have "linear".
      token_router: key of `TOKEN_ROUTERS`; published models have "mlp".
      guidance_free: whether the network is conditioned on beta = 1 / scale of the guidance, and makes the guided
        prediction in one pass; see `loss.guidance_free`.
      label_init_std, time_init_std: standard deviation of the initial label table and timestep layers.
    """

    RENAMED: ClassVar = {"label_deviation": "label_init_std", "time_deviation": "time_init_std"}

    depth: int
    width: int
    heads: int
    patch: int
    side: int
    channels: int = 4
    classes: int = 1000
    mlp_ratio: int = 4
    routers: str = "none"
    positions: str = "sine_cosine"
    token_capacity: tuple[float, ...] = ()
    time_router: str = "linear"
    token_router: str = "mlp"
    guidance_free: bool = False
    label_init_std: float = 0.02
    time_init_std: float = 0.02

    def __post_init__(self):
        for name, most in MOST.items():
            require_range(f"model.{name}", getattr(self, name), low=0 if name == "classes" else 1, high=most)
        for name in ("label_init_std", "time_init_std"):
            require_range(f"model.{name}", getattr(self, name), low=0.0)
        require_known("model.routers", self.routers, LAYOUTS)
        require_known("model.positions", self.positions, POSITIONS)
        for name in time_router_names(self.time_router):
            TIME_ROUTERS.require("model.time_router", name)
        TOKEN_ROUTERS.require("model.token_router", self.token_router)
        if len(self.token_capacity) not in (0, 1, self.depth):
            raise InputError(
                f"model.token_capacity must have no number, one, or one for each of the {self.depth} blocks, not "
                f"{len(self.token_capacity)}."
            )
        if self.token_capacity and self.routers == "none":
            raise InputError("model.token_capacity needs routers that choose the tokens; model.routers is 'none'.")
        for share in self.token_capacity:
            if not 0 < share <= 1:
                raise InputError(f"model.token_capacity must be above 0 and at most 1, not {share!r}.")
        if self.width % self.heads:
            raise InputError(f"model.heads must divide model.width: {self.width} / {self.heads} leaves a rest.")
        if self.width % 4:
            raise InputError(f"model.width must be divisible by 4 for the position table, not {self.width}.")
        if self.side % self.patch:
            raise InputError(f"model.patch must divide model.side: {self.side} / {self.patch} leaves a rest.")
        if self.routers != "none" and self.width < 16:
            raise InputError(f"model.width must be at least 16 with routers, not {self.width}.")
        if self.routers == "first_on" and self.heads < 2:
            raise InputError("model.routers 'first_on' needs at least 2 heads; with one there is nothing to switch.")
        if self.hidden % self.heads:
            raise InputError(f"model.heads must divide the MLP's {self.hidden} channels, not {self.heads}.")

    @property
    def tokens(self) -> int:
        """N, the number of tokens of one image."""
        return (self.side // self.patch) ** 2

    @property
    def capacities(self) -> tuple[int, ...]:
        """How many tokens of an image may pass each block's MLP; N where there is no limit."""
        shares = self.token_capacity or (1.0,)
        shares = shares * self.depth if len(shares) == 1 else shares
        return tuple(max(1, math.ceil(round(share * self.tokens, 6))) for share in shares)

    @property
    def hidden(self) -> int:
        """Hidden channels of the MLP, G * F."""
        return self.width * self.mlp_ratio

    @property
    def null_label(self) -> int:
        """The label that stands for "no class"."""
        return self.classes

    @property
    def macs(self) -> cost.ModelMacs:
        """MACs of one image's forward pass."""
        return cost.model_macs(self)


def published_config(name: str, **fields) -> DiTConfig:
    """Make the configuration of a published size.

    Args:
      name: size and patch, e.g. "XL/2": S, B, L or XL by 2, 4 or 8.
      **fields: the other fields of `DiTConfig`, e.g. side=32 for 256 px and side=64 for 512 px.

    Raises:
      InputError: an unknown name, with the known ones.
    """
    require_known("model size", name, [f"{size}/{patch}" for size in SIZES for patch in PATCHES])
    size, patch = name.split("/")
    depth, width, heads = SIZES[size]
    return DiTConfig(depth=depth, width=width, heads=heads, patch=int(patch), **fields)


def read_model(section: Mapping) -> DiTConfig:
    """Read the section `model`: either `size` ("XL/2") or depth, width, heads and patch."""
    section = {key: value for key, value in section.items() if value is not None}
    if "size" not in section:
        return read_record(DiTConfig, section, "model")
    size = section.pop("size")
    known = published_config(size, side=64)
    fixed = {"depth", "width", "heads", "patch"} & set(section)
    if fixed:
        raise InputError(f"model.size {size!r} fixes {', '.join(sorted(fixed))}; give the one or the others.")
    return read_record(DiTConfig, dict(dataclasses.asdict(known), **section), "model")
