"""Likeness to the music that a model was trained on, beside that of the model that it was trained from.

    python -m evaluation.likeness mine/bundle my_music --items 20

Both models play captions of the music, from the same seeds. Each sound's likeness is its mean cosine to all recordings,
in the space of the trained model's own CLAP; theirs to one another is what could be reached. Intervals are of 95 %, by
bootstrap over the captions.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.metrics.bootstrap import interval
from evaluation.output import print_result
from stable_audio_lite.audio.io import read_audio
from stable_audio_lite.clap.checkpoints import load_clap
from stable_audio_lite.clap.model import Clap
from stable_audio_lite.command import Parser, guarded
from stable_audio_lite.data.item import Item
from stable_audio_lite.data.manifest import read_items
from stable_audio_lite.errors import UserError
from stable_audio_lite.pipeline import StableAudio


def likeness(sounds: Tensor, recordings: Tensor, *, same: bool = False) -> Tensor:
    """Mean cosines (N,) of embeddings (N, D) to those of recordings (M, D); with `same`, of each to all others.

    Raises:
        ValueError: there is nothing to compare with.
    """
    if sounds.ndim != 2 or recordings.ndim != 2 or len(recordings) < 1 + same:
        raise ValueError(f"expected (N, D) and (M, D), got {tuple(sounds.shape)} and {tuple(recordings.shape)}")
    cosines = F.normalize(sounds.double(), dim=1) @ F.normalize(recordings.double(), dim=1).T
    if same:
        return (cosines.sum(1) - cosines.diagonal()) / (len(recordings) - 1)
    return cosines.mean(1)


def embed_generated(
    model: StableAudio, clap: Clap, captions: Sequence[str], seconds: float, seed: int, steps: int | None = None
) -> Tensor:
    """Generate a sound for each caption, the seeds counted from `seed`, and embed them (N, D)."""
    from tqdm import tqdm

    rows = []
    for number, caption in enumerate(tqdm(captions, unit="sound", leave=False)):
        made = model.generate(caption, seconds=seconds, seed=seed + number, steps=steps)
        rows.append(clap.embed_audio(made.audio, model.sample_rate))
    return torch.cat(rows).cpu()


def embed_recordings(items: Sequence[Item], clap: Clap, sample_rate: int, seconds: float) -> Tensor:
    """Embed the first seconds of recordings (M, D)."""
    rows = [clap.embed_audio(read_audio(i.path, sample_rate, 0.0, seconds)[None], sample_rate) for i in items]
    return torch.cat(rows).cpu()


def likeness_table(likenesses: dict[str, list[float]], more: list[float]) -> str:
    """A line for each kind of sound, and one for how much `more` the trained model's are like the recordings."""
    lines = [f"{'mean cosine to the recordings':32}{'n':>4}  (95 %)"]
    for name, values in (likenesses | {"trained above untrained": more}).items():
        low, high = interval(values)
        lines.append(f"{name:32}{len(values):4}  {sum(values) / len(values):.3f} ({low:.3f} to {high:.3f})")
    return "\n".join(lines)


def main() -> int:
    """Run the command; returns its exit status."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("model", metavar="BUNDLE", help="the trained bundle")
    add("data", metavar="FOLDER", help="the captioned music that it was trained on")
    add("--untrained", metavar="BUNDLE", default="starter", help="what it was trained from (default: starter)")
    add("--items", type=int, default=20, help="sounds of each model; captions are taken in turn (default: 20)")
    add("--seconds", type=float, help="length of the sounds, and of what is heard of recordings (default: the window)")
    add("--steps", type=int, help="sampling steps (default: the model's own)")
    add("--seed", type=int, default=0)
    add("--device", default="auto")
    add("--json", action="store_true", help="print the likeness of each sound as JSON instead of a table")
    return guarded(lambda: _run(parser.parse_args()))


def _run(args: argparse.Namespace) -> None:
    if args.items < 2:
        raise UserError(f"--items must be at least 2, got {args.items}")
    items = read_items(args.data)
    captions = [item.captions[0] for item in items if item.captions]
    if not captions or len(items) < 2:
        raise UserError(f"{args.data}: at least two recordings and a caption are needed")
    prompts = [captions[number % len(captions)] for number in range(args.items)]
    models = {name: StableAudio.from_pretrained(name, device=args.device) for name in (args.model, args.untrained)}
    trained = models[args.model]
    seconds = args.seconds or trained.window_seconds
    clap = load_clap(args.model).to(trained.device)
    recordings = embed_recordings(items, clap, trained.sample_rate, seconds)
    found = {
        name: likeness(embed_generated(model, clap, prompts, seconds, args.seed, args.steps), recordings).tolist()
        for name, model in models.items()
    }
    more = [one - other for one, other in zip(found[args.model], found[args.untrained], strict=True)]
    found["recordings to each other"] = likeness(recordings, recordings, same=True).tolist()
    print_result(args.json, found, likeness_table(found, more))


if __name__ == "__main__":
    sys.exit(main())
