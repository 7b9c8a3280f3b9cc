"""The layouts and sizes in configs/arch and configs/size: arch/named.py, which reads them without Hydra."""

from arch.named import CONFIGS, load_arch, load_size, names

__all__ = ["CONFIGS", "load_arch", "load_size", "names"]
