"""Adherence to prompts: every fact of held-out prompts, beside real recordings, the VAE alone and shuffled prompts.

    python -m evaluation.adherence starter --corpus corpus --items 200
    python -m evaluation.adherence starter --corpus corpus --tagger tagger --json
    python -m evaluation.adherence starter --corpus corpus --tagger tagger --cfg 3,6,9 --sampler dpmpp-2m,dpmpp-3m-sde
    python -m evaluation.adherence runs/vae/bundle --corpus piano --only-vae    # nothing is generated

Each prompt is the first caption of a held-out piece of the corpus, which names all its instruments. A sound is made for
it, as long as the piece but at most the window, untrimmed. Then:

- instruments, families: of the k that the piece has, the share among the k that the tagger finds most probable
- drums, style: as the tagger finds them; tempo within 4 %, key and mode by `evaluation.metrics.music`; each over those
  prompts that say it. Half, double, a third and thrice the tempo are counted apart
- end: whether sound ends within 0.5 s of the length that was asked for
- width: whether left - right beside left + right is within 6 dB of the piece's own

The ceiling ("real") is the same of the pieces' own recordings, "VAE" that of the recordings encoded and decoded by the
bundle's VAE, the floor ("shuffled") that of the sounds with each other's prompts; intervals are 95 % bootstrap. The
level between partials is compared with the recording's own where one sustained instrument plays alone: noise fills what
is quiet in the recording. With a whole CLAP: the Fréchet distance between the embeddings of half the sounds and of the
other half of the recordings, beside that between both halves of the recordings.

A setting with several values gives a line for every combination, the same seeds for all.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaluation.output import print_result
from evaluation.prompt_facts import Adherence, Analysis, HeldOutPrompt, ShareRight, analyse, score_adherence
from evaluation.tagger import load_tagger, train_on_corpus
from stable_audio_lite.audio.io import audio_info, read_audio
from stable_audio_lite.bundle import part_path, resolve
from stable_audio_lite.clap.checkpoints import load_clap
from stable_audio_lite.command import Parser, file_path, guarded
from stable_audio_lite.data.manifest import read_items
from stable_audio_lite.devices import choose_device
from stable_audio_lite.diffusion.samplers import SAMPLERS
from stable_audio_lite.errors import UserError
from stable_audio_lite.pipeline import StableAudio
from stable_audio_lite.representation import LatentRepresentation, load_latents
from stable_audio_lite.systems import load_model_config

SETTINGS: dict[str, Callable[[str], Any]] = {
    "sampler": str,
    "steps": int,
    "cfg": float,
    "rescale": float,
    "sigma_min": float,
    "sigma_max": float,
    "rho": float,
}
ITEMS, ITEMS_EACH = 200, 16  # prompts, and prompts for each of several combinations
_SHOWN = ("families", "instruments", "drums", "style", "end")  # of several combinations
_COLUMNS = {"n": 5, "right": 8, "95 %": 14, "real": 8, "VAE": 8, "VAE/real": 10, "shuffled": 10}  # widths

Analyser = Callable[..., Analysis]
"""`analyse` whose sample rate, tagger and CLAP are given."""


def held_out_prompts(corpus: Path, count: int, window: float) -> list[HeldOutPrompt]:
    """Prompts for the first `count` held-out pieces, each as long as its piece but at most `window` s.

    Raises:
        UserError: the corpus has fewer, or its pieces have no captions.
    """
    items = read_items(corpus / "held_out")[:count]
    if len(items) < count:
        raise UserError(f"{corpus / 'held_out'}: holds {len(items)} pieces, --items asks for {count}; render more")
    if mute := [item for item in items if not item.captions]:
        raise UserError(f"{mute[0].path}: has no caption; give a corpus that stable-audio-lite corpus rendered")
    return [HeldOutPrompt(item=i, text=i.captions[0], seconds=min(audio_info(i.path).seconds, window)) for i in items]


@torch.inference_mode()
def through_vae(latents: LatentRepresentation, audio: Tensor) -> Tensor:
    """(2, T) audio encoded (posterior mean) and decoded again, float32 on the CPU."""
    return latents.decode(latents.encode(audio[None].to(latents.device)), audio.shape[1])[0].cpu()


def analyse_recordings(
    find: Analyser, prompts: Sequence[HeldOutPrompt], sample_rate: int, vae: LatentRepresentation | None = None
) -> tuple[list[Analysis], list[Analysis]]:
    """Analyses of the pieces' recordings, and of the same through a VAE; none of these without one."""
    from tqdm import tqdm

    plain, passed = [], []
    for prompt in tqdm(prompts, unit="recording"):
        audio = read_audio(prompt.item.path, sample_rate)
        plain.append(find(audio))
        if vae is not None:
            passed.append(find(through_vae(vae, audio)))
    return plain, passed


