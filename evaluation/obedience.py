"""Does the music answer its prompt? Instruments by a probe that has heard only the corpus, length by where sound ends.

    python -m evaluation.obedience starter --probe probe/ --corpus corpus/
    python -m evaluation.obedience starter --corpus corpus/ --json    # trains the probe first

Eight prompts name eight instruments of eight families; the probe has to name the family. Then the whole window is
generated, untrimmed, with the timing set to 4 s: the sound has to end between 3.5 and 5 s. With a corpus the same two
measures are printed for its held-out recordings: the ceiling.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.probe import Probe, accuracy, load_examples, load_probe, solo_items, train_on_corpus
from stable_audio_lite.audio.io import audio_info, read_audio
from stable_audio_lite.data.manifest import Item
from stable_audio_lite.errors import UserError
from stable_audio_lite.pipeline import StableAudio

# (prompt, the instrument it names)
PROMPTS = (
    ("A slow classical piece for solo piano", "piano"),
    ("solo marimba, happy pop", "marimba"),
    ("Church organ playing a classical piece in C major", "church organ"),
    ("solo acoustic guitar, folk", "acoustic guitar"),
    ("A sad melody on violin", "violin"),
    ("solo trumpet, jazz, 120 bpm", "trumpet"),
    ("A bright folk tune played by a flute", "flute"),
    ("synth lead, house, fast, no drums", "synth lead"),
)
ASKED_SECONDS, EARLIEST, LATEST = 4.0, 3.5, 5.0
"""What is asked for, and between which times the sound has to end."""

WINDOW, HOP, FLOOR_DB = 0.05, 0.01, -40.0
"""Seconds of the level meter's window and hop, and the level (relative to its maximum) that counts as silence."""


@dataclass(frozen=True, kw_only=True)
class Heard:
    """One generated sound: what was asked for and what the probe heard."""

    prompt: str
    seed: int
    instrument: str
    family: str
    heard_family: str
    heard_instrument: str

    @property
    def right(self) -> bool:
        """Whether the family is the one that was asked for."""
        return self.family == self.heard_family


@dataclass(frozen=True, kw_only=True)
class Ended:
    """One sound that was asked to last `ASKED_SECONDS`; `end` is in seconds."""

    prompt: str
    seed: int
    end: float

    @property
    def right(self) -> bool:
        """Whether it ends when it should."""
        return EARLIEST <= self.end <= LATEST


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """The measures on held-out recordings of the corpus.

    Attributes:
        pieces: how many solo recordings of the prompts' instruments.
        family: share whose family the probe names.
        ended: share whose sound ends within the same tolerance of the recording's length.
    """

    pieces: int
    family: float
    ended: float


def sound_end(audio: Tensor, sample_rate: int) -> float:
    """Seconds at which the sound in (channels, T) `audio` ends; 0 for silence.

    The level is the root mean square over all channels in windows of `WINDOW` s, every `HOP` s. The sound ends with the
    last window whose level is above the highest level plus `FLOOR_DB`: what lies 40 dB under the music is its fading
    tail, or a codec's noise floor.
    """
    window, hop = round(WINDOW * sample_rate), round(HOP * sample_rate)
    power = audio.float().square().mean(0)
    padded = F.pad(power, (0, max(window - len(power), -(len(power) - window) % hop)))
    level = padded.unfold(0, window, hop).mean(1)
    if not float(level.max()) > 0:
        return 0.0
    last = int((level > level.max() * 10 ** (FLOOR_DB / 10)).nonzero()[-1])
    return min(last * hop + window, len(power)) / sample_rate


def listen(model: StableAudio, probe: Probe, *, seed: int, count: int = 1, seconds: float | None = None) -> list[Heard]:
    """Generate each prompt `count` times at the model's default settings and ask the probe.

    Raises:
        UserError: the probe doesn't know an instrument that the prompts name.
    """
    family_of = dict(zip(probe.config.instruments, probe.config.families, strict=True))
    if missing := [name for _, name in PROMPTS if name not in family_of]:
        raise UserError(f"the probe has never heard {', '.join(missing)}; train it on a larger corpus")
    result = model.generate([prompt for prompt, _ in PROMPTS], seconds=seconds, seed=seed, count=count)
    asked = [pair for pair in PROMPTS for _ in range(count)]
    heard = []
    for (prompt, instrument), own_seed, audio in zip(asked, result.seeds, result.audio, strict=True):
        answer = probe.classify(audio, result.sample_rate) if bool(audio.any()) else None
        heard.append(
            Heard(
                prompt=prompt,
                seed=own_seed,
                instrument=instrument,
                family=family_of[instrument],
                heard_family=answer.family if answer else "silence",
                heard_instrument=answer.instrument if answer else "silence",
            )
        )
    return heard


