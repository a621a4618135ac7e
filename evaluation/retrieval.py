"""Recall of a CLAP among held-out pieces: the sound of a text, and the text of a sound.

    python -m evaluation.retrieval starter corpus/held_out --items 500

Each piece's first caption is looked for among all sounds, and each sound among all captions (Wu et al. 2023, section
4.2). Chance finds 10 of 500 in 2 % of cases. Beside them the mean cosine between the embeddings of different captions:
near 1, a text encoder tells nothing apart.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from evaluation.output import print_result
from stable_audio_lite.audio.io import read_audio
from stable_audio_lite.clap.checkpoints import load_clap
from stable_audio_lite.clap.mel import SAMPLE_RATE
from stable_audio_lite.clap.model import Clap, retrieval
from stable_audio_lite.command import Parser, file_path, guarded
from stable_audio_lite.data.manifest import Item, read_items
from stable_audio_lite.doctor import mean_pairwise_cosine
from stable_audio_lite.errors import UserError


def clap_recall(clap: Clap, items: Sequence[Item]) -> dict[str, float]:
    """Recall at 1 and 10 in percent, both ways, and "texts/cosine"."""
    from tqdm import tqdm

    sounds = (read_audio(item.path, SAMPLE_RATE)[None] for item in tqdm(items, unit="piece"))
    audio = torch.cat([clap.embed_audio(sound, SAMPLE_RATE) for sound in sounds])
    text = torch.cat([clap.embed_text([item.captions[0]]) for item in items])
    return retrieval(text, audio) | {"texts/cosine": mean_pairwise_cosine(text)}


def main() -> int:
    """Run the command; returns its exit status."""
    parser = Parser(description=__doc__)
    parser.add_argument("bundle", help="a shipped model, a bundle's folder or a hub id, with both CLAP towers")
    parser.add_argument("data", type=file_path, help="a folder of captioned audio")
    parser.add_argument("--items", type=int, default=500, help="pieces at most (default: 500)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return guarded(lambda: _run(parser.parse_args()))


def _run(args: argparse.Namespace) -> None:
    clap = load_clap(args.bundle)
    items = [item for item in read_items(args.data) if item.captions][: max(args.items, 0)]
    if len(items) < 2:
        raise UserError(f"{args.data}: {len(items)} items with captions; two are needed at least")
    recalls = clap_recall(clap, items)
    lines = [f"{len(items)} pieces"]
    for name, value in recalls.items():
        lines.append(f"{name:22}{value:.3f}" if name == "texts/cosine" else f"{name:22}{value:.1f} %")
    print_result(args.json, {"items": len(items), **recalls}, "\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
