"""Choice of the device and of the floating type to compute in."""

from __future__ import annotations

import torch

from stable_audio_lite.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str) -> torch.device:
    """Find the device called `name`; "auto" is CUDA, else MPS, else the CPU.

    Raises:
        UserError: this machine or this torch has no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:120]
        raise UserError(f"device '{name}' can't be used here ({reason}); try auto or cpu") from error
    return device


def choose_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """Return `dtype` itself, or for None and "auto" the fastest that `device` multiplies in hardware.

    Raises:
        UserError: the name is unknown.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in (None, "auto"):
        if dtype not in DTYPES:
            raise UserError(f"unknown dtype '{dtype}'; choose auto or one of {', '.join(DTYPES)}")
        return DTYPES[str(dtype)]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.bfloat16
    return torch.float32
