"""A classifier of instruments and families that has heard only rendered corpus audio.

    python -m evaluation.probe train corpus/ -o probe/     # corpus/train; prints accuracy on corpus/held_out
    python -m evaluation.probe test probe/ corpus/

It learns from the corpus' solo pieces without drums, whose label is certain. A generated sound comes through a codec:
duller, rougher and with a noise floor. Training therefore changes every example's spectrum at random (equaliser,
low-pass, smearing, roughness, noise, a quiet second piece), so that what is left to learn is the timbre.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stable_audio_lite.audio.io import read_audio, resample
from stable_audio_lite.config import load_config, save_config
from stable_audio_lite.data.manifest import Item, read_items
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import replacing, save_tensors

CONFIG = "probe.yaml"
_WIDTHS = (16, 24, 48, 64)
_RANGE_DB = 70.0
_QUIET_DB = 40.0  # a crop's loudest frame lies at most this far below the piece's


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """What the probe knows and hears.

    Attributes:
        instruments: the classes.
        families: the family of each class, in the same order.
        sample_rate: Hz that audio is brought to.
        window: samples of the Fourier transform; half as many lie between frames.
        mels: mel bands between `lowest` and `highest` Hz.
        frames: frames in one crop (129 are 3 s).
    """

    instruments: tuple[str, ...]
    families: tuple[str, ...]
    sample_rate: int = 22050
    window: int = 1024
    mels: int = 64
    lowest: float = 40.0
    highest: float = 10000.0
    frames: int = 129

    def __post_init__(self) -> None:
        if not self.instruments or len(self.instruments) != len(self.families):
            raise ValueError("instruments and families must be equally many, and at least one")
        if self.mels % 2 ** len(_WIDTHS) or self.frames < 2 ** len(_WIDTHS):
            raise ValueError(f"mels must be a multiple of {2 ** len(_WIDTHS)} and frames at least as many")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the probe hears in one sound; `family_probability` belongs to `family`."""

    family: str
    instrument: str
    family_probability: float


