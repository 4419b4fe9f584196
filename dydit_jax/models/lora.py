"""Low-rank updates (LoRA) of the kernels of attention and MLP, constant or a function of the timestep.

A kernel W of a block becomes

    W + (alpha / R) B A                          one expert: constant
    W + (alpha / R) sum_i w_i(t) B_i A           several: w(t) = softmax of a Linear of the timestep's embedding

with R ranks. B is zero at the start, so that the network first is what it was. In training the product with A and B
runs beside that with W: W is neither copied nor differentiated. For sampling A and B are folded into W. A constant
update is folded once. One of the timestep is folded at every step, into weights that are narrowed already: A and B have
the axes of heads and groups that W has.

    qkv    W [3,D,H,K]    A [D,R]      B [E,R,3,H,K]
    out    W [H,K,D]      A [H,K,R]    B [E,R,D]
    up     W [D,G,F]      A [D,R]      B [E,R,G,F]
    down   W [G,F,D]      A [G,F,R]    B [E,R,D]

Sources: LoRA, https://arxiv.org/abs/2106.09685. DyDiT++, https://arxiv.org/abs/2504.06803, has updates that depend on
the timestep, too, and publishes neither their code nor their sizes: this design is our own.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from dydit_jax.errors import InputError
from dydit_jax.records import require_range

# Which part of a block each target lies in. Queries, keys and values are one Linear in DiT, so they share one A.
TARGETS = {"qkv": "attention", "out": "attention", "up": "mlp", "down": "mlp"}
MIXTURE = "lora_mixture"
MOST_RANK, MOST_EXPERTS = 65_536, 1024  # files of strangers may ask for any
MOST_SUMMED = 16  # of ranks that are added to a kernel one by one


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Low-rank updates, trained where `train.trainable` has "lora".

    Attributes:
      rank: R, of each update.
      alpha: updates are scaled by alpha / rank.
      targets: kernels that are updated in every block: qkv, out (of attention), up, down (of the MLP).
      experts: E; with more than one the update depends on the timestep.
    """

    rank: int = 16
    alpha: float = 16.0
    targets: tuple[str, ...] = tuple(TARGETS)
    experts: int = 1

    def __post_init__(self):
        require_range("lora.rank", self.rank, 1, MOST_RANK)
        require_range("lora.alpha", self.alpha, 1e-6, 1e6)
        require_range("lora.experts", self.experts, 1, MOST_EXPERTS)
        wrong = [target for target in self.targets if target not in TARGETS]
        if wrong or not self.targets or len(set(self.targets)) < len(self.targets):
            came = ", ".join(wrong or self.targets) or "none"
            raise InputError(f"lora.targets must be some of {', '.join(TARGETS)}, each once; these are not: {came}.")

    @property
    def scale(self) -> float:
        """What updates are multiplied by."""
        return self.alpha / self.rank


def names_of(target: str) -> tuple[str, str]:
    """Return the names of a target's A and B, which lie beside its kernel."""
    return f"{target}_lora_a", f"{target}_lora_b"


def is_low_rank(path: str) -> bool:
    """Return whether a parameter, by its path, belongs to the updates."""
    return "_lora_" in path or f"{MIXTURE}/" in path


# --- In training: beside the kernels --------------------------------------------------------------


def add_updates(module: nnx.Module, lora: LoRAConfig | None, shapes: dict, rngs: nnx.Rngs) -> None:
    """Give a module the updates of its kernels.

    Args:
      module: attention or MLP.
      lora: None adds nothing.
      shapes: of the kernels by name: what their product sums over, and what it returns.
      rngs: for initial values.
    """
    module.lora = lora
    for target, (inputs, outputs) in shapes.items():
        if lora is not None and target in lora.targets:
            bound = 1 / math.sqrt(math.prod(inputs))
            a = jax.random.uniform(rngs.params(), (*inputs, lora.rank), jnp.float32, -bound, bound)
            for name, value in zip(names_of(target), (a, jnp.zeros((lora.experts, lora.rank, *outputs)))):
                setattr(module, name, nnx.Param(value))


def has_update(module: nnx.Module, target: str) -> bool:
    """Return whether a module's kernel is updated."""
    return module.lora is not None and target in module.lora.targets


def reducing_kernel(module: nnx.Module, target: str):
    """Return the A of a target in the dtype of the products."""
    return getattr(module, names_of(target)[0])[...].astype(module.dtype)


