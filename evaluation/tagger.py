"""A tagger of whole pieces that has been trained on rendered corpus audio alone: instruments, families, drums, style.

    python -m evaluation.tagger train corpus/ -o tagger/     # corpus/train; prints how it does on corpus/held_out
    python -m evaluation.tagger train corpus/ more/ -o tagger/ --steps 4000    # more accurate; more/train too
    python -m evaluation.tagger test tagger/ corpus/

Several instruments may play at once: each crop is labelled with all that play in its piece.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.mel_crops import MelConfig, all_crops, augment, mel_power, normalise, random_crop
from stable_audio_lite.audio.io import read_audio, resample
from stable_audio_lite.command import Parser, add_overwrite, check_outputs, file_path, guarded
from stable_audio_lite.config import load_config, save_config
from stable_audio_lite.data.manifest import Item, read_items
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import replacing, save_tensors

_CONFIG, _WEIGHTS = "tagger.yaml", "tagger.safetensors"
_WIDTHS = (16, 24, 48, 64)


@dataclass(frozen=True, kw_only=True)
class TaggerConfig(MelConfig):
    """Classes of the tagger, and the crops that it takes.

    Attributes:
        instruments: the classes.
        families: the family of each instrument, in the same order.
        styles: of which each piece has one.
    """

    instruments: tuple[str, ...]
    families: tuple[str, ...]
    styles: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.instruments or len(self.instruments) != len(self.families):
            raise ValueError("instruments and families must be equally many, and at least one")
        if self.mels % 2 ** len(_WIDTHS) or self.frames < 2 ** len(_WIDTHS):
            raise ValueError(f"mels must be a multiple of {2 ** len(_WIDTHS)} and frames at least as many")

    @property
    def family_names(self) -> tuple[str, ...]:
        """Each family once, sorted."""
        return tuple(sorted(set(self.families)))


@dataclass(frozen=True, kw_only=True)
class Tags:
    """Probabilities of one sound by name, that drums play, and the most likely style."""

    instruments: dict[str, float]
    families: dict[str, float]
    drums: float
    style: str


def _block(before: int, width: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(before, width, 2 * stride + 1, stride, padding=stride, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())


class Tagger(nn.Module):
    """Normalised log-mel crops (B, mels, frames) -> logits (B, instruments + families + 1 + styles)."""

    def __init__(self, config: TaggerConfig):
        super().__init__()
        self.config = config
        self.sizes = [len(config.instruments), len(config.family_names), 1, len(config.styles)]
        layers: list[nn.Module] = [_block(1, _WIDTHS[0], stride=2)]
        for before, width in zip(_WIDTHS, _WIDTHS[1:], strict=False):
            layers += [_block(before, width), nn.MaxPool2d(2)]
        self.layers = nn.Sequential(*layers)
        # Time is averaged away; frequency stays, for where the partials lie is what tells timbres apart.
        features = 2 * _WIDTHS[-1] * (config.mels // 2 ** len(_WIDTHS))
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(features, sum(self.sizes)))

    def forward(self, crops: Tensor) -> Tensor:
        x = self.layers(crops[:, None])  # B, width, mels / 16, frames / 16
        return self.head(torch.cat([x.mean(3), x.amax(3)], 1).flatten(1))

    @torch.inference_mode()
    def tag(self, audio: Tensor, sample_rate: int) -> Tags:
        """Tags of (channels, T) audio at `sample_rate` Hz; full scale is 1.

        Raises:
            UserError: the audio is silent.
        """
        mono = resample(audio.float().mean(0, keepdim=True).numpy(), sample_rate, self.config.sample_rate)
        return self.tag_power(mel_power(torch.from_numpy(mono[0]), self.config))

    @torch.inference_mode()
    def tag_power(self, power: Tensor) -> Tags:
        """Tags of a mel power spectrogram (mels, frames)."""
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
    """The config of a tagger for all that `items` hold.

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
    metadata = item.metadata
    tags = [name in metadata["instruments"] for name in config.instruments]
    tags += [name in metadata["families"] for name in config.family_names] + [metadata["drums"]]
    power = mel_power(read_audio(item.path, config.sample_rate).mean(0), config)
    return Example(power, torch.tensor(tags, dtype=torch.float32), config.styles.index(metadata["style"]))


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
        crops = torch.stack([random_crop(examples[i].power, config.frames, generator) for i in chosen.tolist()])
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
    """Train on the folders `train` of all `corpora` together.

    Raises:
        UserError: a folder is no corpus.
    """
    items = [item for corpus in corpora for item in read_items(corpus / "train")]
    config = config_for(items)
    return train([load_example(item, config) for item in items], config, steps=steps, seed=seed)


