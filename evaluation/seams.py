"""Seams of edited sounds: is it heard where an inpainted stretch, a continuation or a loop meets what was there?

    python -m evaluation.seams starter --corpus corpus --items 40

For the captions of held-out pieces, in turn: a stretch in the middle of the recording is inpainted; a sound of a whole
window is continued to three windows; a loop is made and played twice. Where pieces meet, the spectral distance
(`evaluation.metrics.seams`) stands beside those at all other places of the same sounds. It should be no larger than
their 75th percentile. Tempo and key of a continuation are compared with those of what it continues, and, as the measure
of that, those of both halves of the sound that is continued. In brackets: 95 % bootstrap intervals.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import Tensor

from evaluation.adherence import held_out_prompts
from evaluation.metrics.bootstrap import interval
from evaluation.metrics.music import TEMPO_TOLERANCE, key, tempo
from evaluation.metrics.seams import seam_distances
from evaluation.output import print_result
from evaluation.prompt_facts import HeldOutPrompt
from stable_audio_lite.command import Parser, file_path, guarded
from stable_audio_lite.edits import CROSSFADE_SECONDS, Inpainting, Loop, Sound
from stable_audio_lite.errors import UserError
from stable_audio_lite.pipeline import StableAudio

_GAP = (0.35, 0.65)  # of the recording's length
_LOOP_SECONDS = 8.0


@dataclass
class Seams:
    """Distances of one kind of edit, in dB."""

    at: list[float] = field(default_factory=list)
    elsewhere: list[float] = field(default_factory=list)

    def add(self, audio: Tensor, sample_rate: int, seams: list[int]) -> None:
        """Measure a sound (channels, T) that has seams at these samples."""
        at, elsewhere = seam_distances(audio, sample_rate, seams)
        self.at += at.tolist()
        self.elsewhere += elsewhere.tolist()


@dataclass
class Agreement:
    """Comparisons of two stretches of sound: is the tempo the same, and the key, where both have one?"""

    tempo: list[bool] = field(default_factory=list)
    key: list[bool] = field(default_factory=list)

    def add(self, one: Tensor, other: Tensor, sample_rate: int) -> None:
        """Compare (channels, T) sounds."""
        tempos, keys = [tempo(x, sample_rate) for x in (one, other)], [key(x, sample_rate) for x in (one, other)]
        if tempos[0] and tempos[1]:
            self.tempo.append(abs(tempos[1] / tempos[0] - 1) <= TEMPO_TOLERANCE)
        if keys[0] and keys[1]:
            self.key.append(keys[0] == keys[1])


def inpainted(model: StableAudio, prompt: HeldOutPrompt, seed: int) -> tuple[Tensor, list[int]]:
    """A recording with its middle made anew, and its seams: the middles of the fades."""
    rate, fade = model.sample_rate, CROSSFADE_SECONDS / 2
    source = Sound.read(str(prompt.item.path), rate)
    source = Sound(source.audio[:, : round(prompt.seconds * rate)], rate, source.name)
    gap = (_GAP[0] * prompt.seconds, _GAP[1] * prompt.seconds)
    made = model.generate(prompt.text, seed=seed, edit=Inpainting(source, [gap]))
    return made.audio[0], [round((gap[0] - fade) * rate), round((gap[1] + fade) * rate)]


def continued(model: StableAudio, prompt: HeldOutPrompt, seed: int) -> tuple[Tensor, Tensor, list[int]]:
    """A sound of one window, what follows it for two more, and where its pieces begin."""
    window = model.window_seconds
    first = model.generate(prompt.text, seconds=window, seconds_total=3 * window, seed=seed)
    after = Sound(first.audio[0], model.sample_rate)
    pieces = list(model.extend(prompt.text, seconds=2 * window, after=after, seed=seed + 1).pieces)
    begins = np.cumsum([first.audio.shape[2], *(piece.shape[1] for piece in pieces[:-1])])
    return first.audio[0], torch.cat(pieces, 1), begins.tolist()


def looped(model: StableAudio, prompt: HeldOutPrompt, seed: int) -> Tensor:
    """A loop, played once."""
    bpm = (prompt.item.metadata or {}).get("bpm")
    edit = Loop() if bpm is None else Loop(bars=max(int(_LOOP_SECONDS * bpm / 240), 1), bpm=bpm)
    return model.generate(prompt.text, seed=seed, edit=edit).audio[0]


def measure_seams(
    model: StableAudio, prompts: list[HeldOutPrompt], seed: int
) -> tuple[dict[str, Seams], dict[str, Agreement]]:
    """Make and measure all sounds."""
    from tqdm import tqdm

    rate = model.sample_rate
    kinds = {name: Seams() for name in ("inpainting", "continuation", "loop")}
    agreements = {"continuation": Agreement(), "halves": Agreement()}
    for number, prompt in enumerate(tqdm(prompts, unit="prompt")):
        own = seed + 10 * number
        filled, edges = inpainted(model, prompt, own)
        kinds["inpainting"].add(filled, rate, edges)
        first, rest, begins = continued(model, prompt, own)
        kinds["continuation"].add(torch.cat((first, rest), 1), rate, begins)
        agreements["continuation"].add(first, rest[:, : first.shape[1]], rate)
        half = first.shape[1] // 2
        agreements["halves"].add(first[:, :half], first[:, half:], rate)
        loop = looped(model, prompt, own)
        kinds["loop"].add(torch.cat((loop, loop), 1), rate, [loop.shape[1]])
    return kinds, agreements


def seams_table(kinds: dict[str, Seams], agreements: dict[str, Agreement]) -> str:
    """A line for each kind of edit, and one for each agreement."""
    lines = [f"{'':14}{'seams':>6}{'median':>9}{'elsewhere: median':>34}{'75th percentile':>17}"]
    for name, found in kinds.items():
        low, high = interval(found.at, statistic=np.median)
        middle, third = np.percentile(found.elsewhere, (50, 75))
        at = f"{np.median(found.at):6.2f} dB ({low:.2f} to {high:.2f})"
        lines.append(f"{name:14}{len(found.at):6}{at}{middle:16.2f} dB{third:14.2f} dB")
    for name, words in (("continuation", "continuation and its source"), ("halves", "two halves of the source")):
        shares = ", ".join(
            f"{fact} in {_share(right)} of {len(right)}" for fact, right in asdict(agreements[name]).items() if right
        )
        lines.append(f"{words} have the same {shares}")
    return "\n".join(lines)


def _share(right: list[bool]) -> str:
    """Share of right answers, with its interval."""
    low, high = interval(right)
    return f"{np.mean(right):.0%} ({low:.0%} to {high:.0%})"


def main() -> int:
    """Run the command; returns its exit status."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("model", metavar="BUNDLE", help="'starter', a bundle's folder or a hub id")
    add("--corpus", type=file_path, required=True, help="whose held-out captions and recordings are used")
    add("--items", type=int, default=40, help="sounds of each kind (default: 40)")
    add("--seed", type=int, default=0)
    add("--device", default="auto")
    add("--json", action="store_true", help="print all distances as JSON instead of a table")
    return guarded(lambda: _run(parser.parse_args()))


def _run(args: argparse.Namespace) -> None:
    if args.items < 1:
        raise UserError(f"--items must be at least 1, got {args.items}")
    model = StableAudio.from_pretrained(args.model, device=args.device)
    prompts = held_out_prompts(args.corpus, args.items, model.window_seconds)
    kinds, agreements = measure_seams(model, prompts, args.seed)
    data = {name: asdict(found) for name, found in kinds.items()}
    data |= {f"agreement of {name}": asdict(found) for name, found in agreements.items()}
    print_result(args.json, data, seams_table(kinds, agreements))


if __name__ == "__main__":
    sys.exit(main())
