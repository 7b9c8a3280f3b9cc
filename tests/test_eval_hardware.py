"""Which device is which, and that the table holds dense figures."""

import pytest

from eval.hardware import GPUS, find_gpu

# Device names as torch gives them.
NAMES = {
    "NVIDIA A100-SXM4-40GB": "a100-40",
    "NVIDIA A100-SXM4-80GB": "a100-80",
    "A100-SXM4-40GB": "a100-40",
    "NVIDIA A100-PCIE-40GB": "a100-40-pcie",
    "NVIDIA A100 80GB PCIe": "a100-80-pcie",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H100 NVL": "h100-nvl",
    "NVIDIA H200": "h200",
    "NVIDIA H200 NVL": "h200-nvl",
    "NVIDIA H20": "h20",
    "NVIDIA B200": "b200",
    "NVIDIA GB200": "gb200",
    "NVIDIA L40S": "l40s",
    "NVIDIA L4": "l4",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "NVIDIA GeForce RTX 5090": "rtx5090",
    "Tesla V100-SXM2-16GB": "v100-16",
    "Tesla V100-SXM2-32GB": "v100-32",
    "Tesla V100-PCIE-32GB": "v100-32-pcie",
    "AMD Instinct MI300X": "mi300x",
    "AMD Instinct MI325X": "mi325x",
}
UNKNOWN = [
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    "NVIDIA GH200 480GB",
    "NVIDIA H20-3e",
    "NVIDIA H100",
    "NVIDIA L40",
    "NVIDIA A100-SXM-64GB",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 4090 D",
    "Tesla T4",
    "cpu",
    "",
]


@pytest.mark.parametrize(("name", "short"), NAMES.items())
def test_device_names(name: str, short: str) -> None:
    assert find_gpu(name).short == short


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_listed_is_unknown(name: str) -> None:
    assert find_gpu(name) is None


def test_short_names() -> None:
    assert [find_gpu(gpu.short) for gpu in GPUS] == list(GPUS), "each finds itself and no other"
    assert find_gpu("H200") is find_gpu("h200")


def test_figures_are_dense() -> None:
    """One tensor-core rate is the double of the next in every generation; a sparse figure would show."""
    for gpu in GPUS:
        assert gpu.tf32 is None or 1.9 < gpu.fp16 / gpu.tf32 < 2.1, gpu.short
        assert gpu.bf16 in (None, gpu.fp16)
    assert find_gpu("NVIDIA H200").flops("bf16") == pytest.approx(989e12, rel=1e-3)
    assert find_gpu("v100-16").flops("bf16") is None
    assert find_gpu("h100").memory_bytes == 80e9