def save_tagger(tagger: Tagger, folder: Path) -> None:
    """Write `tagger.yaml` and `tagger.safetensors` into `folder`."""
    save_config(tagger.config, folder / _CONFIG)
    with replacing(folder / _WEIGHTS) as temporary:
        save_tensors(temporary, tagger.state_dict(), {"format": "pt"})


def load_tagger(folder: Path) -> Tagger:
    """Read back what `save_tagger` wrote.

    Raises:
        UserError: a file is missing or the weights don't fit the config.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tagger = Tagger(load_config(folder / _CONFIG, TaggerConfig))
    try:
        tagger.load_state_dict(load_file(folder / _WEIGHTS))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder / _WEIGHTS}: no weights that fit {_CONFIG}; train it again") from error
    return tagger.eval()


def r_precision(probabilities: Mapping[str, float], named: Sequence[str]) -> float:
    """Of k names that are right, the share among the k of highest probability."""
    right = set(named)
    top = sorted(probabilities, key=lambda name: -probabilities[name])[: len(right)]
    return len(right & set(top)) / len(right)


@dataclass(frozen=True)
class Accuracy:
    """Mean shares of right answers over whole pieces."""

    pieces: int
    instruments: float
    families: float
    drums: float
    style: float


def accuracy(tagger: Tagger, items: Sequence[Item]) -> Accuracy:
    """Accuracy of the tagger on `items`."""
    rows = []
    for item in items:
        right, tags = item.metadata, tagger.tag_power(load_example(item, tagger.config).power)
        shares = [r_precision(tags.instruments, right["instruments"]), r_precision(tags.families, right["families"])]
        rows.append([*shares, float((tags.drums > 0.5) == right["drums"]), float(tags.style == right["style"])])
    return Accuracy(len(rows), *torch.tensor(rows).mean(0).tolist())


def main() -> int:
    """Run the command; returns its exit status."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train on each CORPUS/train, test on the first one's held_out")
    training.add_argument("corpora", metavar="CORPUS", type=file_path, nargs="+")
    training.add_argument("-o", "--output", type=file_path, default=Path("tagger"))
    add_overwrite(training)
    training.add_argument("--steps", type=int, default=1500)
    training.add_argument("--seed", type=int, default=0)
    testing = commands.add_parser("test", help="accuracy on CORPUS/held_out")
    testing.add_argument("tagger", type=file_path)
    testing.add_argument("corpus", type=file_path)
    return guarded(lambda: _run(parser.parse_args()))


def _run(args: argparse.Namespace) -> None:
    if args.command == "train":
        check_outputs([args.output / _CONFIG, args.output / _WEIGHTS], args.corpora, overwrite=args.overwrite)
        tagger, corpus = train_on_corpus(*args.corpora, steps=args.steps, seed=args.seed), args.corpora[0]
        save_tagger(tagger, args.output)
    else:
        tagger, corpus = load_tagger(args.tagger), args.corpus
    result = asdict(accuracy(tagger, read_items(corpus / "held_out")))
    pieces = result.pop("pieces")
    print(f"{pieces} pieces, " + ", ".join(f"{name} {value:.0%}" for name, value in result.items()))


if __name__ == "__main__":
    sys.exit(main())
