"""Codecs to compare a VAE with: Opus and MP3 by ffmpeg, and descript-audio-codec.

Each is a function from (2, T) audio to its coded version, aligned and of the same length.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from stable_audio_lite.audio.io import resample
from stable_audio_lite.errors import UserError
from stable_audio_lite.models.dac import read_dac

System = Callable[[Tensor], Tensor]

_LONGEST_DELAY = 4096  # samples that a codec may add at the beginning


def ffmpeg_codec(name: str, sample_rate: int) -> System:
    """A codec given as KIND:KBITS, for instance "opus:96", through ffmpeg.

    Raises:
        UserError: the name is none, or ffmpeg is not installed.
    """
    kind, _, rate = name.partition(":")
    encoders = {"opus": ("libopus", ".opus", 48000), "mp3": ("libmp3lame", ".mp3", 44100)}
    if kind not in encoders or not rate.isdigit():
        raise UserError(f"{name}: no codec; give opus:KBITS or mp3:KBITS")
    if shutil.which("ffmpeg") is None:
        raise UserError("codecs need ffmpeg (Debian, Ubuntu: apt-get install ffmpeg), or leave them out with --codecs")
    encoder, suffix, own_rate = encoders[kind]

    def run(audio: Tensor) -> Tensor:
        import soundfile

        with tempfile.TemporaryDirectory() as folder:
            plain, packed, again = (str(Path(folder) / n) for n in ("in.wav", f"packed{suffix}", "out.wav"))
            soundfile.write(plain, resample(audio.numpy(), sample_rate, own_rate).T, own_rate, subtype="FLOAT")
            for command in (
                ["-i", plain, "-c:a", encoder, "-b:a", f"{rate}k", packed],
                ["-i", packed, "-c:a", "pcm_f32le", "-ar", str(own_rate), again],
            ):
                done = subprocess.run(["ffmpeg", "-y", "-loglevel", "error", *command], capture_output=True, text=True)
                if done.returncode:
                    raise UserError(f"{name}: ffmpeg failed ({' '.join(done.stderr.split())[:200]})")
            samples = soundfile.read(again, dtype="float32", always_2d=True)[0].T
        return align(torch.from_numpy(resample(samples, own_rate, sample_rate)), audio)

    return run


def dac_codec(path: str, sample_rate: int) -> System:
    """descript-audio-codec with the weights of a `weights.pth`; each channel by itself.

    Raises:
        UserError: the file is missing, damaged or for another sample rate.
    """
    import dac

    weights = read_dac(path)
    try:
        model = dac.DAC(**weights.shape).eval()
        model.load_state_dict(weights.state)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: no complete DAC, with quantizer and its shape ({str(error)[:120]})") from error
    if model.sample_rate != sample_rate:
        raise UserError(f"{path}: for {model.sample_rate} Hz, the VAE is for {sample_rate} Hz")

    def run(audio: Tensor) -> Tensor:
        with torch.inference_mode():
            return align(model(model.preprocess(audio[:, None], sample_rate))["audio"][:, 0], audio)

    return run


def align(output: Tensor, target: Tensor) -> Tensor:
    """`output` moved by the delay at which it is most like `target`, and brought to its length; both (2, T)."""
    n = 1 << (output.shape[1] + target.shape[1]).bit_length()
    product = torch.fft.rfft(output.sum(0), n) * torch.fft.rfft(target.sum(0), n).conj()
    correlation = torch.fft.irfft(product, n)
    delays = torch.cat((correlation[: _LONGEST_DELAY + 1], correlation[-_LONGEST_DELAY:]))
    best = int(delays.argmax())
    delay = best if best <= _LONGEST_DELAY else best - len(delays)
    return F.pad(output, (-delay, target.shape[1] - output.shape[1] + delay))  # negative padding cuts
