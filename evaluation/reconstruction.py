"""What a VAE does to sound, beside codecs that a person knows, on the same files.

    python -m evaluation.reconstruction starter corpus/held_out --items 60
    python -m evaluation.reconstruction runs/vae/bundle music/ --html report.html --dac weights.pth

The first `--items` files of DATA, at most `--seconds` of each, go through the VAE (posterior mean) and through Opus and
MP3 by ffmpeg. STFT and mel distance are auraloss' with its defaults, so they compare with published tables (Evans et
al. 2024, arXiv 2402.04825, table 1); what the other columns mean is said at `Figures`.
"""

from __future__ import annotations

import argparse
import base64
import html
import importlib.util
import io
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.codecs import System, dac_codec, ffmpeg_codec
from stable_audio_lite.audio.io import read_audio
from stable_audio_lite.audio.stft import stft
from stable_audio_lite.codec import Codec
from stable_audio_lite.data.manifest import Item, read_items
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import replacing
from stable_audio_lite.models.vae import Posterior

CODECS = ("opus:32", "opus:96", "mp3:48", "mp3:128")
OCTAVES = (62.5, 125.0, 250.0, 500.0, 1000.0, 2000.0, 4000.0, 8000.0, 16000.0)
DEAD = 0.01
"""A latent channel is dead where its posterior mean varies by less than this share of the posterior's noise."""

_QUIET = 1e-7  # -70 dB: power, relative to the loudest, below which an octave's level is not compared
_SHORTEST = 2048  # samples: the distances' longest window


@dataclass(frozen=True, kw_only=True)
class Figures:
    """How far an output is from its input; small is good but for the first.

    Attributes:
        si_sdr_db: scale-invariant signal-to-distortion ratio (Le Roux et al. 2019), mean over both channels.
        stft: auraloss.freq.MultiResolutionSTFTLoss.
        mel: auraloss.freq.MelSTFTLoss.
        mid_error_db: power of the error of left + right, relative to the input's left + right.
        side_error_db: power of the error of left - right, relative to the input's left + right, for a mono file has no
            left - right.
        phase_error: mean error of the phase between the channels, in radians, of STFT cells weighted by their power.
        clicks: places a second at which the output jumps (its second difference is over 8 times its own size around)
            and the input does not.
        level_db: level of the output minus that of the input.
        drift_db: standard deviation of that difference over windows of 0.4 s.
        octaves_db: mean absolute difference of level per octave around `OCTAVES` and STFT frame.
    """

    si_sdr_db: float
    stft: float
    mel: float
    mid_error_db: float
    side_error_db: float
    phase_error: float
    clicks: float
    level_db: float
    drift_db: float
    octaves_db: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Latents:
    """What latents are like: `mean`, `std` and `kl` (nats per frame) of each channel, and which are `dead`."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    kl: tuple[float, ...]
    dead: tuple[int, ...]


def compare(output: Tensor, target: Tensor, sample_rate: int) -> Figures:
    """Figures of (2, T) audio."""
    stft, mel = _distances(sample_rate)
    mid, side = target.sum(0), target[0] - target[1]
    whole = mid.square().sum().clamp_min(1e-12)
    levels = [_levels(x, sample_rate) for x in (output, target)]
    loud = levels[1] > levels[1].max() - 60
    difference = (levels[0] - levels[1])[loud]
    return Figures(
        si_sdr_db=si_sdr(output, target),
        stft=float(stft(output[None], target[None])),
        mel=float(mel(output[None], target[None])),
        mid_error_db=_decibels((output.sum(0) - mid).square().sum() / whole),
        side_error_db=_decibels((output[0] - output[1] - side).square().sum() / whole),
        phase_error=phase_error(output, target),
        clicks=clicks(output, target, sample_rate),
        level_db=_decibels(output.square().sum() / target.square().sum().clamp_min(1e-12)),
        drift_db=float(difference.std(correction=0)),
        octaves_db=octave_errors(output, target, sample_rate),
    )


def si_sdr(output: Tensor, target: Tensor) -> float:
    """In dB, the mean over the channels of (2, T) signals without their means."""
    output, target = (x - x.mean(1, keepdim=True) for x in (output, target))
    scale = (output * target).sum(1, keepdim=True) / target.square().sum(1, keepdim=True).clamp_min(1e-12)
    wanted = scale * target
    ratio = wanted.square().sum(1) / (output - wanted).square().sum(1).clamp_min(1e-12)
    return float(10 * ratio.clamp_min(1e-12).log10().mean())


def phase_error(output: Tensor, target: Tensor) -> float:
    """Mean angle between the two products left * conj(right) of (2, T) signals, weighted by the target's power."""
    ours, theirs = (_stft(x)[0] * _stft(x)[1].conj() for x in (output, target))
    weight = theirs.abs()
    return float(((ours * theirs.conj()).angle().abs() * weight).sum() / weight.sum().clamp_min(1e-12))


