"""Data sheets: found by the names that torch gives, physically sensible, with their source."""

from collections import Counter

import pytest

from graphopt.cost_model.datasheets import DATA_SHEETS, DataSheet, lookup
from graphopt.errors import CostModelError, GraphoptError

each = pytest.mark.parametrize("sheet", DATA_SHEETS, ids=lambda sheet: sheet.name)

DEVICE_NAMES = {  # of torch.cuda.get_device_name()
    "Tesla V100-SXM2-16GB": "V100 SXM2 16GB",
    "Tesla V100-SXM2-32GB": "V100 SXM2 32GB",
    "Tesla T4": "T4",
    "NVIDIA A100-SXM4-40GB": "A100 SXM 40GB",
    "A100-SXM4-80GB": "A100 SXM 80GB",
    "NVIDIA A100-SXM4-80GB": "A100 SXM 80GB",
    "NVIDIA A100-PCIE-40GB": "A100 PCIe 40GB",
    "NVIDIA A100 80GB PCIe": "A100 PCIe 80GB",
    "NVIDIA GeForce RTX 3090": "RTX 3090",
    "GeForce RTX 3090": "RTX 3090",
    "NVIDIA RTX A6000": "RTX A6000",
    "NVIDIA A40": "A40",
    "NVIDIA A10": "A10",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
    "NVIDIA L4": "L4",
    "NVIDIA L40S": "L40S",
    "NVIDIA H100 80GB HBM3": "H100 SXM",
    "NVIDIA H100 PCIe": "H100 PCIe",
    "NVIDIA H200": "H200",
    "NVIDIA GH200 480GB": "GH200",
    "NVIDIA B100": "B100",
    "NVIDIA B200": "B200",
    "AMD Instinct MI250X": "MI250X",
    "AMD Instinct MI300X": "MI300X",
}


@pytest.mark.parametrize("given, name", DEVICE_NAMES.items())
def test_names_that_torch_gives(given: str, name: str) -> None:
    assert lookup(given).name == lookup(given.upper()).name == name


def test_every_sheet_has_a_device_name() -> None:
    assert set(DEVICE_NAMES.values()) == {sheet.name for sheet in DATA_SHEETS}


@pytest.mark.parametrize(
    "given, name",
    [
        ("h100", "H100 SXM"), ("v100", "V100 SXM2 32GB"), ("A100", "A100 SXM 80GB"), ("a100 40 gb", "A100 SXM 40GB"),
        ("a100_pcie_80g", "A100 PCIe 80GB"), ("rtx4090", "RTX 4090"), ("3090", "RTX 3090"), ("A6000", "RTX A6000"),
        ("H100 SXM5", "H100 SXM"), (" mi300x ", "MI300X"),
    ],
)  # fmt: skip
def test_names_that_people_write(given: str, name: str) -> None:
    assert lookup(given).name == name


@pytest.mark.parametrize(
    "other", ["NVIDIA A10G", "NVIDIA H100 NVL", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 4090 Laptop GPU",
              "NVIDIA L40", "Tesla V100-PCIE-16GB", "NVIDIA A100-SXM-64GB", "", "cpu"],
)  # fmt: skip
def test_other_processors_are_not_taken_for_these(other: str) -> None:
    with pytest.raises(CostModelError, match=r"no data sheet of .* There are: V100 SXM2 16GB, .*MI300X"):
        lookup(other)


def test_an_unknown_name_meets_suggestions() -> None:
    with pytest.raises(GraphoptError, match="did you mean 'H100'"):
        lookup("H10O")
    with pytest.raises(GraphoptError, match="no data sheet of 100"):
        lookup(100)  # type: ignore[arg-type]


def test_aliases_name_one_processor_each() -> None:
    names = Counter(name.lower() for sheet in DATA_SHEETS for name in (sheet.name, *sheet.aliases))
    assert not [name for name, count in names.items() if count > 1]
    assert all(lookup(name) is sheet for sheet in DATA_SHEETS for name in (sheet.name, *sheet.aliases))


@each
def test_rates_and_sizes_are_sensible(sheet: DataSheet) -> None:
    rates = sheet.flops
    assert list(rates) == ["fp64", "fp32", "tf32", "bf16", "fp16"]
    assert rates["fp16"] >= rates["tf32"] >= rates["fp32"] >= rates["fp64"] > 1e11
    assert rates["fp16"] >= rates["bf16"] >= rates["fp32"]
    assert 6e13 < rates["fp16"] < 5e15
    assert 0.1e12 < sheet.bandwidth < 10e12
    assert 16e9 <= sheet.memory_bytes <= 200e9
    assert 40 <= sheet.multiprocessors <= 304
    assert 2**22 <= sheet.l2_bytes <= 2**27
    assert 1e10 < sheet.link_bandwidth < sheet.bandwidth
    assert 2017 <= sheet.year <= 2024


@each
def test_ridge_points_are_sensible(sheet: DataSheet) -> None:
    """Flops a byte at which memory stops being the limit: 5 to 110 in fp32, 75 to 425 in fp16. Dense rates: twice
    as much would be a rate with sparsity."""
    assert 5 <= sheet.flops["fp32"] / sheet.bandwidth <= 110
    assert 75 <= sheet.flops["fp16"] / sheet.bandwidth <= 425


@each
def test_tensor_cores_keep_a_power_of_two_over_tf32(sheet: DataSheet) -> None:
    """Tensor cores halve their rate with twice the bits; a sparse rate beside a dense one would show here."""
    if sheet.flops["tf32"] > 1.5 * sheet.flops["fp32"]:
        assert sheet.flops["fp16"] / sheet.flops["tf32"] == pytest.approx(2, rel=0.02)


@each
def test_sources_are_those_of_the_makers(sheet: DataSheet) -> None:
    assert sheet.source.startswith("https://")
    assert any(maker in sheet.source for maker in ("nvidia.com", "amd.com"))
    assert hash(sheet) == hash(lookup(sheet.name))
