"""Peak rates and memory of GPUs, from their makers' data sheets; what is not listed is unknown, never guessed.

FLOP/s are dense: NVIDIA's sheets print the tensor-core figures with 2:4 sparsity, twice what a dense product can reach.
Half precision is with fp32 accumulation. Memory is the sheet's figure in units of 1e9 bytes; drivers report from 1.5 %
less (GDDR cards with error correction) to 7 % more.
"""

from dataclasses import dataclass

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Gpu:
    """One model of GPU. Rates are dense and per device; None: that type has no tensor-core rate.

    device     torch's name for it, without the maker's prefix
    bf16, fp16, tf32, fp32   TFLOP/s
    memory     GB
    bandwidth  GB/s
    """

    short: str
    device: str
    bf16: float | None
    fp16: float
    tf32: float | None
    fp32: float
    memory: float
    bandwidth: float

    def flops(self, precision: str) -> float | None:
        """Peak FLOP/s in `bf16`, `fp16`, `tf32` or `fp32`; None if the device has none for it."""
        rates = {"bf16": self.bf16, "fp16": self.fp16, "tf32": self.tf32, "fp32": self.fp32}
        rate = rates[precision]
        return None if rate is None else rate * TERA

    @property
    def memory_bytes(self) -> float:
        return self.memory * GIGA


# Names match whole: "H100 NVL" is not "H100 80GB HBM3" with something added, and partitions ("... MIG 1g.10gb"), laptop
# models and superchips ("GH200 480GB") are none of these.
GPUS = (
    # NVIDIA A100 data sheet, June 2021 (40 and 80 GB, SXM and PCIe); 40 GB bandwidth: A100 architecture white paper.
    Gpu("a100-40", "A100-SXM4-40GB", 312, 312, 156, 19.5, 40, 1555),
    Gpu("a100-80", "A100-SXM4-80GB", 312, 312, 156, 19.5, 80, 2039),
    Gpu("a100-40-pcie", "A100-PCIE-40GB", 312, 312, 156, 19.5, 40, 1555),
    Gpu("a100-80-pcie", "A100 80GB PCIe", 312, 312, 156, 19.5, 80, 1935),
    # NVIDIA H100 data sheet: SXM, PCIe (edition of 2022), NVL (edition of 2024), sparse figures halved.
    Gpu("h100", "H100 80GB HBM3", 989.5, 989.5, 494.5, 67, 80, 3350),
    Gpu("h100-pcie", "H100 PCIe", 756.5, 756.5, 378, 51, 80, 2000),
    Gpu("h100-nvl", "H100 NVL", 835.5, 835.5, 417.5, 60, 94, 3900),
    # NVIDIA H200 data sheet: SXM and NVL, sparse figures halved.
    Gpu("h200", "H200", 989.5, 989.5, 494.5, 67, 141, 4800),
    Gpu("h200-nvl", "H200 NVL", 835.5, 835.5, 417.5, 60, 141, 4800),
    # NVIDIA H20 product brief, as widely reproduced; its figures are dense.
    Gpu("h20", "H20", 148, 148, 74, 44, 96, 4000),
    # NVIDIA HGX B200 and GB200 NVL72 data sheet, per GPU, sparse figures halved.
    Gpu("b200", "B200", 2250, 2250, 1100, 75, 180, 7700),
    Gpu("gb200", "GB200", 2500, 2500, 1250, 80, 186, 8000),
    # NVIDIA L40S data sheet.
    Gpu("l40s", "L40S", 362, 362, 183, 91.6, 48, 864),
    # NVIDIA L4 data sheet, sparse figures halved.
    Gpu("l4", "L4", 121, 121, 60, 30.3, 24, 300),
    # NVIDIA Ada GPU architecture white paper, appendix: GeForce RTX 4090.
    Gpu("rtx4090", "GeForce RTX 4090", 165.2, 165.2, 82.6, 82.6, 24, 1008),
    # NVIDIA RTX Blackwell GPU architecture white paper, appendix: GeForce RTX 5090.
    Gpu("rtx5090", "GeForce RTX 5090", 209.5, 209.5, 104.8, 104.8, 32, 1792),
    # NVIDIA V100 data sheet: SXM2 and PCIe; no bf16 and no tf32.
    Gpu("v100-16", "V100-SXM2-16GB", None, 125, None, 15.7, 16, 900),
    Gpu("v100-32", "V100-SXM2-32GB", None, 125, None, 15.7, 32, 900),
    Gpu("v100-16-pcie", "V100-PCIE-16GB", None, 112, None, 14, 16, 900),
    Gpu("v100-32-pcie", "V100-PCIE-32GB", None, 112, None, 14, 32, 900),
    # AMD Instinct MI300X and MI325X data sheets.
    Gpu("mi300x", "Instinct MI300X", 1307.4, 1307.4, 653.7, 163.4, 192, 5300),
    Gpu("mi325x", "Instinct MI325X", 1307.4, 1307.4, 653.7, 163.4, 256, 6000),
)


def find_gpu(name: str) -> Gpu | None:
    """The GPU of a short name (`h200`) or of a device name as torch gives it (`NVIDIA H200`); None if it is unknown."""
    bare = name.removeprefix("NVIDIA ").removeprefix("AMD ").removeprefix("Tesla ")
    return next((gpu for gpu in GPUS if gpu.device == bare or gpu.short == name.lower()), None)
