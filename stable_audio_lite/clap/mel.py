"""Log-mel features in torch, with the numbers that CLAP models were trained on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stable_audio_lite.audio.stft import stft

# The analysis of every published CLAP, whose audio tower takes 10 s.
SAMPLE_RATE = 48000
WINDOW = 1024
HOP = 480
MAX_FREQUENCY = 14000.0
CLIP_SAMPLES = 10 * SAMPLE_RATE
CLIP_FRAMES = CLIP_SAMPLES // HOP + 1


def log_mel(waveform: Tensor, mel_bins: int = 64, lowest: float = 0.0, fusion: bool = False) -> Tensor:
    """Log-mel spectrogram in dB of 48 kHz mono (..., T) -> (..., frames, mel_bins), frames = T // 480 + 1.

    `lowest` is where the filters begin, in Hz. Fusion models have another filter bank. Same numbers as
    transformers' `ClapFeatureExtractor`, whose filters begin at 0.
    """
    import torchaudio.functional

    scale = "htk" if fusion else "slaney"
    bank = torchaudio.functional.melscale_fbanks(
        WINDOW // 2 + 1, lowest, MAX_FREQUENCY, mel_bins, SAMPLE_RATE, None if fusion else "slaney", scale
    ).to(waveform.device)
    window = torch.hann_window(WINDOW, device=waveform.device)
    spectrum = stft(waveform.float(), window, HOP)
    power = spectrum.abs().square().transpose(-1, -2)  # ..., frames, bins
    return 10 * (power @ bank).clamp(min=1e-10).log10()


def repeat_pad(waveform: Tensor) -> Tensor:
    """Fill 10 s with whole repetitions of a shorter (T,) sound, then zeros, as CLAP's training did."""
    if len(waveform) >= CLIP_SAMPLES:
        return waveform
    if not len(waveform):
        raise ValueError("CLAP can't embed a sound of no samples")
    repeated = waveform.repeat(CLIP_SAMPLES // len(waveform))
    return F.pad(repeated, (0, CLIP_SAMPLES - len(repeated)))
