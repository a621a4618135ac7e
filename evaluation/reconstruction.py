"""Reconstruction by a VAE, beside codecs that people know, on the same files.

    python -m evaluation.reconstruction starter corpus/held_out --items 60
    python -m evaluation.reconstruction runs/vae/bundle music/ --html report.html --dac weights.pth

The first `--items` files of DATA, at most `--seconds` of each, go through the VAE (posterior mean) and through Opus and
MP3 by ffmpeg. STFT and mel distance are auraloss' with its defaults, so they compare with published tables (Evans et
al. 2024, arXiv 2402.04825, table 1); `evaluation.metrics.fidelity.Fidelity` says what the other columns mean.
"""

from __future__ import annotations

import argparse
import base64
import html
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass

import torch
from torch import Tensor

from evaluation.codecs import System, dac_codec, ffmpeg_codec
from evaluation.metrics.fidelity import OCTAVES, Fidelity, fidelity, mean_fidelity
from evaluation.output import print_result
from stable_audio_lite.audio.io import read_audio
from stable_audio_lite.codec import Codec
from stable_audio_lite.command import Parser, add_overwrite, check_outputs, file_path, guarded
from stable_audio_lite.data.manifest import Item, read_items
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import replacing
from stable_audio_lite.models.vae import Posterior

CODECS = "opus:32,opus:96,mp3:48,mp3:128"
DEAD = 0.01
"""A latent channel is dead where its posterior mean varies by less than this share of the posterior's noise."""

_SHORTEST = 2048  # samples: the distances' longest window
_COLUMNS = ("SI-SDR dB", "STFT", "mel", "mid dB", "side dB", "phase", "clicks/s", "level dB", "drift dB")


@dataclass(frozen=True, kw_only=True)
class PosteriorStatistics:
    """`mean`, `std` and `kl` (nats per frame) of each latent channel, and the numbers of those that are `dead`."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    kl: tuple[float, ...]
    dead: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Mean fidelity by system, "VAE" first, the VAE's latents, pictures by file, and why files were left out."""

    systems: dict[str, Fidelity]
    latents: PosteriorStatistics
    pictures: dict[str, dict[str, bytes]]
    left_out: list[str]
    files: int


def posterior_statistics(posteriors: Sequence[Posterior]) -> PosteriorStatistics:
    """Statistics over the frames of all (1, C, F) posteriors."""
    mean = torch.cat([p.mean[0] for p in posteriors], 1)
    variance = torch.cat([p.std[0] for p in posteriors], 1).square()
    kl = (mean.square() + variance - variance.log() - 1).mean(1) / 2
    dead = (mean.std(1) < DEAD * variance.mean(1).sqrt()).nonzero()[:, 0]
    means, deviations, divergences = (tuple(x.tolist()) for x in (mean.mean(1), mean.std(1), kl))
    return PosteriorStatistics(mean=means, std=deviations, kl=divergences, dead=tuple(dead.tolist()))


def reconstruct(
    codec: Codec, items: Sequence[Item], systems: dict[str, System], seconds: float, pictures: bool
) -> Reconstruction:
    """Measure the VAE and each system over the items.

    Raises:
        UserError: none of the items can be used.
    """
    from tqdm import tqdm

    rows: dict[str, list[Fidelity]] = {name: [] for name in ("VAE", *systems)}
    posteriors, drawn, left_out = [], {}, []
    for item in tqdm(items, unit="file"):
        try:
            audio = _read(item, codec.sample_rate, seconds)
        except UserError as error:
            left_out.append(str(error))
            continue
        with torch.inference_mode():
            posterior = codec.vae.encode_chunked(audio[None])
            output = codec.vae.decode_chunked(posterior.mean)[0, :, : audio.shape[1]].float()
        posteriors.append(posterior)
        if pictures:
            drawn[str(item.path)] = pictures_of(audio, output, codec.sample_rate)
        for name, found in {"VAE": output, **{name: system(audio) for name, system in systems.items()}}.items():
            rows[name].append(fidelity(found, audio, codec.sample_rate))
    if not posteriors:
        raise UserError(f"none of the {len(items)} files can be used; the first: {left_out[0]}")
    return Reconstruction(
        systems={name: mean_fidelity(own) for name, own in rows.items()},
        latents=posterior_statistics(posteriors),
        pictures=drawn,
        left_out=left_out,
        files=len(posteriors),
    )


def _read(item: Item, sample_rate: int, seconds: float) -> Tensor:
    audio = read_audio(item.path, sample_rate, 0.0, seconds)
    if audio.shape[1] < _SHORTEST or not bool(audio.any()):
        raise UserError(f"{item.path}: silent, or shorter than {_SHORTEST} samples")
    return audio


