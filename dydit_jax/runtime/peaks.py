"""How much of the chips' bfloat16 peak a training step uses (MFU), and what no step can exceed.

The peaks are those of dense products summed in float32, as read on 2026-11-30: TPU v5e, v5p, v6e and TPU7x on Google's
page about each (https://docs.cloud.google.com/tpu/docs/v6e, and so on), v4 in JAX's table of TPUs (tpu_info.py of
Pallas); A100, H100, H200, B200 and L40S in torchtitan's table, which names the maker's page for each
(torchtitan/tools/utils.py); GB200 on https://glennklockwood.com/garden/processors/B200, from NVIDIA's brief. The
others are in copies of nanochat's table (get_peak_flops) and were not found on a maker's page.
"""

import re

import jax
import jax.numpy as jnp

# FLOP/s of one device as JAX counts them, by the name JAX has for it.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,  # Ironwood: each of the two cores of a chip is a device
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 836e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 5090": 209.5e12,
    "AMD Instinct MI300A": 980.6e12,
    "AMD Instinct MI300X": 1307.4e12,
}
# What may follow a name without making it another chip: "NVIDIA A100-SXM4-80GB". A "Laptop GPU", a "D" for a market and
# a MIG slice are other chips.
FORM = re.compile(r"(?:[ -](?:SXM\d*|PCIE|PCIe|OAM|HBM\d\w*|\d+GB))*")
FLOPS_PER_MAC = 6  # of a training step: 2 forward, 4 backward
# By what is rematerialised: a whole forward pass, or what is not a product.
RECOMPUTED_FLOPS_PER_MAC = {"none": 0, "dots": 0, "block": 2}


def flops_utilisation(macs_per_second: float, dtype) -> float | None:
    """Return the share of the chips' bfloat16 peak that a training step's MACs make; None where the peak is unknown."""
    peak = _job_peak(dtype)
    return None if peak is None else FLOPS_PER_MAC * macs_per_second / peak


def best_case(macs: float, dtype, remat: str) -> tuple[float, float] | None:
    """Return how long a training step would take at the chips' peak, and the share of it that counts as use.

    Args:
      macs: of all images and passes of a step.
      dtype: of the products.
      remat: what the backward pass computes again, as in `Model`.

    Returns:
      Seconds, and the utilisation that no step can exceed; None where the peak is unknown.
    """
    peak = _job_peak(dtype)
    if peak is None:
        return None
    executed = FLOPS_PER_MAC + RECOMPUTED_FLOPS_PER_MAC[remat]
    return macs * executed / peak, FLOPS_PER_MAC / executed


def find_peak(kind: str) -> float | None:
    """Return the peak of a device by JAX's name for it, FLOP/s; None for one that is not listed."""
    names = sorted((name for name in PEAK_FLOPS if kind.startswith(name)), key=len, reverse=True)
    return next((PEAK_FLOPS[name] for name in names if FORM.fullmatch(kind, len(name))), None)


def _job_peak(dtype) -> float | None:
    """Return the peak of all devices of this job together, where it is known."""
    peak = find_peak(jax.devices()[0].device_kind)
    return None if peak is None or dtype != jnp.bfloat16 else peak * jax.device_count()
