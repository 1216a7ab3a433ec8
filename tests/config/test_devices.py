"""Devices are recognized by whole words of the names that drivers report."""

from __future__ import annotations

import pytest

from open_lm.config.devices import MEMORY_GIB, PEAK_16_BIT_FLOPS, links_of, memory_bytes, peak_16_bit_flops


@pytest.mark.parametrize(
    ("name", "tflops", "gib"),
    [
        ("NVIDIA H100 80GB HBM3", 989, 79.1),
        ("NVIDIA H100 PCIe", 756, 79.1),
        ("NVIDIA H100 NVL", 835, 93.0),
        ("NVIDIA H200", 989, 139.8),
        ("NVIDIA GH200 480GB", 989, 94.5),
        ("NVIDIA H800", 989, 79.1),
        ("NVIDIA H20", 148, 95.0),
        ("NVIDIA B300 SXM6 AC", 2250, 267.0),
        ("NVIDIA A100-SXM4-80GB", 312, 79.1),
        ("NVIDIA A100-SXM4-40GB", 312, 39.4),
        ("NVIDIA A40", 149.7, 44.3),
        ("NVIDIA RTX A4000", 76.7, 15.7),
        ("NVIDIA A10G", 70, 22.0),
        ("NVIDIA A10", 125, 22.0),
        ("NVIDIA L40S", 362, 44.3),
        ("NVIDIA L4", 121, 22.0),
        ("Tesla T4", 65, 14.5),
        ("Tesla V100-SXM2-32GB", 125, 31.7),
        ("NVIDIA GeForce RTX 4090", 165.2, 23.5),
        ("AMD Instinct MI300X", 1307, 191.5),
    ],
)
def test_peaks_and_memory_by_name(name: str, tflops: float, gib: float) -> None:
    assert peak_16_bit_flops(name) == pytest.approx(tflops * 1e12)
    assert memory_bytes(name) == pytest.approx(gib * 2**30)


def test_parts_of_words_are_not_recognized() -> None:
    for name in ("NVIDIA RTX A4500", "NVIDIA T400", "NVIDIA L400", "Quadro RTX 6000"):
        assert peak_16_bit_flops(name) is None and memory_bytes(name) is None
    assert links_of("NVIDIA RTX A4000").intra == links_of("unknown").intra < links_of("NVIDIA H200").intra


def test_every_key_finds_its_own_entry() -> None:
    for table, find in ((PEAK_16_BIT_FLOPS, peak_16_bit_flops), (MEMORY_GIB, memory_bytes)):
        for key, value in table.items():
            assert find(key) in (value, value * 2**30)
