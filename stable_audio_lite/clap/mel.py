"""Log-mel spectrograms in torch, with the parameters that CLAP models were trained with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stable_audio_lite.audio.stft import stft
from stable_audio_lite.clap.config import ClapConfig

# The analysis of every published CLAP, whose audio tower takes 10 s.
SAMPLE_RATE = 48000
_WINDOW = 1024
HOP = 480
MAX_FREQUENCY = 14000.0
CLIP_SAMPLES = 10 * SAMPLE_RATE
CLIP_FRAMES = CLIP_SAMPLES // HOP + 1


def log_mel(config: ClapConfig, waveform: Tensor) -> Tensor:
    """Log-mel spectrogram in dB of 48 kHz mono (..., T) -> (..., frames, mel_bins), frames = T // 480 + 1.

    Fusion models have another filter bank. With filters that begin at 0 Hz the result equals that of transformers'
    `ClapFeatureExtractor`.
    """
    import torchaudio.functional

    norm, scale = (None, "htk") if config.audio_fusion else ("slaney", "slaney")
    bank = torchaudio.functional.melscale_fbanks(
        _WINDOW // 2 + 1, config.mel_lowest, MAX_FREQUENCY, config.mel_bins, SAMPLE_RATE, norm, scale
    ).to(waveform.device)
    window = torch.hann_window(_WINDOW, device=waveform.device)
    spectrum = stft(waveform.float(), window, HOP)
    power = spectrum.abs().square().transpose(-1, -2)  # ..., frames, bins
    return 10 * (power @ bank).clamp(min=1e-10).log10()


def repeat_pad(waveform: Tensor) -> Tensor:
    """Fill 10 s with whole repetitions of a shorter (T,) sound, then zeros, as CLAP's training did.

    Raises:
        ValueError: T is 0.
    """
    if len(waveform) >= CLIP_SAMPLES:
        return waveform
    if not len(waveform):
        raise ValueError("CLAP can't embed a sound of no samples")
    repeated = waveform.repeat(CLIP_SAMPLES // len(waveform))
    return F.pad(repeated, (0, CLIP_SAMPLES - len(repeated)))


def mel_views(config: ClapConfig, mel: Tensor, starts: tuple[int, int, int] | None = None) -> Tensor:
    """A spectrogram of at least 10 s (frames, mel_bins) -> the audio tower's input (1 or 4, 1001, mel_bins).

    A fusion model takes the shrunk whole and the crops that begin at frames `starts`, by default at the start, middle
    and end. Another model takes the crop of the middle.
    """
    spare = len(mel) - CLIP_FRAMES
    first, middle, last = starts or (0, spare // 2, spare)
    if not config.audio_fusion:
        return mel[None, middle : middle + CLIP_FRAMES]
    shrunk = F.interpolate(mel[None, None], size=(CLIP_FRAMES, mel.shape[1]), mode="bilinear")[0, 0]
    return torch.stack([shrunk] + [mel[i : i + CLIP_FRAMES] for i in (first, middle, last)])
