"""Does the music do what its prompt says? Every fact of held-out prompts, beside real recordings and shuffled prompts.

    python -m evaluation.adherence starter --corpus corpus --items 200
    python -m evaluation.adherence starter --corpus corpus --tagger tagger --json

Each prompt is the first caption of a held-out piece of the corpus, which names all its instruments. A sound is made for
it, of a random length between 2 s and the window, untrimmed. Then:

- instruments, families: of the k that the piece has, the share among the k that the tagger hears most clearly
- drums, style: as the tagger hears them; tempo within 4 %, key and mode by `evaluation.music`; each over those prompts
  that say it. Half, double, a third and thrice the tempo are counted apart
- end: whether sound ends within 0.5 s of the length that was asked for
- width: whether left - right beside left + right is within 6 dB of the piece's own

The ceiling is the same of the pieces' own recordings, the floor that of the sounds with each other's prompts; intervals
are 95 % bootstrap. Where the bundle holds a whole CLAP: the Fréchet distance between the embeddings of half the sounds
and of the other half of the recordings, beside that between both halves of the recordings.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.bootstrap import interval
from evaluation.frechet import Gaussian, frechet_distance
from evaluation.music import key, tempo, width_db
from evaluation.obedience import sound_end
from evaluation.result import without_nan
from evaluation.tagger import Tagger, Tags, load_tagger, share_heard, train_on_corpus
from stable_audio_lite.audio.io import read_audio
from stable_audio_lite.clap.checkpoints import read_checkpoint
from stable_audio_lite.clap.model import Clap
from stable_audio_lite.corpus.captions import facts_told
from stable_audio_lite.data.manifest import Item, read_items
from stable_audio_lite.errors import UserError
from stable_audio_lite.pipeline import StableAudio

MEASURES = ("families", "instruments", "drums", "style", "tempo", "tempo octave", "key", "mode", "end", "width")
SHORTEST = 2.0  # seconds asked for at least
TEMPO_SHARE, END_SECONDS, WIDTH_DB = 0.04, 0.5, 6.0
OCTAVES = (1 / 3, 1 / 2, 2.0, 3.0)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A held-out piece, the words for it, and the length that a sound is asked to have."""

    item: Item
    prompt: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Heard:
    """What is heard in one sound; None where it is silent, or has no such thing."""

    tags: Tags | None
    tempo: float | None
    tonic: str | None
    mode: str | None
    end: float
    width: float


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Mean share of right answers over `n` sounds with its 95 % interval (NaN of one), beside ceiling and floor."""

    name: str
    n: int
    value: float
    low: float
    high: float
    ceiling: float
    floor: float


@dataclass(frozen=True, kw_only=True)
class Distances:
    """Fréchet distances of CLAP embeddings, each between `n` sounds and `n` others."""

    n: int
    generated: float
    real: float


def requests_of(corpus: Path, count: int, window: float, seed: int) -> list[Request]:
    """The first `count` held-out pieces, with random lengths between `SHORTEST` and `window` s.

    Raises:
        UserError: the corpus has fewer, or its pieces have no metadata.
    """
    items = read_items(corpus / "held_out")
    if len(items) < count:
        raise UserError(f"{corpus / 'held_out'}: holds {len(items)} pieces, --items asks for {count}; render more")
    rng = random.Random(seed)
    return [
        Request(item=i, prompt=i.captions[0], seconds=round(rng.uniform(SHORTEST, window), 1)) for i in items[:count]
    ]


def generate(model: StableAudio, requests: Sequence[Request], seed: int, **settings: Any) -> list[Tensor]:
    """A sound (2, T) of the whole window for each request; `settings` go to the model's `generate`."""
    from tqdm import tqdm

    sounds = []
    for number, request in enumerate(tqdm(requests, unit="sound")):
        made = model.generate(request.prompt, seconds_total=request.seconds, seed=seed + number, **settings)
        sounds.append(made.audio[0])
    return sounds


def hear(tagger: Tagger, audio: Tensor, sample_rate: int, seconds: float) -> Heard:
    """What is heard in the first `seconds` of (2, T) audio, and where the sound ends in all of it."""
    asked = audio[:, : round(seconds * sample_rate)]
    silent = not bool(asked.any())
    found = None if silent else key(asked, sample_rate)
    return Heard(
        tags=None if silent else tagger.hear(asked, sample_rate),
        tempo=None if silent else tempo(asked, sample_rate),
        tonic=found.tonic if found else None,
        mode=found.mode if found else None,
        end=sound_end(audio, sample_rate),
        width=width_db(asked),
    )


def score(heard: Heard, truth: dict[str, Any], prompt: str, seconds: float, width: float) -> dict[str, float]:
    """1 for what is right, 0 for what is wrong, of those measures that apply to the prompt.

    Args:
        heard: in a sound.
        truth: metadata of the piece that the prompt describes.
        prompt: its words.
        seconds: where the sound should end.
        width: of the piece's recording, in dB.
    """
    told = facts_told(prompt, truth)
    tags, bpm = heard.tags, heard.tempo or 0.0
    right: dict[str, float] = {
        "families": share_heard(tags.families, truth["families"]) if tags else 0.0,
        "instruments": share_heard(tags.instruments, truth["instruments"]) if tags else 0.0,
        "drums": bool(tags and (tags.drums > 0.5) == truth["drums"]),
        "style": bool(tags and tags.style == truth["style"]),
        "tempo": _near(bpm, truth["bpm"]),
        "tempo octave": any(_near(bpm, share * truth["bpm"]) for share in OCTAVES),
        "key": (heard.tonic, heard.mode) == (truth["key"], truth["mode"]),
        "mode": heard.mode == truth["mode"],
        "end": abs(heard.end - seconds) <= END_SECONDS,
        "width": abs(heard.width - width) <= WIDTH_DB,
    }
    unsaid = {"tempo", "tempo octave", "key", "mode", "style", "drums"} - told
    unsaid -= {"tempo octave"} if "tempo" in told else set()
    return {name: float(value) for name, value in right.items() if name not in unsaid}


