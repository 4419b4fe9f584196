"""Multiply-adds (MACs) of a model and of a routing, from dimensions alone.

Counted: every product of the patch embedding, of the two timestep layers, of the modulations, of queries, keys,
values, scores, weighted values and output projection, of the MLP, of the output layer and of the routers.
Not counted: additions, norms, softmax, GELU, look-ups. The "FLOPs" that papers of this field publish are MACs
in this sense; a machine's FLOP count is twice as large.

The *ratio* that training controls looks at attention and MLP alone, as in equation 8 of
https://arxiv.org/abs/2410.03456: sum over blocks of (head fraction * attention + group fraction * token
fraction * MLP) over sum over blocks of (attention + MLP).
"""

import dataclasses

from dydit_jax.errors import InputError
from dydit_jax.models.layers import TIME_FREQUENCIES
from dydit_jax.models.routing import TIME_ROUTERS, TOKEN_ROUTERS, Routing, time_router_names

PREFIXES = ("", "k", "M", "G", "T", "P", "E")


@dataclasses.dataclass(frozen=True)
class ModelMacs:
    """MACs of one image's forward pass.

    Attributes:
      attention: one block's attention with all heads open; proportional to the number of heads.
      mlp: one block's MLP with all groups and tokens open; proportional to both.
      token_router: one block's token router, 0 without routers.
      time_routers: one block's head and group routers, 0 without routers.
      fixed: everything else, of the whole model.
      layers: number of blocks.
    """

    attention: int
    mlp: int
    token_router: int
    time_routers: int
    fixed: int
    layers: int

    @property
    def complete(self) -> int:
        """The whole model with every gate open and no router: the static DiT."""
        return self.fixed + self.layers * (self.attention + self.mlp)

    @property
    def routers(self) -> int:
        """All routers of the model."""
        return self.layers * (self.token_router + self.time_routers)


def model_macs(config) -> ModelMacs:
    """Count the MACs of a model.

    Args:
      config: a record with width, depth, heads, patch, channels, tokens, hidden, outputs and routers, such
        as `DiTConfig`, and the names of its routers.

    Returns:
      The counts for one image and one forward pass.

    Raises:
      InputError: a user's router whose `macs` returns no count.
    """
    width, tokens = config.width, config.tokens
    patch_values = config.patch**2
    embeddings = tokens * patch_values * config.channels * width + (2 * TIME_FREQUENCIES + width) * width
    if config.guidance_free:
        embeddings += (2 * TIME_FREQUENCIES) ** 2
    modulations = config.depth * 6 * width**2 + 2 * width**2
    output = tokens * width * patch_values * 2 * config.channels
    of_token, of_timestep = 0, 0
    if config.routers != "none":
        of_token = _router_macs(TOKEN_ROUTERS[config.token_router], width=width)
        sizes = dict(width=width, units=config.heads, layout=config.routers)
        names = time_router_names(config.time_router)
        of_timestep = sum(_router_macs(TIME_ROUTERS[name], **sizes) for name in names)
    return ModelMacs(
        attention=4 * tokens * width**2 + 2 * tokens**2 * width,
        mlp=2 * tokens * width * config.hidden,
        token_router=tokens * of_token,
        time_routers=of_timestep,
        fixed=embeddings + modulations + output,
        layers=config.depth,
    )


def _router_macs(cls, **sizes) -> int:
    """Return the MACs of a router.

    Raises:
      InputError: its `macs` returns something else.
    """
    macs = cls.macs(**sizes)
    if type(macs) is not int or macs < 0:
        raise InputError(f"{cls.__name__}.macs must return its multiply-adds, an int of at least 0, not {macs!r}.")
    return macs


def routed_ratio(routing: Routing, *, attention: float, mlp: float):
    """Return the share of attention and MLP work that a routing leaves open, per image.

    Args:
      routing: gates; gradients flow through them.
      attention, mlp: work of one block's attention and MLP, in any common unit.

    Returns:
      [B], between 0 and 1.
    """
    share = attention / (attention + mlp)  # the counts themselves do not fit JAX's 32-bit integers
    heads = routing.heads.mean(-1)  # [B,L]
    mlps = routing.groups.mean(-1) * routing.tokens.mean(-1)
    return (share * heads + (1 - share) * mlps).mean(-1)


def routed_macs(routing: Routing, macs: ModelMacs):
    """Return the MACs per image [B] that a routing needs, routers and fixed parts included."""
    ratio = routed_ratio(routing, attention=macs.attention, mlp=macs.mlp)
    return float(macs.fixed + macs.routers) + float(macs.layers * (macs.attention + macs.mlp)) * ratio


def format_count(count: float) -> str:
    """Return a count with the prefix that fits it and one decimal: "7.6 M", "118.6 G"."""
    power = min(max(len(str(int(count))) - 1, 0) // 3, len(PREFIXES) - 1)
    if round(count / 1000**power, 1) >= 1000 and power < len(PREFIXES) - 1:  # 999.96 k is 1.0 M
        power += 1
    return f"{count / 1000**power:.1f} {PREFIXES[power]}".strip()
