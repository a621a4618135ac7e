"""Dereverberation by weighted prediction error (Nakatani et al. 2010); the only module that uses nara_wpe."""

from __future__ import annotations

import torch
from torch import Tensor


def wpe(x: Tensor, taps: int = 150, delay: int = 4) -> Tensor:
    """Subtract from each frequency the part that its own past predicts.

    The defaults are those of Saito et al. 2022 (arXiv 2211.04124), who estimate the sound's power once, from x.

    Args:
        x: (B, 2, F, T) real and imaginary parts of a spectrogram, as is the result.
        taps: past frames that predict; at most a third of T are used, since more would predict anything.
        delay: frames between a frame and the past that predicts it, so that a sound's own onset stays.

    Raises:
        ValueError: a setting is below 1.
    """
    if min(taps, delay) < 1:
        raise ValueError(f"taps and delay must be at least 1, got {taps} and {delay}")
    from nara_wpe.wpe import wpe as solve

    used = max(1, min(taps, x.shape[3] // 3))
    spectrum = torch.complex(x[:, 0], x[:, 1]).to(torch.complex128).cpu()
    rows = spectrum.flatten(0, 1)[:, None].numpy()  # B * F, 1 microphone, T
    audible = rows.any((1, 2))  # silent rows have no inverse
    rows = rows.copy()
    if audible.any():
        rows[audible] = solve(rows[audible], taps=used, delay=delay, iterations=1)
    dry = torch.from_numpy(rows).reshape(spectrum.shape)
    return torch.stack((dry.real, dry.imag), 1).to(x)
