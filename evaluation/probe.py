"""A classifier of instruments and families that has heard only rendered corpus audio.

    python -m evaluation.probe train corpus/ -o probe/     # corpus/train; prints accuracy on corpus/held_out
    python -m evaluation.probe test probe/ corpus/

It learns from the corpus' solo pieces without drums, whose label is certain, changed at random as `evaluation.hearing`
says.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
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

CONFIG = "probe.yaml"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the probe hears in one sound; `family_probability` belongs to `family`."""

    family: str
    instrument: str
    family_probability: float


class Probe(Trunk):
    """Small convolutional network over normalised log-mel crops (B, mels, frames) -> instrument logits (B, classes)."""

    def __init__(self, config: HearingConfig):
        super().__init__(config)
        self.config = config
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(self.features, len(config.instruments)))
        names = sorted(set(config.families))
        membership = torch.tensor([names.index(family) for family in config.families])
        self.register_buffer("membership", membership, persistent=False)
        self.family_names = names

    def forward(self, crops: Tensor) -> Tensor:
        return self.head(super().forward(crops))

    def family_log_probabilities(self, log_probabilities: Tensor) -> Tensor:
        """(B, classes) -> (B, families): log of the sum over each family's instruments."""
        columns = [log_probabilities[:, self.membership == i].logsumexp(1) for i in range(len(self.family_names))]
        return torch.stack(columns, 1)

    @torch.inference_mode()
    def classify(self, audio: Tensor, sample_rate: int) -> Answer:
        """What plays in (channels, T) audio at `sample_rate` Hz; full scale is 1.

        Raises:
            UserError: the audio is silent.
        """
        self.eval()
        mono = resample(audio.float().mean(0, keepdim=True).numpy(), sample_rate, self.config.sample_rate)
        crops = normalise(all_crops(mel_power(torch.from_numpy(mono[0]), self.config), self.config.frames))
        logs = self(crops).log_softmax(1).mean(0, keepdim=True).log_softmax(1)
        families = self.family_log_probabilities(logs)[0].exp()
        best = int(families.argmax())
        return Answer(
            family=self.family_names[best],
            instrument=self.config.instruments[int(logs[0].argmax())],
            family_probability=float(families[best]),
        )


@dataclass(frozen=True)
class Example:
    """One solo piece: mel power (mels, frames) and its class."""

    power: Tensor
    label: int


def solo_items(folder: Path) -> list[Item]:
    """The items of a corpus folder in which one instrument plays alone.

    Raises:
        UserError: there is none, or the folder is no corpus.
    """
    solos = [
        item
        for item in read_items(folder)
        if len(item.metadata.get("instruments", ())) == 1 and not item.metadata.get("drums")
    ]
    if not solos:
        raise UserError(f"{folder}: holds no solo pieces without drums; render more items")
    return solos


def config_for(items: list[Item]) -> HearingConfig:
    """A probe for the instruments that `items` hold."""
    family_of = {item.metadata["instruments"][0]: item.metadata["families"][0] for item in items}
    instruments = sorted(family_of)
    return HearingConfig(instruments=tuple(instruments), families=tuple(family_of[name] for name in instruments))


def load_examples(items: list[Item], config: HearingConfig, per_class: int | None = None) -> list[Example]:
    """Spectrograms of `items`, at most `per_class` for each instrument; those unknown to the probe are left out."""
    counts = dict.fromkeys(config.instruments, 0)
    examples = []
    for item in items:
        name = item.metadata["instruments"][0]
        if name not in counts or counts[name] == per_class:
            continue
        counts[name] += 1
        mono = read_audio(item.path, config.sample_rate).mean(0)
        examples.append(Example(mel_power(mono, config), config.instruments.index(name)))
    return examples


