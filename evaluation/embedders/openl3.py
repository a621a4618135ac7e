"""OpenL3 (Cramer et al. 2019, "Look, Listen, and Learn More: Design Choices for Deep Audio Embeddings"), mel256.

The front end is that of openl3 0.4.2 with kapre 0.3.7, by which stable-audio-metrics' published values were made: a
Slaney mel scale over magnitudes, frames that begin at the window's start. openl3 0.3 and torchopenl3 have another (an
HTK scale over powers, centred frames), so their embeddings differ; the weights are the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.embedders.streams import TargetLevel, batches, overlapping_windows, stereo_at
from evaluation.embedders.weights import Published, fill_network
from stable_audio_lite.audio.io import AudioSource
from stable_audio_lite.audio.stft import stft
from stable_audio_lite.errors import UserError
from stable_audio_lite.weights import read_weights, state_hash

OPENL3_WEIGHTS = {
    content: Published(
        file=f"torchopenl3_mel256_{content}_512.pth.tar",
        address=f"https://github.com/torchopenl3/torchopenl3-models/raw/master/torchopenl3_mel256_{content}_512.pth.tar",
        option="--openl3",
    )
    for content in ("music", "env")
}
_SAMPLE_RATE, _EVALUATION_RATE = 48000, 44100
_WINDOW, _HOP = 48000, 24000
_FFT, _FRAME_HOP, _MELS = 2048, 242, 256
_FRAMES = -(-_WINDOW // _FRAME_HOP)
_LOWEST, _RANGE = 1e-10, 80.0  # of the magnitude, and dB below the window's loudest
_POOLED = (1, 3, 5)  # convolutions after which time and frequency are halved


def mel_spectrogram(audio: Tensor) -> Tensor:
    """Windows (B, 48000) at 48 kHz -> dB below the loudest of each (B, 256, 199), at most 80."""
    import torchaudio.functional

    bank = torchaudio.functional.melscale_fbanks(
        _FFT // 2 + 1, 0.0, _SAMPLE_RATE / 2, _MELS, _SAMPLE_RATE, "slaney", "slaney"
    ).to(audio.device)
    # A frame begins at every hop within the window; what lies beyond it is silence.
    padded = F.pad(audio.float(), (0, (_FRAMES - 1) * _FRAME_HOP + _FFT - audio.shape[1]))
    window = torch.hann_window(_FFT, device=audio.device)
    spectrum = stft(padded, window, _FRAME_HOP, centred=False)
    decibels = 10 * (spectrum.abs().transpose(1, 2) @ bank).transpose(1, 2).clamp_min(_LOWEST).log10()
    return (decibels - decibels.amax((1, 2), keepdim=True)).clamp_min(-_RANGE)


class OpenL3(nn.Module):
    """Spectrograms (B, 256, 199) -> embeddings (B, last of `widths`); eight convolutions of these widths."""

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        channels = [1, *widths]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in pairwise(channels))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width, eps=1e-3) for width in channels[:-1])

    def forward(self, spectrogram: Tensor) -> Tensor:
        x = self.norms[0](spectrogram[:, None])
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms[1:], strict=False)):
            x = F.relu(norm(conv(x)))
            if index in _POOLED:
                x = F.max_pool2d(x, 2)
        return self.convs[-1](x).amax((2, 3))


class OpenL3Embedder:
    """512 features of each channel for a window of a second at every half; `network` is in its place."""

    name = "openl3"
    unit = "windows"

    def __init__(self, network: OpenL3, level: TargetLevel, batch: int):
        self.network, self.level, self.batch = network.eval(), level, batch
        self.settings: dict[str, Any] = {
            "weights": state_hash(network.state_dict())[:12],
            "front_end": "openl3 0.4.2, mel256",
            "sample_rate": f"{_EVALUATION_RATE}, {_SAMPLE_RATE}",
            "channels": "left and right concatenated",
            "window": "1 s every 0.5 s, first centred at 0",
            "level": level.of("file"),
        }

    @torch.inference_mode()
    def embed(self, source: AudioSource) -> dict[str, Tensor]:
        """ "embedding" (windows, 1024) of a file."""
        device = next(self.network.parameters()).device
        audio = stereo_at(source, (_EVALUATION_RATE, _SAMPLE_RATE), self.level)
        # The first sample lies in the middle of the first window.
        parts = overlapping_windows(audio, _WINDOW, _HOP, 2, front=_WINDOW // 2)
        found = []
        for batch in batches(parts, self.batch):
            both = self.network(mel_spectrogram(batch.to(device).flatten(0, 1)))
            found.append(both.unflatten(0, (-1, 2)).flatten(1).cpu())
        return {"embedding": torch.cat(found)}


def load_openl3(path: Path) -> OpenL3:
    """Read a `.pth.tar` of torchopenl3, or the same tensors as safetensors; the widths are read off them.

    Raises:
        UserError: the file is damaged or no such network.
    """
    state = {_our_name(k): v for k, v in read_weights(path).items() if not k.startswith("speclayer.")}
    convs = [state.get(f"convs.{index}.weight") for index in range(8)]
    if any(weight is None or weight.ndim != 4 for weight in convs):
        raise UserError(f"{path}: no OpenL3; fetch {OPENL3_WEIGHTS['music'].address}")
    network = OpenL3([len(weight) for weight in convs if weight is not None])
    fill_network(network, state, path, "OpenL3")
    return network


def _our_name(name: str) -> str:
    """`conv2d_1.weight` -> `convs.0.weight`, `batch_normalization_1.bias` -> `norms.0.bias`."""
    name = name.replace("audio_embedding_layer", "conv2d_8")
    match = re.fullmatch(r"(conv2d|batch_normalization)_(\d)\.(\w+)", name)
    if match is None:
        return name
    return f"{'convs' if match[1] == 'conv2d' else 'norms'}.{int(match[2]) - 1}.{match[3]}"