def clicks(output: Tensor, target: Tensor, sample_rate: int) -> float:
    """Jumps a second in (2, T) `output` that `target` has not, of either channel."""
    ours, theirs = (_jumps(x) for x in (output, target))
    near = F.max_pool1d(theirs.float()[:, None], 65, stride=1, padding=32)[:, 0] > 0
    new = (ours & ~near).any(0)
    starts = new & ~F.pad(new, (64, 0)).unfold(0, 64, 1)[: len(new)].any(1)  # one for each stretch
    return float(starts.sum()) * sample_rate / output.shape[1]


def octave_errors(output: Tensor, target: Tensor, sample_rate: int) -> tuple[float, ...]:
    """Mean |difference| in dB of the level per octave and frame; frames whose level is under -70 dB are left out."""
    powers = [_stft(x).abs().square().sum(0) for x in (output, target)]
    frequencies = torch.linspace(0, sample_rate / 2, powers[0].shape[0])
    errors = []
    for centre in OCTAVES:
        band = (frequencies >= centre / math.sqrt(2)) & (frequencies < centre * math.sqrt(2))
        ours, theirs = (p[band].sum(0) for p in powers)
        floor = _QUIET * float(powers[1].sum(0).max())
        heard = theirs > floor
        difference = 10 * ((ours + floor) / (theirs + floor)).log10().abs()
        errors.append(float(difference[heard].mean()) if bool(heard.any()) else 0.0)
    return tuple(errors)


def describe_latents(posteriors: Sequence[Posterior]) -> Latents:
    """Statistics over the frames of all (1, C, F) posteriors."""
    mean = torch.cat([p.mean[0] for p in posteriors], 1)
    variance = torch.cat([p.std[0] for p in posteriors], 1).square()
    kl = (mean.square() + variance - variance.log() - 1).mean(1) / 2
    dead = (mean.std(1) < DEAD * variance.mean(1).sqrt()).nonzero()[:, 0]
    columns = (mean.mean(1), mean.std(1), kl)
    return Latents(
        **dict(zip(("mean", "std", "kl"), (tuple(c.tolist()) for c in columns), strict=True)), dead=tuple(dead.tolist())
    )


def average(rows: Sequence[Figures]) -> Figures:
    """The mean of each figure."""
    values = {f.name: np.mean([getattr(row, f.name) for row in rows], axis=0) for f in fields(Figures)}
    return Figures(**{k: tuple(v.tolist()) if v.ndim else float(v) for k, v in values.items()})


def as_text(results: dict[str, Figures], latents: Latents, count: int) -> str:
    """A table with a line for each system."""
    names = ("SI-SDR dB", "STFT", "mel", "mid dB", "side dB", "phase", "clicks/s", "level dB", "drift dB")
    lines = [f"{count} files", f"{'':12}" + "".join(f"{name:>10}" for name in names)]
    for system, row in results.items():
        values = [getattr(row, f.name) for f in fields(Figures)][:-1]
        lines.append(f"{system:12}" + "".join(f"{value:10.3f}" for value in values))
    lines += ["", f"{'octave at Hz':12}" + "".join(f"{centre:10g}" for centre in OCTAVES)]
    lines += [f"{system:12}" + "".join(f"{value:10.2f}" for value in row.octaves_db) for system, row in results.items()]
    std, kl = latents.std, latents.kl
    lines.append(
        f"\nlatents: std {min(std):.3f} to {max(std):.3f}, KL {min(kl):.3f} to {max(kl):.3f} nats a frame by channel, "
        f"{sum(kl):.1f} in all; dead channels: {', '.join(map(str, latents.dead)) or 'none'}"
    )
    return "\n".join(lines)