def analyse_generated(
    find: Analyser, prompts: Sequence[HeldOutPrompt], model: StableAudio, seed: int
) -> tuple[list[Analysis], float]:
    """Analyses of a sound of the whole window for each prompt, and the mean seconds that it took to make one."""
    from tqdm import tqdm

    found, seconds = [], 0.0
    for number, prompt in enumerate(tqdm(prompts, unit="sound")):
        begun = time.perf_counter()
        made = model.generate(prompt.text, seconds_total=prompt.seconds, seed=seed + number)
        seconds += time.perf_counter() - begun
        found.append(find(made.audio[0], seconds=prompt.seconds))
    return found, seconds / len(prompts)


def combinations(chosen: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the chosen values, the last setting changing fastest."""
    return [dict(zip(chosen, values, strict=True)) for values in itertools.product(*chosen.values())]


def adherence_table(found: Adherence) -> str:
    """A line for each fact, and for what is measured otherwise."""
    rows = {row.name: _cells(row) for row in found.measures}
    used = {title: width for title, width in _COLUMNS.items() if any(cells[title] for cells in rows.values())}
    lines = [f"{'':14}" + "".join(f"{title:>{width}}" for title, width in used.items())]
    lines += [f"{name:14}" + "".join(f"{cells[t]:>{w}}" for t, w in used.items()) for name, cells in rows.items()]
    if found.width_kept is not None:
        lines.append(f"width within 3 dB through the VAE: {found.width_kept:.0%}")
    for name, level in found.valley.items():
        span = f" ({level.low:+.1f} to {level.high:+.1f})" if level.n > 1 else ""
        told = f"{level.median:+.1f} dB{span}, median of {level.n} sustained solos"
        lines.append(f"level between partials, {name} minus recordings: {told}")
    if (apart := found.frechet) is not None:
        sizes = f"{apart.n} and {apart.n} sounds"
        lines.append(f"Fréchet distance of CLAP embeddings ({sizes}): real to real {apart.real:.4f}")
        others = {"generated": apart.generated, "through the VAE": apart.vae}
        lines += [f"  {k} to real {v:.4f}: {v / apart.real:.1f} times" for k, v in others.items() if v is not None]
    return "\n".join(lines)


def _cells(row: ShareRight) -> dict[str, str]:
    ratio = row.vae / row.ceiling if row.vae is not None and row.ceiling else None
    shares = {"right": row.value, "real": row.ceiling, "VAE": row.vae, "VAE/real": ratio, "shuffled": row.floor}
    span = f"{row.low:.0%} to {row.high:.0%}" if row.low is not None and row.n > 1 else ""
    return {"n": str(row.n), "95 %": span} | {k: "" if v is None else f"{v:.0%}" for k, v in shares.items()}


def combination_heading(settings: Iterable[str]) -> str:
    """Names of the columns of `combination_line`."""
    return "".join(f"{name:>14}" for name in (*settings, *_SHOWN, "valley", "Fréchet", "s a sound"))


def combination_line(settings: dict[str, Any], found: Adherence, seconds: float) -> str:
    """One combination's results, of which each sound took `seconds`."""
    shares = {row.name: f"{row.value:.0%}" for row in found.measures}
    valley = f"{found.valley['generated'].median:+.1f} dB" if "generated" in found.valley else ""
    apart = f"{found.frechet.generated:.4f}" if found.frechet else ""
    cells = (*settings.values(), *(shares.get(name, "") for name in _SHOWN), valley, apart, f"{seconds:.2f}")
    return "".join(f"{cell!s:>14}" for cell in cells)


def main() -> int:
    """Run the command; returns its exit status."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("model", metavar="BUNDLE", help="'starter', a bundle's folder or a hub id")
    add("--corpus", type=file_path, required=True, help="whose held-out captions are the prompts")
    add("--tagger", type=file_path, help="folder that evaluation.tagger wrote (default: trains one)")
    add("--clap", metavar="SOURCE", help="for the Fréchet distance (default: the bundle's, if it is whole)")
    add("--items", type=int, help=f"prompts (default: {ITEMS}, or {ITEMS_EACH} for each of several combinations)")
    add("--seed", type=int, default=0)
    add("--device", default="auto")
    add("--only-vae", action="store_true", help="recordings beside the same through the VAE; nothing is generated")
    for name in SETTINGS:
        add(f"--{name.replace('_', '-')}", metavar="A,B,...", help="one or several (default: the model's)")
    add("--json", action="store_true", help="print JSON instead of a table")
    return guarded(lambda: _run(parser.parse_args()))


def _run(args: argparse.Namespace) -> None:
    chosen = {name: _values(name, text) for name in SETTINGS if (text := getattr(args, name)) is not None}
    settings = combinations(chosen)
    count = (ITEMS_EACH if len(settings) > 1 else ITEMS) if args.items is None else args.items
    if count < 4:
        raise UserError(f"--items must be at least 4, got {count}")
    if args.only_vae and chosen:
        raise UserError(f"--only-vae generates nothing; leave out --{next(iter(chosen)).replace('_', '-')}")
    folder = resolve(args.model)
    latents = load_latents(folder, load_model_config(folder)).to(choose_device(args.device), torch.float32)
    models: list[StableAudio] = []
    if not args.only_vae:
        model = StableAudio.from_pretrained(folder, device=args.device)
        models = [model.with_defaults(**own) for own in settings]
    prompts = held_out_prompts(args.corpus, count, latents.window_seconds)
    find = _analyser(args, folder, latents.sample_rate)
    vae = latents if len(settings) == 1 else None
    recordings, passed = analyse_recordings(find, prompts, latents.sample_rate, vae)
    if len(models) > 1:
        _print_combinations(args, settings, models, find, prompts, recordings)
        return
    generated = analyse_generated(find, prompts, models[0], args.seed)[0] if models else ()
    found = score_adherence(prompts, recordings, generated, passed)
    print_result(args.json, asdict(found), adherence_table(found))


def _analyser(args: argparse.Namespace, folder: Path, sample_rate: int) -> Analyser:
    tagger = load_tagger(args.tagger) if args.tagger else train_on_corpus(args.corpus)
    whole = part_path(folder, "audio_encoder").is_file()
    clap = load_clap(args.clap or folder) if args.clap or whole else None
    return partial(analyse, sample_rate=sample_rate, tagger=tagger, clap=clap)


def _print_combinations(
    args: argparse.Namespace,
    settings: Sequence[dict[str, Any]],
    models: Sequence[StableAudio],
    find: Analyser,
    prompts: Sequence[HeldOutPrompt],
    recordings: Sequence[Analysis],
) -> None:
    """Print a line for each model's settings as soon as it is there, or all as JSON."""
    rows = []
    if not args.json:
        print(combination_heading(settings[0]))
    for own, model in zip(settings, models, strict=True):
        generated, seconds = analyse_generated(find, prompts, model, args.seed)
        found = score_adherence(prompts, recordings, generated)
        rows.append({"settings": own, "seconds": seconds, **asdict(found)})
        if not args.json:
            print(combination_line(own, found, seconds), flush=True)
    if args.json:
        print_result(True, rows, "")


def _values(name: str, text: str) -> list[Any]:
    try:
        values = [SETTINGS[name](part.strip()) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--{name.replace('_', '-')}: {text!r} is no list of values such as 3,6,9") from error
    if name == "sampler" and (unknown := set(values) - SAMPLERS.keys()):
        raise UserError(f"--sampler: unknown {min(unknown)}; choose some of {', '.join(SAMPLERS)}")
    return values


if __name__ == "__main__":
    sys.exit(main())
