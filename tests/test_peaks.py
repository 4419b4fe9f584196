"""The share of the chips' peak is stated where their peak is known, and only there."""

from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from dydit_jax.runtime.peaks import PEAK_FLOPS, best_case, find_peak, flops_utilisation


def test_utilisation_is_the_share_of_the_peak_of_all_devices(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    for kind, peak in (("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("NVIDIA H200", 989e12)):
        monkeypatch.setattr(jax, "devices", lambda kind=kind: [mock.Mock(device_kind=kind)])
        assert flops_utilisation(1e13, jnp.bfloat16) == pytest.approx(6e13 / (4 * peak))
        assert flops_utilisation(1e13, jnp.float32) is None
        # Recomputing a forward pass executes four FLOPs where three count.
        for remat, executed in (("none", 6), ("block", 8)):
            seconds, most = best_case(1e13, jnp.bfloat16, remat)
            assert seconds == pytest.approx(1e13 * executed / (4 * peak))
            assert most == pytest.approx(flops_utilisation(1e13 / seconds, jnp.bfloat16)) == pytest.approx(6 / executed)
    monkeypatch.setattr(jax, "devices", lambda: [mock.Mock(device_kind="abacus")])
    assert flops_utilisation(1e13, jnp.bfloat16) is None and best_case(1e13, jnp.bfloat16, "none") is None


@pytest.mark.parametrize(
    "kind, teraflops",
    [
        ("TPU7x", 1153.5),  # of one of the two cores
        ("TPU v6 lite", 918),
        ("TPU v4 lite", None),  # v4i, an older chip
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),  # a slice of a chip
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("AMD Instinct MI300X", 1307.4),
        ("cpu", None),
    ],
)
def test_peak_is_that_of_the_chip_and_not_of_one_whose_name_begins_alike(kind, teraflops):
    assert find_peak(kind) == (None if teraflops is None else pytest.approx(teraflops * 1e12))


def test_every_listed_name_finds_its_own_peak():
    assert {name: find_peak(name) for name in PEAK_FLOPS} == PEAK_FLOPS