def time_endings(model: StableAudio, *, seed: int, count: int = 1) -> list[Ended]:
    """Generate each prompt with the timing at `ASKED_SECONDS`, the window untrimmed, and find where sound ends."""
    prompts = [prompt for prompt, _ in PROMPTS]
    result = model.generate(prompts, seconds_total=ASKED_SECONDS, seed=seed, count=count)
    asked = [prompt for prompt in prompts for _ in range(count)]
    return [
        Ended(prompt=prompt, seed=own_seed, end=sound_end(audio, result.sample_rate))
        for prompt, own_seed, audio in zip(asked, result.seeds, result.audio, strict=True)
    ]


def ceiling(probe: Probe, corpus: Path) -> Ceiling:
    """The measures on the held-out solo recordings of the instruments that the prompts name.

    Raises:
        UserError: the corpus holds none.
    """
    wanted = {name for _, name in PROMPTS}
    items = [item for item in solo_items(corpus / "held_out") if item.metadata["instruments"][0] in wanted]
    if not items:
        raise UserError(f"{corpus / 'held_out'}: holds no solo pieces of the prompts' instruments; render more items")
    ends = [_ends_on_time(item) for item in items]
    family = accuracy(probe, load_examples(items, probe.config)).family
    return Ceiling(pieces=len(items), family=family, ended=sum(ends) / len(ends))


def _ends_on_time(item: Item) -> bool:
    info = audio_info(item.path)
    late = sound_end(read_audio(item.path, info.sample_rate), info.sample_rate) - info.seconds
    return EARLIEST - ASKED_SECONDS <= late <= LATEST - ASKED_SECONDS


def as_json(heard: Sequence[Heard], ended: Sequence[Ended], real: Ceiling | None) -> dict[str, Any]:
    """Every result as plain values."""
    return {
        "instruments": [asdict(row) | {"right": row.right} for row in heard],
        "instruments_right": sum(row.right for row in heard),
        "endings": [asdict(row) | {"right": row.right} for row in ended],
        "endings_right": sum(row.right for row in ended),
        "held_out": asdict(real) if real else None,
    }


def as_text(heard: Sequence[Heard], ended: Sequence[Ended], real: Ceiling | None) -> str:
    """The results as a table."""
    lines = ["prompt -> family heard (instrument heard)"]
    for row in heard:
        verdict = "right" if row.right else f"wrong, asked for {row.family}"
        lines.append(f"  {row.prompt} -> {row.heard_family} ({row.heard_instrument}): {verdict}")
    lines.append(f"right family: {sum(row.right for row in heard)} of {len(heard)}")
    lines.append(f"sound ends, asked for {ASKED_SECONDS:g} s: " + ", ".join(f"{row.end:.2f}" for row in ended))
    right = sum(row.right for row in ended)
    lines.append(f"between {EARLIEST:g} and {LATEST:g} s: {right} of {len(ended)}")
    if real:
        lines.append(
            f"held-out recordings of these instruments ({real.pieces}): right family {real.family:.0%}, "
            f"end on time {real.ended:.0%}"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the command; mistakes end in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="BUNDLE", help="'starter', a bundle's folder or a hub id")
    parser.add_argument("--probe", type=Path, help="folder that evaluation.probe wrote")
    parser.add_argument("--corpus", type=Path, help="trains the probe where none is given; its held-out part: ceiling")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1, help="sounds for each prompt (default: 1)")
    parser.add_argument("--seconds", type=float, help="length of the sounds for the probe (default: the window)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    try:
        if args.probe is None and args.corpus is None:
            raise UserError("give --probe or --corpus")
        probe = load_probe(args.probe) if args.probe else train_on_corpus(args.corpus)
        model = StableAudio.from_pretrained(args.model, device=args.device)
        with torch.inference_mode():
            heard = listen(model, probe, seed=args.seed, count=args.count, seconds=args.seconds)
            ended = time_endings(model, seed=args.seed, count=args.count)
        real = ceiling(probe, args.corpus) if args.corpus else None
    except UserError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(as_json(heard, ended, real), indent=2) if args.json else as_text(heard, ended, real))


if __name__ == "__main__":
    main()