def expand(module: nnx.Module, target: str, reduced, mixture):
    """Return what an update adds to the product.

    Args:
      module: with the update.
      target: of `TARGETS`.
      reduced: the product with A [B,N,R].
      mixture: of the experts [B,E]; None for one.

    Returns:
      [B,N,...], the last axes those of the product with the kernel.
    """
    b = getattr(module, names_of(target)[1])[...].astype(module.dtype)
    experts, rank, *outputs = b.shape
    if mixture is not None:
        mixed = reduced[:, :, None] * mixture[:, None, :, None].astype(module.dtype)
        reduced = mixed.reshape(*reduced.shape[:2], experts * rank)  # [B,N,E*R]
    expanded = (module.lora.scale * reduced) @ b.reshape(experts * rank, -1)
    return expanded.reshape(*reduced.shape[:2], *outputs)


class Mixture(nnx.Module):
    """The weights of a block's experts: softmax of a Linear of the timestep's embedding, in float32."""

    def __init__(self, *, width: int, experts: int, rngs: nnx.Rngs):
        # Not zero: experts of equal weights at every timestep would have equal gradients, and stay equal.
        bound = math.sqrt(3 / width)
        kernel = jax.random.uniform(rngs.params(), (width, experts), jnp.float32, -bound, bound)
        self.kernel, self.bias = nnx.Param(kernel), nnx.Param(jnp.zeros(experts))

    def __call__(self, embedding):
        """Return the weights [B,E] for the embedding of timesteps [B,D]."""
        return mixture_weights(dict(kernel=self.kernel[...], bias=self.bias[...]), embedding)


def mixture_weights(params: dict, embedding):
    """Return the experts' weights [B,E] from the parameters of a `Mixture` and the embedding [B,D]."""
    return jax.nn.softmax(jnp.dot(embedding, params["kernel"], precision="highest") + params["bias"])


# --- For sampling: folded into the kernels --------------------------------------------------------


def without_updates(blocks: dict) -> dict:
    """Return the parameters of blocks without their low-rank updates."""
    kept = lambda part: {name: leaf for name, leaf in part.items() if not is_low_rank(name)}
    parts = {name: part for name, part in blocks.items() if name != MIXTURE}
    return {name: kept(part) if name in TARGETS.values() else part for name, part in parts.items()}


def fold_constant(params: dict, lora: LoRAConfig) -> dict:
    """Return the parameter tree with updates of one expert folded into the kernels.

    Args:
      params: with updates.
      lora: of one expert.
    """
    fold = lambda block: fold_block(block, jnp.ones(1), lora)
    return params | dict(blocks=jax.vmap(fold)(params["blocks"]))


def fold_block(block: dict, mixture, lora: LoRAConfig) -> dict:
    """Return the parameters of one block with the updates folded into its kernels, in float32.

    Args:
      block: whole, or narrowed to some heads and groups.
      mixture: weights of the experts [E].
      lora: of the updates.
    """
    folded = {name: part for name, part in block.items() if name != MIXTURE}
    for target in lora.targets:
        part, names = dict(folded[TARGETS[target]]), names_of(target)
        a, b = (part.pop(name).astype(jnp.float32) for name in names)
        mixed = lora.scale * jnp.tensordot(mixture, b, 1)  # [R,...]
        if target != "qkv":
            part[target] = _add_product(part[target], a, mixed)
        else:  # three arrays where they are narrowed, see `fast.narrow`
            parts = tuple(_add_product(kernel, a, mixed[:, i]) for i, kernel in enumerate(part[target]))
            part[target] = parts if isinstance(part[target], tuple) else jnp.stack(parts)
        folded[TARGETS[target]] = part
    return folded


def _add_product(kernel, a, b):
    """Return kernel + a b in the kernel's dtype; a [...,R], b [R,...], float32."""
    rank = len(b)
    if rank > MOST_SUMMED:
        return (kernel.astype(jnp.float32) + jnp.tensordot(a, b, 1, precision="highest")).astype(kernel.dtype)
    # One pass over the kernel. A product of matrices first writes a b, as large as the kernel, and then reads it again.
    a, b = a.reshape(-1, rank), b.reshape(rank, -1)
    parts = (a[:, i, None] * b[i] for i in range(rank))
    folded = sum(parts, kernel.astype(jnp.float32).reshape(len(a), -1))
    return folded.astype(kernel.dtype).reshape(kernel.shape)
