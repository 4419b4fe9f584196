"""PyTorch beside it: diffusers' static DiT, eager and compiled, sampling and training on a GPU.

A step of sampling is a pass with guidance and DDPM's update; the training step is that of `torch_peer.py`, with
bfloat16 products on float32 weights. PyTorch, and diffusers, are imported when they are asked for: without them a row
says so.
"""

import dataclasses
import statistics
import time

from torch_peer import make_network, make_training_step

from dydit_jax.errors import InputError

ROWS = ("sampling, eager", "sampling, compiled", "training, eager", "training, compiled")
STEPS = 4  # of a round


@dataclasses.dataclass(frozen=True)
class Peer:
    """What is measured.

    Attributes:
      config: a record with depth, width, heads, patch, side, channels and classes; its routers do not count.
      batch, guidance: of sampling.
      training_batch: images of a training step.
      backend: of `torch.compile`.
      rounds: of `STEPS` timed steps.
    """

    config: object
    batch: int
    guidance: float
    training_batch: int
    backend: str
    rounds: int


def time_peer(session, name: str, row: dict, peer: Peer) -> bool:
    """Time one of `ROWS`."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and peer.backend != "eager":  # which is of a dry run
        raise InputError(f"PyTorch {torch.__version__} finds no GPU here; install a build for this CUDA.")
    torch.compiler.reset()  # or a second shape would be compiled as one of many
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    what, how = name.split(", ")
    network = make_network(peer.config).to(device)
    compiled = torch.compile(network, backend=peer.backend, dynamic=False) if how == "compiled" else network
    if what == "sampling":
        batch = peer.batch
        step = _sampling_step(torch, network, compiled, peer, batch, device)
    else:
        batch = peer.training_batch
        step = make_training_step(network, compiled, peer.config, batch)
    began = time.perf_counter()
    _take(torch, step, 1)
    row |= dict(batch=batch, first_call_seconds=time.perf_counter() - began, torch=torch.__version__)
    session.write(name, row)
    seconds = row.get("all_seconds", [])
    while len(seconds) < peer.rounds and session.left > 0:
        began = time.perf_counter()
        _take(torch, step, STEPS)
        seconds.append((time.perf_counter() - began) / STEPS)
        row |= dict(all_seconds=seconds, seconds=statistics.median(seconds))
        if device == "cuda":
            row |= dict(peak_gib=torch.cuda.max_memory_allocated() / 2**30)
        session.write(name, row)
    return len(seconds) >= peer.rounds


def _take(torch, step, steps: int) -> None:
    for _ in range(steps):
        step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _sampling_step(torch, network, compiled, peer: Peer, batch: int, device: str):
    """Return a function that takes one step of DDPM at an arbitrary timestep, in bfloat16 on a GPU."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    network.eval().to(dtype)
    config = peer.config
    x = torch.randn(batch, config.channels, config.side, config.side, device=device)
    labels = torch.arange(batch, device=device) % config.classes
    labels = torch.cat([labels, torch.full_like(labels, config.classes)])
    t = torch.full((2 * batch,), 500, device=device)
    decay, weight, deviation = 0.99, 0.02, 0.1  # of the update: any numbers take as long

    @torch.inference_mode()
    def step():
        output = compiled(torch.cat([x, x]).to(dtype), t, labels).sample.float()
        conditional, unconditional = output.chunk(2)
        noise = unconditional + peer.guidance * (conditional - unconditional)
        scale = torch.exp(0.5 * deviation * conditional[:, config.channels :])
        x.mul_(decay).sub_(weight * noise[:, : config.channels]).add_(deviation * scale * torch.randn_like(x))

    return step