def _near(value: float, wanted: float) -> bool:
    return abs(value - wanted) <= TEMPO_SHARE * wanted


def measure(
    tagger: Tagger, requests: Sequence[Request], sounds: Sequence[Tensor], sample_rate: int, seed: int = 0
) -> list[Measure]:
    """Every measure of the sounds made for `requests`."""
    recordings = [read_audio(request.item.path, sample_rate) for request in requests]
    widths = [width_db(recording) for recording in recordings]
    heard = [hear(tagger, s, sample_rate, r.seconds) for s, r in zip(sounds, requests, strict=True)]
    own = [hear(tagger, a, sample_rate, a.shape[1] / sample_rate) for a in recordings]
    lengths = [audio.shape[1] / sample_rate for audio in recordings]

    def scores(sounds: Sequence[Heard], others: Sequence[int], seconds: Sequence[float]) -> list[dict[str, float]]:
        pieces = [requests[i] for i in others]
        rows = zip(sounds, pieces, seconds, (widths[i] for i in others), strict=True)
        return [score(h, r.item.metadata, r.prompt, s, w) for h, r, s, w in rows]

    order = list(range(len(requests)))
    turned = order[1:] + order[:1]
    asked = [request.seconds for request in requests]
    tables = (
        scores(heard, order, asked),
        scores(own, order, lengths),
        scores(heard, turned, [asked[i] for i in turned]),
    )
    return [row for name in MEASURES if (row := _summary(name, *tables, seed=seed))]


def _summary(
    name: str, made: list[dict[str, float]], real: list[dict[str, float]], shuffled: list[dict[str, float]], seed: int
) -> Measure | None:
    values, ceiling, floor = (np.array([row[name] for row in rows if name in row]) for rows in (made, real, shuffled))
    if not len(values):
        return None
    low, high = interval(values, seed)
    means = {"value": values.mean(), "low": low, "high": high, "ceiling": ceiling.mean(), "floor": floor.mean()}
    return Measure(name=name, n=len(values), **{k: float(v) for k, v in means.items()})


def distances(clap: Clap, requests: Sequence[Request], sounds: Sequence[Tensor], sample_rate: int) -> Distances:
    """Fréchet distances of the first half of the sounds, and of the recordings, to the other half of the recordings.

    Silence at the end of a sound is left out.
    """
    half = len(requests) // 2
    made = [s[:, : round(r.seconds * sample_rate)] for s, r in zip(sounds[:half], requests, strict=False)]
    real = [read_audio(request.item.path, sample_rate) for request in requests[: 2 * half]]
    generated, first, second = (
        Gaussian.of(torch.cat([clap.embed_audio(audio[None], sample_rate) for audio in group]))
        for group in (made, real[:half], real[half:])
    )
    return Distances(n=half, generated=frechet_distance(generated, second), real=frechet_distance(first, second))


def as_text(measures: Sequence[Measure], apart: Distances | None) -> str:
    """A table."""
    lines = [f"{'':14}{'n':>5}{'right':>8}{'95 %':>14}{'real':>8}{'shuffled':>10}"]
    for row in measures:
        span = f"{row.low:.0%} to {row.high:.0%}" if row.n > 1 else ""
        lines.append(f"{row.name:14}{row.n:5}{row.value:8.0%}{span:>14}{row.ceiling:8.0%}{row.floor:10.0%}")
    if apart:
        lines.append(
            f"Fréchet distance of CLAP embeddings ({apart.n} and {apart.n} sounds): generated to real "
            f"{apart.generated:.4f}, real to real {apart.real:.4f}: {apart.generated / apart.real:.1f} times"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the command; mistakes end in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="BUNDLE", help="'starter', a bundle's folder or a hub id")
    parser.add_argument("--corpus", type=Path, required=True, help="whose held-out captions are the prompts")
    parser.add_argument("--tagger", type=Path, help="folder that evaluation.tagger wrote (default: trains one)")
    parser.add_argument("--items", type=int, default=200, help="prompts (default: 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    try:
        if args.items < 4:
            raise UserError(f"--items must be at least 4, got {args.items}")
        model = StableAudio.from_pretrained(args.model, device=args.device)
        requests = requests_of(args.corpus, args.items, model.config.window_seconds, args.seed)
        tagger = load_tagger(args.tagger) if args.tagger else train_on_corpus(args.corpus)
        sounds = generate(model, requests, args.seed)
        measures = measure(tagger, requests, sounds, model.config.sample_rate)
        clap = read_checkpoint(model.folder).clap()
        apart = distances(clap, requests, sounds, model.config.sample_rate) if clap else None
    except UserError as error:
        sys.exit(f"error: {error}")
    whole = {"measures": [asdict(row) for row in measures], "frechet": asdict(apart) if apart else None}
    print(json.dumps(without_nan(whole), indent=2) if args.json else as_text(measures, apart))


if __name__ == "__main__":
    main()
