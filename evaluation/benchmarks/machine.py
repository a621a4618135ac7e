"""The machine that figures belong to, and the rate of its matrix products, by which they can be judged."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_ROWS, _ROWS_ACCELERATED = 2048, 8192  # of a matrix product that takes milliseconds, so that its launch doesn't count
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, cores, memory, device and versions, as plain values."""
    import psutil

    facts = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "features": [flag for flag in _FLAGS if flag in _flags()],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "device": str(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def matrix_product(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], Tensor], float]:
    """A square matrix product to take turns with, and its floating-point operations."""
    rows = _ROWS if device.type == "cpu" else _ROWS_ACCELERATED
    a, b = (torch.randn(rows, rows, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b, 2.0 * rows**3


def _processor() -> str:
    """Name of the processor."""
    lines = (line for line in _cpuinfo().splitlines() if line.startswith("model name"))
    return next(lines, f": {platform.processor() or platform.machine()}").split(":", 1)[1].strip()


def _flags() -> set[str]:
    return {word for line in _cpuinfo().splitlines() if line.startswith("flags") for word in line.split()}


def _cpuinfo() -> str:
    file = Path("/proc/cpuinfo")
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
