"""What is known of devices by their names, from the makers' data sheets. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

# Dense 16-bit FLOP/s of a device by a part of its name; the first match counts.
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
    """How fast devices exchange data, in bytes/s and one way: `intra` of a device inside its node, `inter` of a whole
    node to all others. These are shares of the data sheets' figures that collectives are usually seen to reach."""

    intra: float
    inter: float


# NVLink of the generation and, for nodes of 8, one network card for each device: 8 x 400 Gbit/s, 8 x 200 Gbit/s.
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
    """Dense 16-bit FLOP/s of the device of that name, None where it is not known."""
    return next((flops for part, flops in PEAK_16_BIT_FLOPS.items() if part in name), None)


def links_of(name: str) -> Links:
    """The usual links of nodes with such devices; PCIe and Ethernet where the name says nothing."""
    return next(links for part, links in LINKS.items() if part in name)
