"""Hears instruments, families, drums and style in whole pieces, and has heard only rendered corpus audio.

    python -m evaluation.tagger train corpus/ -o tagger/     # corpus/train; prints how it does on corpus/held_out
    python -m evaluation.tagger train corpus/ more/ -o tagger/ --steps 4000    # hears better; more/train too
    python -m evaluation.tagger test tagger/ corpus/

The network and augmentations of `evaluation.hearing`, trained on every piece of the corpus: several
instruments may play at once, each crop is labelled with all that play in its piece.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.hearing import (
    HearingConfig,
    Trunk,
    all_crops,
    augment,
    load_listener,
    mel_power,
    normalise,
    random_crop,
    save_listener,
)
from stable_audio_lite.audio.io import read_audio, resample
from stable_audio_lite.config import load_config
from stable_audio_lite.data.manifest import Item, read_items
from stable_audio_lite.errors import UserError

CONFIG = "tagger.yaml"


@dataclass(frozen=True, kw_only=True)
class TaggerConfig(HearingConfig):
    """What the tagger knows besides instruments and how it hears: the `styles`."""

    styles: tuple[str, ...]

    @property
    def family_names(self) -> tuple[str, ...]:
        """Each family once, sorted."""
        return tuple(sorted(set(self.families)))


@dataclass(frozen=True, kw_only=True)
class Tags:
    """What is heard in one sound: probabilities by name, that drums play, and the most likely style."""

    instruments: dict[str, float]
    families: dict[str, float]
    drums: float
    style: str


class Tagger(Trunk):
    """Normalised log-mel crops (B, mels, frames) -> logits (B, instruments + families + 1 + styles)."""

    def __init__(self, config: TaggerConfig):
        super().__init__(config)
        self.config = config
        self.sizes = [len(config.instruments), len(config.family_names), 1, len(config.styles)]
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(self.features, sum(self.sizes)))

    def forward(self, crops: Tensor) -> Tensor:
        return self.head(super().forward(crops))

    @torch.inference_mode()
    def hear(self, audio: Tensor, sample_rate: int) -> Tags:
        """What plays in (channels, T) audio at `sample_rate` Hz; full scale is 1.

        Raises:
            UserError: the audio is silent.
        """
        mono = resample(audio.float().mean(0, keepdim=True).numpy(), sample_rate, self.config.sample_rate)
        return self.hear_power(mel_power(torch.from_numpy(mono[0]), self.config))

    @torch.inference_mode()
    def hear_power(self, power: Tensor) -> Tags:
        """The same of a mel power spectrogram (mels, frames)."""
        self.eval()
        logits = self(normalise(all_crops(power, self.config.frames))).mean(0)
        instruments, families, drums, styles = logits.split(self.sizes)
        return Tags(
            instruments=dict(zip(self.config.instruments, instruments.sigmoid().tolist(), strict=True)),
            families=dict(zip(self.config.family_names, families.sigmoid().tolist(), strict=True)),
            drums=float(drums.sigmoid()),
            style=self.config.styles[int(styles.argmax())],
        )


@dataclass(frozen=True)
class Example:
    """One piece: mel power (mels, frames) and the targets of every logit but the styles', of which one is right."""

    power: Tensor
    tags: Tensor
    style: int


def config_for(items: Sequence[Item]) -> TaggerConfig:
    """A tagger for all that `items` hold.

    Raises:
        UserError: they are not of a corpus, whose metadata say what plays.
    """
    wanted = {"instruments", "families", "drums", "style"}
    if not items or any(lacking := wanted - item.metadata.keys() for item in items):
        raise UserError(f"no corpus: its metadata say nothing of {', '.join(sorted(lacking)) if items else 'anything'}")
    pairs = (zip(i.metadata["instruments"], i.metadata["families"], strict=True) for i in items)
    family_of = dict(sorted({pair for own in pairs for pair in own}))
    styles = tuple(sorted({item.metadata["style"] for item in items}))
    return TaggerConfig(instruments=tuple(family_of), families=tuple(family_of.values()), styles=styles)


def load_example(item: Item, config: TaggerConfig) -> Example:
    """Spectrogram and targets of one piece."""
    truth = item.metadata
    tags = [name in truth["instruments"] for name in config.instruments]
    tags += [name in truth["families"] for name in config.family_names] + [truth["drums"]]
    power = mel_power(read_audio(item.path, config.sample_rate).mean(0), config)
    return Example(power, torch.tensor(tags, dtype=torch.float32), config.styles.index(truth["style"]))


