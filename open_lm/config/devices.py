"""Peak FLOP/s and link bandwidths of devices, by device name, from data sheets. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

# Dense 16-bit FLOP/s by a substring of the device name. The first match is used.
PEAK_16_BIT_FLOPS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
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
    "B200": _NVLINK_5,
    "H100 PCIe": _PCIE,
    "H100": _NVLINK_4,
    "H200": _NVLINK_4,
    "A100": _NVLINK_3,
    "A800": Links(intra=160e9, inter=180e9),
    "V100": Links(intra=120e9, inter=40e9),
    "MI300X": Links(intra=300e9, inter=360e9),
    "": _PCIE,
}


def peak_16_bit_flops(name: str) -> float | None:
    """Return the dense 16-bit FLOP/s of a device, or None if the name is unknown."""
    return next((flops for part, flops in PEAK_16_BIT_FLOPS.items() if part in name), None)


def links_of(name: str) -> Links:
    """Return the typical link bandwidths of nodes with such devices. Unknown devices get those of PCIe and Ethernet."""
    return next(links for part, links in LINKS.items() if part in name)
