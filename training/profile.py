"""The time of a training step by operation, and the rate of this machine's matrix products for comparison."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_MATRIX = 2048
_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The time of one step by operation.

    Attributes:
        shares: operations by torch's names, each with its own share of the time, the largest first.
        matrix_rate: FLOP/s of a matrix product of 2048 cubed in the type that the step computes in.
    """

    shares: tuple[tuple[str, float], ...]
    matrix_rate: float

    def as_text(self) -> str:
        """One line for the rate of matrix products, and one for each operation."""
        lines = [f"a matrix product of {_MATRIX} cubed reaches {self.matrix_rate / 1e9:.0f} GFLOP/s"]
        lines += [f"{share:6.1%}  {name}" for name, share in self.shares[:_SHOWN]]
        return "\n".join([*lines, f"{sum(share for _, share in self.shares[_SHOWN:]):6.1%}  all others"])


def profile(step: Callable[[], object], device: torch.device, precision: str) -> Profile:
    """Profile one call of `step`, whose precision is as in `RunConfig`, but not "auto"."""
    from torch.profiler import ProfilerActivity

    cuda = device.type == "cuda"
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        step()
        if cuda:
            torch.cuda.synchronize(device)
    times = {e.key: e.self_device_time_total if cuda else e.self_cpu_time_total for e in profiler.key_averages()}
    total = sum(times.values()) or 1.0
    shares = sorted(((name, spent / total) for name, spent in times.items()), key=lambda row: -row[1])
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return Profile(shares=tuple(shares), matrix_rate=_matrix_rate(device, dtype))


def _matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    a, b = (torch.randn(_MATRIX, _MATRIX, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        begun = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begun)
    return 2 * _MATRIX**3 / best