def reconstruction_table(found: Reconstruction) -> str:
    """A table with a line for each system."""
    lines = [f"{found.files} files", f"{'':12}" + "".join(f"{name:>10}" for name in _COLUMNS)]
    for system, row in found.systems.items():
        lines.append(f"{system:12}" + "".join(f"{value:10.3f}" for value in astuple(row)[:-1]))
    lines += ["", f"{'octave at Hz':12}" + "".join(f"{centre:10g}" for centre in OCTAVES)]
    for system, row in found.systems.items():
        lines.append(f"{system:12}" + "".join(f"{value:10.2f}" for value in row.octaves_db))
    std, kl, dead = found.latents.std, found.latents.kl, found.latents.dead
    lines.append(
        f"\nlatents: std {min(std):.3f} to {max(std):.3f}, KL {min(kl):.3f} to {max(kl):.3f} nats a frame by channel, "
        f"{sum(kl):.1f} in all; dead channels: {', '.join(map(str, dead)) or 'none'}"
    )
    return "\n".join([*lines, *(f"left out: {reason}" for reason in found.left_out)])


def pictures_of(target: Tensor, output: Tensor, sample_rate: int) -> dict[str, bytes]:
    """Spectrograms of input, output and difference of (2, T) signals, as WebP."""
    from stable_audio_lite.audio.plot import spectrogram_webp

    signals = {"in": target, "out": output, "difference": output - target}
    return {name: spectrogram_webp(signal, sample_rate, columns=400)[0] for name, signal in signals.items()}


def reconstruction_page(found: Reconstruction) -> str:
    """A page that needs no other file."""
    latents = found.latents
    rows = "".join(
        f"<tr><td>{c}<td>{m:.3f}<td>{s:.3f}<td>{k:.3f}"
        for c, (m, s, k) in enumerate(zip(latents.mean, latents.std, latents.kl, strict=True))
    )
    images = "".join(
        f"<h3>{html.escape(file)}</h3>"
        + "".join(
            f'{name} <img src="data:image/webp;base64,{base64.b64encode(webp).decode()}"> '
            for name, webp in drawn.items()
        )
        for file, drawn in found.pictures.items()
    )
    return (
        "<!doctype html><meta charset=utf-8><title>Reconstruction</title><h1>Reconstruction</h1>"
        f"<pre>{html.escape(reconstruction_table(found))}</pre>{images}<h2>Latent channels</h2>"
        f"<table><tr><th>channel<th>mean<th>std<th>KL{rows}</table>"
    )


def main() -> int:
    """Run the command; returns its exit status."""
    parser = Parser(description=__doc__)
    parser.add_argument("bundle", help="'starter', a bundle's folder or a hub id")
    parser.add_argument("data", help="a folder of audio, WebDataset shards or a Hugging Face data set")
    parser.add_argument("--items", type=int, default=60, help="files at most (default: 60)")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each file at most (default: 30)")
    parser.add_argument("--codecs", default=CODECS, help=f"KIND:KBITS,... or '' (default: {CODECS})")
    parser.add_argument("--dac", metavar="FILE", help="weights.pth of descript-audio-codec, to compare with")
    parser.add_argument("--html", type=file_path, metavar="FILE", help="write a page with a picture of each file")
    add_overwrite(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return guarded(lambda: _run(parser.parse_args()))


def _run(args: argparse.Namespace) -> None:
    if importlib.util.find_spec("auraloss") is None:
        raise UserError("the distances need auraloss; install it with: pip install 'stable-audio-lite[evaluate]'")
    if args.items < 1 or not args.seconds > 0:
        raise UserError(f"--items must be at least 1 and --seconds above 0, got {args.items} and {args.seconds:g}")
    check_outputs([args.html] if args.html else [], overwrite=args.overwrite)
    codec = Codec.from_pretrained(args.bundle, device="cpu", dtype="float32")
    systems = {name: ffmpeg_codec(name, codec.sample_rate) for name in args.codecs.split(",") if name}
    if args.dac:
        systems["DAC"] = dac_codec(args.dac, codec.sample_rate)
    items = read_items(args.data)[: args.items]
    found = reconstruct(codec, items, systems, args.seconds, pictures=args.html is not None)
    if args.html:
        with replacing(args.html) as temporary:
            temporary.write_text(reconstruction_page(found), encoding="utf-8")
    rows = {name: asdict(row) for name, row in found.systems.items()}
    whole = {"systems": rows, "latents": asdict(found.latents), "left_out": found.left_out}
    print_result(args.json, whole, reconstruction_table(found))


if __name__ == "__main__":
    sys.exit(main())