class Trunk(nn.Module):
    """Normalised log-mel crops (B, mels, frames) -> features (B, `features`)."""

    def __init__(self, config: ProbeConfig):
        super().__init__()
        layers: list[nn.Module] = [_block(1, _WIDTHS[0], stride=2)]
        for before, width in zip(_WIDTHS, _WIDTHS[1:], strict=False):
            layers += [_block(before, width), nn.MaxPool2d(2)]
        self.layers = nn.Sequential(*layers)
        # Time is averaged away; frequency stays, for where the partials lie is what tells timbres apart.
        self.features = 2 * _WIDTHS[-1] * (config.mels // 2 ** len(_WIDTHS))

    def forward(self, crops: Tensor) -> Tensor:
        x = self.layers(crops[:, None])  # B, width, mels / 16, frames / 16
        return torch.cat([x.mean(3), x.amax(3)], 1).flatten(1)


class Probe(Trunk):
    """Small convolutional network over normalised log-mel crops (B, mels, frames) -> instrument logits (B, classes)."""

    def __init__(self, config: ProbeConfig):
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


def _block(before: int, width: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(before, width, 2 * stride + 1, stride, padding=stride, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())


def mel_power(mono: Tensor, config: ProbeConfig) -> Tensor:
    """Mel power spectrogram of (T,) samples at the probe's rate: (mels, frames)."""
    import torchaudio

    transform = torchaudio.transforms.MelSpectrogram(
        sample_rate=config.sample_rate,
        n_fft=config.window,
        hop_length=config.window // 2,
        f_min=config.lowest,
        f_max=config.highest,
        n_mels=config.mels,
        norm="slaney",
    )
    return transform(mono)


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
        if len(item.truth.get("instruments", ())) == 1 and not item.truth.get("drums")
    ]
    if not solos:
        raise UserError(f"{folder}: holds no solo pieces without drums; render more items")
    return solos


def config_for(items: list[Item]) -> ProbeConfig:
    """A probe for the instruments that `items` hold."""
    family_of = {item.truth["instruments"][0]: item.truth["families"][0] for item in items}
    instruments = sorted(family_of)
    return ProbeConfig(instruments=tuple(instruments), families=tuple(family_of[name] for name in instruments))


def load_examples(items: list[Item], config: ProbeConfig, per_class: int | None = None) -> list[Example]:
    """Spectrograms of `items`, at most `per_class` for each instrument; those unknown to the probe are left out."""
    counts = dict.fromkeys(config.instruments, 0)
    examples = []
    for item in items:
        name = item.truth["instruments"][0]
        if name not in counts or counts[name] == per_class:
            continue
        counts[name] += 1
        mono = read_audio(item.path, config.sample_rate).mean(0)
        examples.append(Example(mel_power(mono, config), config.instruments.index(name)))
    return examples


def train(examples: list[Example], config: ProbeConfig, *, steps: int = 1000, batch: int = 48, seed: int = 0) -> Probe:
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
    probe = Probe(load_config(Path(folder) / CONFIG, ProbeConfig))
    load_listener(probe, Path(folder) / CONFIG)
    return probe.eval()


def save_listener(module: nn.Module, config: ProbeConfig, path: Path) -> None:
    """Write a config to `path` and weights beside it, as `.safetensors`."""
    save_config(config, path)
    with replacing(path.with_suffix(".safetensors")) as temporary:
        save_tensors(temporary, module.state_dict(), {"format": "pt"})


def load_listener(module: nn.Module, path: Path) -> None:
    """Load the weights that lie beside the config at `path`.

    Raises:
        UserError: they are missing, damaged or don't fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    weights = path.with_suffix(".safetensors")
    try:
        module.load_state_dict(load_file(weights))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{weights}: no weights that fit {path.name}; train it again") from error


def train_on_corpus(corpus: Path, *, steps: int = 1000, per_class: int | None = 80, seed: int = 0) -> Probe:
    """Train on `corpus`/train.

    Raises:
        UserError: the folder holds no solo pieces.
    """
    items = solo_items(corpus / "train")
    config = config_for(items)
    return train(load_examples(items, config, per_class), config, steps=steps, seed=seed)


def random_crop(powers: list[Tensor], frames: int, generator: torch.Generator) -> Tensor:
    """A random crop, (mels, frames), of one of the pieces, not of a silence in it."""
    power = powers[int(torch.randint(len(powers), (1,), generator=generator))]
    crops = _loud_starts(power, frames)
    start = int(crops[int(torch.randint(len(crops), (1,), generator=generator))])
    return _cut(power, start, frames)


def all_crops(power: Tensor, frames: int) -> Tensor:
    """Crops that overlap by half and aren't silent: (N, mels, frames)."""
    starts = _loud_starts(power, frames).tolist()
    wanted = [s for s in starts if s % (frames // 2) == 0] or starts[:1]
    return torch.stack([_cut(power, start, frames) for start in wanted])


def _loud_starts(power: Tensor, frames: int) -> Tensor:
    """Frames at which a crop may start: its mean level is within `_QUIET_DB` of the loudest crop's."""
    level = power.sum(0)
    if not float(level.max()) > 0:
        raise UserError("the sound is silent, so no instrument can be heard in it")
    if len(level) <= frames:
        return torch.zeros(1, dtype=torch.long)
    means = level.unfold(0, frames, 1).mean(1)
    return (means > means.max() * 10 ** (-_QUIET_DB / 10)).nonzero()[:, 0]


def _cut(power: Tensor, start: int, frames: int) -> Tensor:
    crop = power[:, start : start + frames]
    return F.pad(crop, (0, frames - crop.shape[1]))


def normalise(power: Tensor) -> Tensor:
    """dB below each crop's peak, (B, mels, frames), centred and scaled; makes level and distant noise irrelevant."""
    decibels = 10 * power.clamp_min(1e-14).log10()
    decibels = decibels - decibels.amax((1, 2), keepdim=True)
    return (decibels.clamp_min(-_RANGE_DB) + _RANGE_DB / 2) / (_RANGE_DB / 4)


def augment(power: Tensor, generator: torch.Generator) -> Tensor:
    """Random versions of (B, mels, frames) power: what a codec or another mix might have made of the same sound."""
    size, mels, _ = power.shape

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(size, 1, 1, generator=generator)

    def some(share: float) -> Tensor:
        return torch.rand(size, 1, 1, generator=generator) < share

    peak = power.amax((1, 2), keepdim=True)
    # A second, quiet piece; bleeding accompaniment.
    other = power.roll(1, 0) * (peak / peak.roll(1, 0)) * 10 ** (draw(-28, -10) / 10)
    power = torch.where(some(0.3), power + other, power)
    smeared = F.avg_pool1d(power, 5, stride=1, padding=2)
    power = torch.where(some(0.3), smeared, power)
    # Equaliser of six bands, +-6 dB or so.
    bands = 5 * torch.randn(size, 1, 6, generator=generator)
    gain = F.interpolate(bands, mels, mode="linear", align_corners=True).transpose(1, 2)
    # Low-pass: some dB per band above a cutoff.
    band = torch.arange(mels)[None, :, None]
    gain = gain - torch.where(some(0.5), draw(0.5, 6) * (band - draw(0.35 * mels, mels)).clamp_min(0), 0)
    # Roughness: every cell is off a little.
    gain = gain + draw(0, 4) * torch.randn(power.shape, generator=generator)
    power = power * 10 ** (gain / 10)
    # A noise floor, tilted.
    tilt = draw(-0.4, 0.1) * (band - mels / 2)
    level = power.amax((1, 2), keepdim=True) * 10 ** ((draw(-65, -22) + tilt) / 10)
    power = torch.where(some(0.7), power + _noise(level, power.shape, generator), power)
    # A steady hiss of random colour.
    colour = F.interpolate(8 * torch.randn(size, 1, 6, generator=generator), mels, mode="linear", align_corners=True)
    level = power.amax((1, 2), keepdim=True) * 10 ** ((draw(-60, -15) + colour.transpose(1, 2)) / 10)
    power = torch.where(some(0.6), power + _noise(level, power.shape, generator), power)
    # Noise that follows the sound: its own spectrum, smeared over the bands, between its partials.
    smeared = F.avg_pool2d(power, (9, 1), stride=1, padding=(4, 0), count_include_pad=False)
    level = smeared * 10 ** (draw(-25, -3) / 10)
    return torch.where(some(0.6), power + _noise(level, power.shape, generator), power)


def _noise(level: Tensor, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Power of noise of mean `level`: exponentially distributed."""
    return -torch.rand(shape, generator=generator).clamp_min(1e-6).log() * level


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
