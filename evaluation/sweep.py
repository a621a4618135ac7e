"""Which settings suit a model: adherence to held-out prompts for every combination, the same seeds for all.

    python -m evaluation.sweep starter --corpus corpus --tagger tagger --cfg 3,6,9 --sampler dpmpp-2m,dpmpp-3m-sde
    python -m evaluation.sweep starter --corpus corpus --tagger tagger --steps 25,50,100 --sigma-max 50,100

What is not given stays at the model's default. Prints a line for each combination; the columns are explained in
`evaluation.adherence`.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from evaluation.adherence import Distances, Measure, distances, generate, measure, requests_of
from evaluation.tagger import load_tagger, train_on_corpus
from stable_audio_lite.clap.checkpoints import read_checkpoint
from stable_audio_lite.diffusion.samplers import SAMPLERS
from stable_audio_lite.errors import UserError
from stable_audio_lite.pipeline import StableAudio

SETTINGS: dict[str, Callable[[str], Any]] = {
    "sampler": str,
    "steps": int,
    "cfg": float,
    "rescale": float,
    "sigma_min": float,
    "sigma_max": float,
    "rho": float,
}
SHOWN = ("families", "instruments", "drums", "style", "end")


def combinations(chosen: dict[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the chosen values, the last setting changing fastest."""
    return [dict(zip(chosen, values, strict=True)) for values in itertools.product(*chosen.values())]


def with_settings(model: StableAudio, settings: dict[str, Any]) -> StableAudio:
    """The same weights with other defaults for generation.

    Raises:
        UserError: a value is out of range.
    """
    try:
        generation = replace(model.config.generation, **settings)
    except ValueError as error:
        raise UserError(str(error)) from error
    config = replace(model.config, generation=generation)
    parts = {name: getattr(model, name) for name in ("vae", "text_encoder", "conditioner", "unet")}
    return StableAudio(model.folder, config, **parts, lora=model.lora).to(model.device, model.dtype)


def heading(chosen: dict[str, Sequence[Any]]) -> str:
    """Names of the columns."""
    return "".join(f"{name:>14}" for name in (*chosen, *SHOWN)) + f"{'Fréchet':>10}{'s a sound':>11}"


def line(settings: dict[str, Any], measures: Sequence[Measure], apart: Distances | None, seconds: float) -> str:
    """One combination's results."""
    found = {row.name: f"{row.value:.0%}" for row in measures}
    cells = [*map(str, settings.values()), *(found.get(name, "") for name in SHOWN)]
    return "".join(f"{cell:>14}" for cell in cells) + f"{f'{apart.generated:.4f}' if apart else '':>10}{seconds:11.2f}"


def main() -> None:
    """Run the command; mistakes end in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="BUNDLE", help="'starter', a bundle's folder or a hub id")
    parser.add_argument("--corpus", type=Path, required=True, help="whose held-out captions are the prompts")
    parser.add_argument("--tagger", type=Path, help="folder that evaluation.tagger wrote (default: trains one)")
    parser.add_argument("--items", type=int, default=16, help="prompts for each combination (default: 16)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    for name in SETTINGS:
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="A,B,...")
    args = parser.parse_args()
    try:
        chosen = {name: _values(name, text) for name in SETTINGS if (text := getattr(args, name)) is not None}
        if not chosen or args.items < 4:
            raise UserError("give at least one setting to change, such as --cfg 3,6,9, and at least 4 --items")
        model = StableAudio.from_pretrained(args.model, device=args.device)
        variants = [(settings, with_settings(model, settings)) for settings in combinations(chosen)]
        requests = requests_of(args.corpus, args.items, model.config.window_seconds, args.seed)
        tagger = load_tagger(args.tagger) if args.tagger else train_on_corpus(args.corpus)
        clap, rate = read_checkpoint(model.folder).clap(), model.config.sample_rate
        print(heading(chosen))
        for settings, variant in variants:
            begun = time.perf_counter()
            sounds = generate(variant, requests, args.seed)
            seconds = (time.perf_counter() - begun) / len(sounds)
            apart = distances(clap, requests, sounds, rate) if clap else None
            print(line(settings, measure(tagger, requests, sounds, rate), apart, seconds), flush=True)
    except UserError as error:
        sys.exit(f"error: {error}")


def _values(name: str, text: str) -> list[Any]:
    try:
        values = [SETTINGS[name](part.strip()) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--{name.replace('_', '-')}: {text!r} is no list of values such as 3,6,9") from error
    if name == "sampler" and (unknown := set(values) - SAMPLERS.keys()):
        raise UserError(f"--sampler: unknown {min(unknown)}; choose some of {', '.join(SAMPLERS)}")
    return values


if __name__ == "__main__":
    main()