def train(
    examples: Sequence[Example], config: TaggerConfig, *, steps: int = 1500, batch: int = 48, seed: int = 0
) -> Tagger:
    """Train a tagger; pieces are drawn equally often."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    tagger = Tagger(config).train()
    optimizer = torch.optim.AdamW(tagger.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    tags, styles = torch.stack([e.tags for e in examples]), torch.tensor([e.style for e in examples])
    for _ in range(steps):
        chosen = torch.randint(len(examples), (batch,), generator=generator)
        crops = torch.stack([random_crop([examples[i].power], config.frames, generator) for i in chosen.tolist()])
        logits = tagger(normalise(augment(crops, generator)))
        count = tags.shape[1]
        loss = F.binary_cross_entropy_with_logits(logits[:, :count], tags[chosen]) * 10
        loss = loss + F.cross_entropy(logits[:, count:], styles[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return tagger.eval()


def train_on_corpus(*corpora: Path, steps: int = 1500, seed: int = 0) -> Tagger:
    """Train on what the folders `train` of `corpora` hold together.

    Raises:
        UserError: a folder is no corpus.
    """
    items = [item for corpus in corpora for item in read_items(corpus / "train")]
    config = config_for(items)
    return train([load_example(item, config) for item in items], config, steps=steps, seed=seed)


def save_tagger(tagger: Tagger, folder: Path) -> None:
    """Write `tagger.yaml` and `tagger.safetensors` into `folder`."""
    save_listener(tagger, tagger.config, folder / CONFIG)


def load_tagger(folder: Path) -> Tagger:
    """Read back what `save_tagger` wrote.

    Raises:
        UserError: a file is missing or the weights don't fit the config.
    """
    tagger = Tagger(load_config(folder / CONFIG, TaggerConfig))
    load_listener(tagger, folder / CONFIG)
    return tagger.eval()


def share_heard(probabilities: dict[str, float], named: Sequence[str]) -> float:
    """Of k names that are right, the share among the k that are heard most clearly."""
    right = set(named)
    heard = sorted(probabilities, key=lambda name: -probabilities[name])[: len(right)]
    return len(right & set(heard)) / len(right)


@dataclass(frozen=True)
class Accuracy:
    """Mean shares of right answers over whole pieces."""

    pieces: int
    instruments: float
    families: float
    drums: float
    style: float


def accuracy(tagger: Tagger, items: Sequence[Item]) -> Accuracy:
    """How often the tagger is right about `items`."""
    rows = []
    for item in items:
        truth, heard = item.metadata, tagger.hear_power(load_example(item, tagger.config).power)
        rows.append(
            [
                share_heard(heard.instruments, truth["instruments"]),
                share_heard(heard.families, truth["families"]),
                float((heard.drums > 0.5) == truth["drums"]),
                float(heard.style == truth["style"]),
            ]
        )
    return Accuracy(len(rows), *torch.tensor(rows).mean(0).tolist())


def main() -> None:
    """Run the command; mistakes end in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train on each CORPUS/train, test on the first one's held_out")
    training.add_argument("corpora", metavar="CORPUS", type=Path, nargs="+")
    training.add_argument("-o", "--output", type=Path, default=Path("tagger"))
    training.add_argument("--steps", type=int, default=1500)
    training.add_argument("--seed", type=int, default=0)
    testing = commands.add_parser("test", help="accuracy on CORPUS/held_out")
    testing.add_argument("tagger", type=Path)
    testing.add_argument("corpus", type=Path)
    args = parser.parse_args()
    try:
        if args.command == "train":
            tagger, corpus = train_on_corpus(*args.corpora, steps=args.steps, seed=args.seed), args.corpora[0]
            save_tagger(tagger, args.output)
        else:
            tagger, corpus = load_tagger(args.tagger), args.corpus
        result = accuracy(tagger, read_items(corpus / "held_out"))
    except UserError as error:
        sys.exit(f"error: {error}")
    print(
        ", ".join(
            f"{name} {value:.0%}" if name != "pieces" else f"{value} pieces" for name, value in asdict(result).items()
        )
    )


if __name__ == "__main__":
    main()
