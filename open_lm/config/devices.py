"""Peak FLOP/s, memory and link bandwidths of devices, by device name, from data sheets. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

# Dense 16-bit FLOP/s with float32 accumulation, by words of the device name. The first match is used.
PEAK_16_BIT_FLOPS = {
    "GB300": 2500e12,
    "B300": 2250e12,
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800 PCIe": 756e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A2": 18e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L20": 119.5e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX PRO 6000": 503.8e12,
    "RTX 6000 Ada": 364.2e12,
    "RTX A6000": 154.8e12,
    "RTX A5000": 111.1e12,
    "RTX A4000": 76.7e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "MI355X": 2516e12,
    "MI350X": 2309e12,
    "MI325X": 1307e12,
    "MI300X": 1307e12,
    "MI250X": 383e12,
}

# Memory in GiB that a process can allocate, by words of the device name. The first match is used. Data sheets give
# powers of two or of ten, of which error correction and the driver take a part.
MEMORY_GIB = {
    "GB300": 275.0,
    "B300": 267.0,
    "GB200": 184.0,
    "B200": 178.0,
    "GH200": 94.5,
    "H200": 139.8,
    "H100 NVL": 93.0,
    "H100": 79.1,
    "H800": 79.1,
    "H20": 95.0,
    "A100 40GB": 39.4,
    "A100-SXM4-40GB": 39.4,
    "A100-PCIE-40GB": 39.4,
    "A100": 79.1,
    "A800": 79.1,
    "A40": 44.3,
    "A30": 23.5,
    "A10G": 22.0,
    "A10": 22.0,
    "A2": 14.5,
    "L40S": 44.3,
    "L40": 44.3,
    "L20": 44.3,
    "L4": 22.0,
    "V100-SXM2-32GB": 31.7,
    "V100-PCIE-32GB": 31.7,
    "V100-SXM3-32GB": 31.7,
    "V100": 15.7,
    "T4": 14.5,
    "RTX PRO 6000": 94.9,
    "RTX 6000 Ada": 47.3,
    "RTX A6000": 47.4,
    "RTX A5000": 23.5,
    "RTX A4000": 15.7,
    "RTX 5090": 31.3,
    "RTX 4090": 23.5,
    "RTX 3090": 23.5,
    "MI355X": 287.0,
    "MI350X": 287.0,
    "MI325X": 255.0,
    "MI300X": 191.5,
    "MI250X": 63.9,
}


@dataclass(frozen=True)
class Links:
    """Bandwidths in bytes/s and in one direction: `intra` per device within its node, `inter` per node to other nodes.

    They are below the figures of data sheets, because collectives typically reach only a fraction of those.
    """

    intra: float
    inter: float


# NVLink by generation, and one network card per device in nodes of 8: 8 x 400 Gbit/s or 8 x 200 Gbit/s.
_NVLINK_5 = Links(intra=700e9, inter=360e9)
_NVLINK_4 = Links(intra=360e9, inter=360e9)
_NVLINK_3 = Links(intra=230e9, inter=180e9)
_PCIE = Links(intra=20e9, inter=10e9)
LINKS = {
    "GB300": _NVLINK_5,
    "B300": _NVLINK_5,
    "GB200": _NVLINK_5,
    "B200": _NVLINK_5,
    "H100 PCIe": _PCIE,
    "H100": _NVLINK_4,
    "H200": _NVLINK_4,
    "GH200": _NVLINK_4,
    "H800": Links(intra=160e9, inter=360e9),
    "H20": _NVLINK_4,
    "A100": _NVLINK_3,
    "A800": Links(intra=160e9, inter=180e9),
    "V100": Links(intra=120e9, inter=40e9),
    "MI325X": Links(intra=300e9, inter=360e9),
    "MI300X": Links(intra=300e9, inter=360e9),
}


def peak_16_bit_flops(name: str) -> float | None:
    """Return the dense 16-bit FLOP/s of a device, or None if the name is unknown."""
    return first_match(PEAK_16_BIT_FLOPS, name)


def memory_bytes(name: str) -> float | None:
    """Return the bytes that a process can allocate on a device, or None if the name is unknown."""
    gib = first_match(MEMORY_GIB, name)
    return None if gib is None else gib * 2**30


def links_of(name: str) -> Links:
    """Return the typical link bandwidths of nodes with such devices. Unknown devices get those of PCIe and Ethernet."""
    return first_match(LINKS, name) or _PCIE


def first_match(table: Mapping[str, T], name: str) -> T | None:
    """Return the first entry whose key occurs in the name as whole words: "A40" is not in "RTX A4000"."""
    return next((value for words, value in table.items() if re.search(rf"\b{re.escape(words)}\b", name)), None)


# Thermal design power (total board power) in W by words of the device name, from data sheets. First match.
TDP_WATTS = {
    "B300": 1400.0,
    "GB200": 1200.0,
    "B200": 1000.0,
    "H200 NVL": 600.0,
    "H200": 700.0,
    "H100 PCIe": 350.0,
    "H100 NVL": 400.0,
    "H100": 700.0,
    "H800 PCIe": 350.0,
    "H800": 700.0,
    "H20": 400.0,
    "A100-PCIE-40GB": 250.0,
    "A100 80GB PCIe": 300.0,
    "A100": 400.0,
    "A800": 400.0,
    "A40": 300.0,
    "A30": 165.0,
    "A10G": 300.0,
    "A10": 150.0,
    "L40S": 350.0,
    "L40": 300.0,
    "L4": 72.0,
    "V100-PCIE": 250.0,
    "V100": 300.0,
    "T4": 70.0,
    "RTX PRO 6000": 600.0,
    "RTX 6000 Ada": 300.0,
    "RTX A6000": 300.0,
    "RTX 5090": 575.0,
    "RTX 4090": 450.0,
    "RTX 3090": 350.0,
    "MI355X": 1400.0,
    "MI350X": 1000.0,
    "MI325X": 1000.0,
    "MI300X": 750.0,
    "MI250X": 560.0,
}


def tdp_watts(name: str) -> float | None:
    """Return the thermal design power of a device in W, or None if the name is unknown."""
    return first_match(TDP_WATTS, name)
