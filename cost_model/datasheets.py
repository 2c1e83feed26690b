"""Data sheets of well-known training processors, so that a step can be priced for a machine that is not here.

Each figure is a published fact about the hardware, an upper bound that no step reaches; a calibration on the machine
itself replaces it. The conventions, the same for every entry:

- **Rates are dense.** Makers often print rates with 2:4 structured sparsity, which no ordinary training step uses:
  those are halved here.
- **The faster unit counts**: matrix (tensor) cores where the processor has them for a precision, with float32
  accumulation. Where it has no such arithmetic (tf32 and bf16 before Ampere, tf32 on MI250X), the rate is that of
  fp32, which computes it.
- **Prefixes are decimal** (1 GB = 1e9 bytes), for the memory's capacity too, which is as printed. A device reports
  between 1 % less (GDDR with error correction) and 7 % more, so what fits by this number fits. Caches are the
  exception: their sizes are powers of two.
- **One entry is one device of torch.** An MI250X is two of them, so each has half of what is printed.
- **Links are one direction of one device**: half of the bidirectional total that is printed. Modules (SXM, OAM) have
  NVLink or Infinity Fabric, cards PCIe: a bridge, which some take, joins only two.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal

from graphopt.errors import CostModelError

Precision = Literal["fp64", "fp32", "tf32", "bf16", "fp16"]


@dataclass(frozen=True)
class DataSheet:
    """What the maker of a processor says it can do. See the module's docstring for the conventions.

    Attributes:
        name: how we call it, for example ``H100 SXM``.
        aliases: other names that `lookup` knows, among them those of ``torch.cuda.get_device_name``.
        flops: dense flop/s of matrix products by precision; a multiply-add counts two.
        bandwidth: of the memory, bytes/s.
        memory_bytes: capacity, bytes.
        multiprocessors: streaming multiprocessors (NVIDIA) or compute units (AMD).
        l2_bytes: level 2 cache, bytes.
        link_bandwidth: to other processors, bytes/s in one direction.
        link: which link that is.
        source: where the figures are published.
        year: of the announcement.
    """

    name: str
    aliases: tuple[str, ...]
    flops: Mapping[Precision, float] = field(hash=False)
    bandwidth: float
    memory_bytes: int
    multiprocessors: int
    l2_bytes: int
    link_bandwidth: float
    link: str
    source: str
    year: int


def lookup(name: str) -> DataSheet:
    """The data sheet of a processor.

    Args:
        name: ``"H100"``, ``"A100 80GB PCIe"`` or what ``torch.cuda.get_device_name()`` gives, in any case. A bare
            family name means its module with the most memory. Names that are merely alike (``A10G``, ``H100 NVL``,
            ``RTX 4090 Laptop GPU``) are other processors, and not taken for these.

    Raises:
        CostModelError: there is none; names the most similar ones and all that are known.

    >>> lookup("NVIDIA H100 80GB HBM3").name
    'H100 SXM'
    >>> lookup("A100-PCIE-40GB").bandwidth
    1555000000000.0
    """
    found = _BY_WORDS.get(_words(name)) if isinstance(name, str) else None
    if found is not None:
        return found
    spelled = {n.lower(): n for sheet in DATA_SHEETS for n in (sheet.name, *sheet.aliases)}
    similar = get_close_matches(str(name).lower(), spelled, n=3)
    hint = f"did you mean {' or '.join(repr(spelled[s]) for s in similar)}? " if similar else ""
    known = ", ".join(sheet.name for sheet in DATA_SHEETS)
    raise CostModelError(f"machine: no data sheet of {name!r}; {hint}There are: {known}")


def _words(name: str) -> frozenset[str]:
    """What tells processors apart in a name: without maker, brand, form of memory, generation of the socket, order."""
    text = re.sub(r"[^a-z0-9]+", " ", name.lower())
    text = re.sub(r"\b(rtx|gtx)(?=\d)", "", text)
    text = re.sub(r"\b(\d+) ?gb?\b", r"\1gb", text)
    text = re.sub(r"\bsxm\d?\b", "sxm", text)
    text = re.sub(r"\bhbm\d?e?\b", "", text)
    return frozenset(text.split()) - {"nvidia", "amd", "tesla", "geforce", "rtx", "quadro", "instinct"}


def _rates(
    fp64: float, fp32: float, fp16: float, tf32: float | None = None, bf16: float | None = None
) -> Mapping[Precision, float]:
    """Dense flop/s; ``tf32`` and ``bf16`` are those of fp32 where the processor has no such arithmetic."""
    return {"fp64": fp64, "fp32": fp32, "tf32": tf32 or fp32, "bf16": bf16 or fp32, "fp16": fp16}


_NVIDIA = "https://www.nvidia.com/content/dam/en-zz/Solutions"
_V100 = "https://images.nvidia.com/content/volta-architecture/pdf/volta-architecture-whitepaper.pdf"
_A100 = f"{_NVIDIA}/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
_GA102 = "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf"
_ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
_H100 = "https://resources.nvidia.com/en-us-tensor-core/gtc22-whitepaper-hopper"
_BLACKWELL = "https://resources.nvidia.com/en-us-blackwell-architecture"

_PCIE3, _PCIE4, _PCIE5 = (16e9, "PCIe 3.0 x16"), (32e9, "PCIe 4.0 x16"), (64e9, "PCIe 5.0 x16")
_NVLINK2, _NVLINK3, _NVLINK4, _NVLINK5 = (
    (150e9, "NVLink 2"), (300e9, "NVLink 3"), (450e9, "NVLink 4"), (900e9, "NVLink 5"),
)  # fmt: skip

_V100_RATES = _rates(fp64=7.8e12, fp32=15.7e12, fp16=125e12)
_A100_RATES = _rates(fp64=19.5e12, fp32=19.5e12, tf32=156e12, bf16=312e12, fp16=312e12)
_HOPPER_RATES = _rates(fp64=66.9e12, fp32=66.9e12, tf32=494.7e12, bf16=989.4e12, fp16=989.4e12)

MiB = 2**20

DATA_SHEETS: tuple[DataSheet, ...] = (
    DataSheet(
        "V100 SXM2 16GB", ("V100-SXM2", "Tesla V100-SXM2-16GB", "V100 16GB"),
        _V100_RATES, 900e9, 16 * 10**9, 80, 6 * MiB, *_NVLINK2, _V100, 2017,
    ),
    DataSheet(
        "V100 SXM2 32GB", ("V100", "Tesla V100-SXM2-32GB", "V100 32GB"),
        _V100_RATES, 900e9, 32 * 10**9, 80, 6 * MiB, *_NVLINK2, _V100, 2018,
    ),
    DataSheet(
        "T4", ("Tesla T4",),
        _rates(fp64=0.253e12, fp32=8.1e12, fp16=65e12), 320e9, 16 * 10**9, 40, 4 * MiB, *_PCIE3,
        f"{_NVIDIA}/Data-Center/tesla-t4/t4-tensor-core-product-brief.pdf", 2018,
    ),
    DataSheet(
        "A100 SXM 40GB", ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        _A100_RATES, 1555e9, 40 * 10**9, 108, 40 * MiB, *_NVLINK3, _A100, 2020,
    ),
    DataSheet(
        "A100 SXM 80GB", ("A100", "A100 SXM", "NVIDIA A100-SXM4-80GB", "A100 80GB"),
        _A100_RATES, 2039e9, 80 * 10**9, 108, 40 * MiB, *_NVLINK3, _A100, 2020,
    ),
    DataSheet(
        "A100 PCIe 40GB", ("NVIDIA A100-PCIE-40GB",),
        _A100_RATES, 1555e9, 40 * 10**9, 108, 40 * MiB, *_PCIE4, _A100, 2020,
    ),
    DataSheet(
        "A100 PCIe 80GB", ("A100 PCIe", "NVIDIA A100 80GB PCIe"),
        _A100_RATES, 1935e9, 80 * 10**9, 108, 40 * MiB, *_PCIE4, _A100, 2021,
    ),
    DataSheet(
        "RTX 3090", ("NVIDIA GeForce RTX 3090",),
        _rates(fp64=0.556e12, fp32=35.6e12, tf32=35.6e12, bf16=71.2e12, fp16=71.2e12),
        936e9, 24 * 10**9, 82, 6 * MiB, *_PCIE4, _GA102, 2020,
    ),
    DataSheet(
        "RTX A6000", ("A6000", "NVIDIA RTX A6000"),
        _rates(fp64=0.605e12, fp32=38.7e12, tf32=77.4e12, bf16=154.8e12, fp16=154.8e12),
        768e9, 48 * 10**9, 84, 6 * MiB, *_PCIE4, _GA102, 2020,
    ),
    DataSheet(
        "A40", ("NVIDIA A40",),
        _rates(fp64=0.585e12, fp32=37.4e12, tf32=74.8e12, bf16=149.7e12, fp16=149.7e12),
        696e9, 48 * 10**9, 84, 6 * MiB, *_PCIE4, "https://www.nvidia.com/en-us/data-center/a40/", 2020,
    ),
    DataSheet(
        "A10", ("NVIDIA A10",),
        _rates(fp64=0.488e12, fp32=31.2e12, tf32=62.5e12, bf16=125e12, fp16=125e12),
        600e9, 24 * 10**9, 72, 6 * MiB, *_PCIE4,
        "https://www.nvidia.com/en-us/data-center/products/a10-gpu/", 2021,
    ),
    DataSheet(
        "RTX 4090", ("NVIDIA GeForce RTX 4090",),
        _rates(fp64=1.29e12, fp32=82.6e12, tf32=82.6e12, bf16=165.2e12, fp16=165.2e12),
        1008e9, 24 * 10**9, 128, 72 * MiB, *_PCIE4, _ADA, 2022,
    ),
    DataSheet(
        "L4", ("NVIDIA L4",),
        _rates(fp64=0.473e12, fp32=30.3e12, tf32=60e12, bf16=121e12, fp16=121e12),
        300e9, 24 * 10**9, 58, 48 * MiB, *_PCIE4, "https://www.nvidia.com/en-us/data-center/l4/", 2023,
    ),
    DataSheet(
        "L40S", ("NVIDIA L40S",),
        _rates(fp64=1.43e12, fp32=91.6e12, tf32=183e12, bf16=362.05e12, fp16=362.05e12),
        864e9, 48 * 10**9, 142, 96 * MiB, *_PCIE4, "https://www.nvidia.com/en-us/data-center/l40s/", 2023,
    ),
    DataSheet(
        "H100 SXM", ("H100", "NVIDIA H100 80GB HBM3", "H100 SXM5 80GB"),
        _HOPPER_RATES, 3350e9, 80 * 10**9, 132, 50 * MiB, *_NVLINK4, _H100, 2022,
    ),
    DataSheet(
        "H100 PCIe", ("NVIDIA H100 PCIe", "H100 PCIe 80GB"),
        _rates(fp64=51.2e12, fp32=51.2e12, tf32=378e12, bf16=756e12, fp16=756e12),
        2000e9, 80 * 10**9, 114, 50 * MiB, *_PCIE5, _H100, 2022,
    ),
    DataSheet(
        "H200", ("NVIDIA H200", "H200 SXM", "H200 141GB"),
        _HOPPER_RATES, 4800e9, 141 * 10**9, 132, 60 * MiB, *_NVLINK4,
        "https://www.nvidia.com/en-us/data-center/h200/", 2023,
    ),
    DataSheet(
        "GH200", ("NVIDIA GH200 480GB", "NVIDIA GH200 120GB", "GH200 96GB"),  # the sizes in the first two: of the CPU
        _HOPPER_RATES, 4000e9, 96 * 10**9, 132, 60 * MiB, *_NVLINK4,
        "https://resources.nvidia.com/en-us-grace-cpu/grace-hopper-superchip", 2023,
    ),
    DataSheet(
        "B100", ("NVIDIA B100",),
        _rates(fp64=30e12, fp32=60e12, tf32=875e12, bf16=1750e12, fp16=1750e12),
        8000e9, 192 * 10**9, 148, 126 * MiB, *_NVLINK5, _BLACKWELL, 2024,
    ),
    DataSheet(
        "B200", ("NVIDIA B200",),
        _rates(fp64=37e12, fp32=75e12, tf32=1125e12, bf16=2250e12, fp16=2250e12),
        8000e9, 180 * 10**9, 148, 126 * MiB, *_NVLINK5, _BLACKWELL, 2024,
    ),
    DataSheet(
        "MI250X", ("AMD Instinct MI250X",),  # one of its two dies
        _rates(fp64=47.85e12, fp32=47.85e12, bf16=191.5e12, fp16=191.5e12),
        1638.4e9, 64 * 10**9, 110, 8 * MiB, 200e9, "Infinity Fabric 3",
        "https://www.amd.com/en/products/accelerators/instinct/mi200/mi250x.html", 2021,
    ),
    DataSheet(
        "MI300X", ("AMD Instinct MI300X",),
        _rates(fp64=163.4e12, fp32=163.4e12, tf32=653.7e12, bf16=1307.4e12, fp16=1307.4e12),
        5300e9, 192 * 10**9, 304, 32 * MiB, 448e9, "Infinity Fabric 4",
        "https://www.amd.com/content/dam/amd/en/documents/instinct-tech-docs/data-sheets/amd-instinct-mi300x-data-sheet.pdf",
        2023,
    ),
)  # fmt: skip
"""The processors that are known, in no order that matters."""

_BY_WORDS = {_words(name): sheet for sheet in DATA_SHEETS for name in (sheet.name, *sheet.aliases)}
