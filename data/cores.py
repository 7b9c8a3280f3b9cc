"""Cores that this process may use."""

import os


def cores() -> int:
    """Number of cores that the affinity of this process leaves it; all where the system knows none, as macOS."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