def train(
    examples: list[Example], config: HearingConfig, *, steps: int = 1000, batch: int = 48, seed: int = 0
) -> Probe:
    """Train a probe; classes are drawn equally often."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    probe = Probe(config).train()
    optimizer = torch.optim.AdamW(probe.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    by_class = [[e.power for e in examples if e.label == label] for label in range(len(config.instruments))]
    present = torch.tensor([label for label, powers in enumerate(by_class) if powers])
    for _ in range(steps):
        labels = present[torch.randint(len(present), (batch,), generator=generator)]
        crops = torch.stack([random_crop(by_class[label], config.frames, generator) for label in labels.tolist()])
        logs = probe(normalise(augment(crops, generator))).log_softmax(1)
        loss = F.nll_loss(logs, labels)
        loss = loss + F.nll_loss(probe.family_log_probabilities(logs), probe.membership[labels])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return probe.eval()


@dataclass(frozen=True)
class Accuracy:
    """Shares of right answers, overall and by the true family."""

    family: float
    instrument: float
    by_family: dict[str, float]


@torch.inference_mode()
def accuracy(probe: Probe, examples: list[Example]) -> Accuracy:
    """How often the probe is right about whole pieces.

    Raises:
        UserError: there are no examples.
    """
    if not examples:
        raise UserError("nothing to test on: the corpus holds no solo pieces of the probe's instruments")
    probe.eval()
    right_instrument, right_family = [], []
    owners = [int(probe.membership[e.label]) for e in examples]
    for example, owner in zip(examples, owners, strict=True):
        crops = normalise(all_crops(example.power, probe.config.frames))
        logs = probe(crops).log_softmax(1).mean(0, keepdim=True)
        right_instrument.append(float(int(logs.argmax()) == example.label))
        right_family.append(float(int(probe.family_log_probabilities(logs).argmax()) == owner))
    by_family = {}
    for index, name in enumerate(probe.family_names):
        hits = [right for right, owner in zip(right_family, owners, strict=True) if owner == index]
        if hits:
            by_family[name] = sum(hits) / len(hits)
    count = len(examples)
    return Accuracy(sum(right_family) / count, sum(right_instrument) / count, by_family)


def save_probe(probe: Probe, folder: str | Path) -> None:
    """Write `probe.yaml` and `probe.safetensors` into `folder`."""
    save_listener(probe, probe.config, Path(folder) / CONFIG)


def load_probe(folder: str | Path) -> Probe:
    """Read back what `save_probe` wrote.

    Raises:
        UserError: a file is missing or the weights don't fit the config.
    """
    probe = Probe(load_config(Path(folder) / CONFIG, HearingConfig))
    load_listener(probe, Path(folder) / CONFIG)
    return probe.eval()


def train_on_corpus(corpus: Path, *, steps: int = 1000, per_class: int | None = 80, seed: int = 0) -> Probe:
    """Train on `corpus`/train.

    Raises:
        UserError: the folder holds no solo pieces.
    """
    items = solo_items(corpus / "train")
    config = config_for(items)
    return train(load_examples(items, config, per_class), config, steps=steps, seed=seed)


def report(name: str, result: Accuracy) -> str:
    """Lines to print."""
    lines = [f"{name}: family {result.family:.0%}, instrument {result.instrument:.0%}"]
    return "\n".join(lines + [f"  {family}: {share:.0%}" for family, share in result.by_family.items()])


def main() -> None:
    """Run the command; mistakes end in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train on CORPUS/train, test on CORPUS/held_out")
    training.add_argument("corpus", type=Path)
    training.add_argument("-o", "--output", type=Path, default=Path("probe"))
    training.add_argument("--steps", type=int, default=1000)
    training.add_argument("--per-class", type=int, default=80, help="pieces for each instrument at most")
    training.add_argument("--seed", type=int, default=0)
    testing = commands.add_parser("test", help="accuracy on CORPUS/held_out")
    testing.add_argument("probe", type=Path)
    testing.add_argument("corpus", type=Path)
    args = parser.parse_args()
    try:
        if args.command == "train":
            probe = train_on_corpus(args.corpus, steps=args.steps, per_class=args.per_class, seed=args.seed)
            save_probe(probe, args.output)
        else:
            probe = load_probe(args.probe)
        held_out = load_examples(solo_items(args.corpus / "held_out"), probe.config)
        print(report(f"{args.corpus / 'held_out'}, {len(held_out)} solo pieces", accuracy(probe, held_out)))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