def picture(target: Tensor, output: Tensor, sample_rate: int) -> bytes:
    """PNG of the spectrograms of input, output and difference, the mean of both channels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from stable_audio_lite.audio.plot import spectrogram_db

    signals = torch.stack((target, output, output - target)).mean(1)
    decibels, frequencies = spectrogram_db(signals, sample_rate, columns=500)
    figure = Figure(figsize=(13, 3), layout="constrained")
    FigureCanvasAgg(figure)
    seconds = np.linspace(0, target.shape[1] / sample_rate, decibels.shape[2])
    for axis, levels, name in zip(
        figure.subplots(1, 3, sharey=True), decibels, ("in", "out", "difference"), strict=True
    ):
        axis.pcolormesh(seconds, frequencies, levels, vmin=-90, vmax=0, cmap="magma", rasterized=True)
        axis.set(yscale="log", title=name, xlabel="seconds")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=70)
    return buffer.getvalue()


def as_html(text: str, latents: Latents, pictures: Sequence[tuple[str, bytes]]) -> str:
    """A page that needs no other file."""
    rows = "".join(
        f"<tr><td>{c}<td>{m:.3f}<td>{s:.3f}<td>{k:.3f}"
        for c, (m, s, k) in enumerate(zip(latents.mean, latents.std, latents.kl, strict=True))
    )
    images = "".join(
        f'<h3>{html.escape(name)}</h3><img src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for name, png in pictures
    )
    return (
        "<!doctype html><meta charset=utf-8><title>Reconstruction</title><h1>Reconstruction</h1>"
        f"<pre>{html.escape(text)}</pre>{images}<h2>Latent channels</h2>"
        f"<table><tr><th>channel<th>mean<th>std<th>KL{rows}</table>"
    )


def evaluate(
    codec: Codec,
    items: Sequence[Item],
    systems: dict[str, System],
    seconds: float,
    pictures: list[tuple[str, bytes]] | None,
) -> tuple[dict[str, Figures], Latents, list[str]]:
    """Mean figures of the VAE and of each system over the items, and why some were left out; fills a `pictures` list.

    Raises:
        UserError: none of the items can be used.
    """
    from tqdm import tqdm

    rows: dict[str, list[Figures]] = {name: [] for name in ("VAE", *systems)}
    posteriors, left_out = [], []
    for item in tqdm(items, unit="file"):
        try:
            audio = read_audio(item.path, codec.sample_rate, 0.0, seconds)
        except UserError as error:
            left_out.append(str(error))
            continue
        if audio.shape[1] < _SHORTEST or not bool(audio.any()):
            left_out.append(f"{item.path}: silent, or shorter than {_SHORTEST} samples")
            continue
        with torch.inference_mode():
            posterior = codec.vae.encode_chunked(audio[None])
            output = codec.vae.decode_chunked(posterior.mean)[0, :, : audio.shape[1]].float()
        posteriors.append(posterior)
        rows["VAE"].append(compare(output, audio, codec.sample_rate))
        if pictures is not None:
            pictures.append((str(item.path), picture(audio, output, codec.sample_rate)))
        for name, system in systems.items():
            rows[name].append(compare(system(audio), audio, codec.sample_rate))
    if not posteriors:
        raise UserError(f"none of the {len(items)} files can be used; the first: {left_out[0]}")
    return {name: average(figures) for name, figures in rows.items()}, describe_latents(posteriors), left_out


@lru_cache(maxsize=1)
def _distances(sample_rate: int) -> tuple[nn.Module, nn.Module]:
    from auraloss.freq import MelSTFTLoss, MultiResolutionSTFTLoss

    return MultiResolutionSTFTLoss(), MelSTFTLoss(sample_rate)


def _stft(audio: Tensor, window: int = 2048) -> Tensor:
    return stft(F.pad(audio, (0, window)), torch.hann_window(window), window // 4)


def _jumps(audio: Tensor) -> Tensor:
    bend = F.pad(audio.diff(n=2, dim=1).abs(), (1, 1))
    around = F.avg_pool1d(bend.square()[:, None], 1025, 1, 512, count_include_pad=False)[:, 0].sqrt()
    return bend > 8 * around.clamp_min(1e-4)


def _levels(audio: Tensor, sample_rate: int) -> Tensor:
    window = min(round(0.4 * sample_rate), audio.shape[1])
    power = audio.square().mean(0).unfold(0, window, window).mean(1)
    return 10 * power.clamp_min(1e-12).log10()


def _decibels(ratio: Tensor) -> float:
    return float(10 * ratio.clamp_min(1e-12).log10())


def main() -> None:
    """Run the command; mistakes end in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="'starter', a bundle's folder or a hub id")
    parser.add_argument("data", help="a folder of audio, WebDataset shards or a Hugging Face data set")
    parser.add_argument("--items", type=int, default=60, help="files at most (default: 60)")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each file at most (default: 30)")
    parser.add_argument(
        "--codecs", default=",".join(CODECS), help=f"KIND:KBITS,... or '' (default: {','.join(CODECS)})"
    )
    parser.add_argument("--dac", metavar="FILE", help="weights.pth of descript-audio-codec, to compare with")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with a picture of each file")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    try:
        if importlib.util.find_spec("auraloss") is None:
            raise UserError("the distances need auraloss; install it with: pip install 'stable-audio-lite[evaluate]'")
        codec = Codec.from_pretrained(args.bundle, device="cpu", dtype="float32")
        systems = {name: ffmpeg_codec(name, codec.sample_rate) for name in args.codecs.split(",") if name}
        if args.dac:
            systems["DAC"] = dac_codec(args.dac, codec.sample_rate)
        items = read_items(args.data)[: args.items]
        pictures: list[tuple[str, bytes]] | None = [] if args.html else None
        results, latents, left_out = evaluate(codec, items, systems, args.seconds, pictures)
        text = "\n".join([as_text(results, latents, len(items) - len(left_out)), *(f"left out: {t}" for t in left_out)])
        if args.html:
            with replacing(args.html) as temporary:
                temporary.write_text(as_html(text, latents, pictures or []), encoding="utf-8")
    except UserError as error:
        sys.exit(f"error: {error}")
    rows = {name: asdict(row) for name, row in results.items()}
    whole = {"systems": rows, "latents": asdict(latents), "left_out": left_out}
    print(json.dumps(whole, indent=2) if args.json else text)


if __name__ == "__main__":
    main()
