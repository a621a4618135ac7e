"""`stable-audio-lite generate`: sound from text."""

from __future__ import annotations

import argparse
import re
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING

from stable_audio_lite.cli.options import add_model
from stable_audio_lite.cli.progress import ProgressBar
from stable_audio_lite.command import Commands, Failures, add_overwrite, check_outputs, file_path
from stable_audio_lite.errors import UserError

if TYPE_CHECKING:
    from stable_audio_lite.pipeline import Generated, StableAudio

_UNPROMPTED = "sound"  # stands for the prompt in names of files


def add_command(commands: Commands) -> None:
    """Add `generate` to the command line."""
    parser = commands.add_parser("generate", help="make sound from text", description="Make sound from text.")
    parser.set_defaults(run=_run)
    add = parser.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="what to hear; spectrogram models can do without")
    add("--prompts", metavar="FILE", type=file_path, help="a text file with one prompt per line, instead of PROMPT")
    add("--seconds", type=float, help="length of the sound (default: the model's window)")
    add("--seconds-start", type=float, help="where in the described piece the sound begins (default: 0)")
    add("--seconds-total", type=float, help="length of the described piece (default: it ends with the sound)")
    add("--seed", type=int, help="of the first item, the next one more each (default: random, printed)")
    add("--steps", type=int, help="sampling steps (default: the model's)")
    add("--cfg", type=float, help="guidance scale, 1 is none (default: the model's)")
    add("--rescale", type=float, help="0..1, guidance pulled back to the unguided level (default: the model's)")
    add("--negative", metavar="TEXT", help="what not to hear; replaces the unconditional half of guidance")
    add("--count", type=int, default=1, help="items per prompt (default: 1)")
    add("--batch", type=int, default=4, help="items sampled at once (default: 4)")
    add("--sampler", help="how to sample (default: the model's; an unknown name lists them)")
    add_model(parser, "starter")
    add("--lora", metavar="FOLDER", type=file_path, help="a LoRA that was trained for this model")
    add("--lora-strength", type=float, help="1 is as trained (default: 1)")
    output = "a .wav or .flac file (several items: numbered), or a folder (default: named after prompt and seed)"
    add("-o", "--output", type=file_path, help=output)
    add_overwrite(parser)
    peak = "bring the peak of each sound to DB, full scale being 0 (default: -1; without the option, as generated)"
    add("--normalize", type=float, nargs="?", const=-1.0, metavar="DB", help=peak)
    add("--plot", action="store_true", help="also write a spectrogram as .png beside each sound")


def _run(args: argparse.Namespace) -> int:
    prompts = _prompts(args)
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    items = [prompt for prompt in prompts or [_UNPROMPTED] for _ in range(args.count)]
    outputs = _outputs(args.output, items, seed)
    _check_outputs(args, outputs)

    started = time.perf_counter()
    from stable_audio_lite.pipeline import StableAudio

    model = StableAudio.from_pretrained(args.model, args.device, args.dtype, args.lora, args.lora_strength)
    loaded = time.perf_counter()
    seconds, failures = 0.0, Failures()
    with ProgressBar(len(items), lambda: _remarks(model, prompts, args.negative)) as progress:
        for first in range(0, len(items), args.batch):
            stop = min(first + args.batch, len(items))
            result = model.generate(
                items[first:stop] if prompts else None,
                count=1 if prompts else stop - first,
                seconds=args.seconds,
                seconds_start=args.seconds_start,
                seconds_total=args.seconds_total,
                seed=seed + first,
                steps=args.steps,
                cfg=args.cfg,
                rescale=args.rescale,
                negative=args.negative,
                sampler=args.sampler,
                batch=args.batch,
                progress=progress.within(first, stop),
            )
            for index, path in enumerate(outputs[first:stop]):
                progress.clear()
                with failures.of(path):
                    print(_save(args, result, index, path), flush=True)
            seconds += result.seconds * (stop - first)
    if not (status := failures.status(len(items))):
        _print_speed(model, seconds, loaded - started, time.perf_counter() - loaded)
    return status


def _remarks(model: StableAudio, prompts: list[str], negative: str | None) -> list[str]:
    """Say what the model won't read of prompts, or never saw."""
    texts = [*dict.fromkeys(prompts), *([negative] if negative else [])] if model.text_encoder else []
    assert model.text_encoder or not texts
    return [f"{text[:40]!r}: {remark}" for text in texts for remark in model.text_encoder.remarks(text)]


def _prompts(args: argparse.Namespace) -> list[str]:
    """One or several prompts, or none for a model that can do without."""
    if args.count < 1 or args.batch < 1:
        raise UserError(f"--count and --batch must be at least 1, got {args.count} and {args.batch}")
    if args.prompt is None and args.prompts is None and _needs_no_prompt(args.model):
        return []
    if (args.prompt is None) == (args.prompts is None):
        raise UserError("give either a PROMPT or --prompts FILE")
    if args.prompt is None:
        return _read_prompts(args.prompts)
    if not args.prompt.strip():
        raise UserError("the prompt is empty; say what you want to hear")
    return [args.prompt.strip()]


def _needs_no_prompt(model: str) -> bool:
    from stable_audio_lite.bundle import resolve
    from stable_audio_lite.systems import StableAudioConfig, load_system

    return not isinstance(load_system(resolve(model)), StableAudioConfig)


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text; give one prompt per line") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{path}: holds no prompts; write one per line")
    return prompts


def _outputs(output: Path | None, items: list[str], seed: int) -> list[Path]:
    """One path per item: the file itself, numbered files, or files in a folder."""
    if output is None or output.is_dir() or not output.suffix:
        folder = output or Path()
        return [folder / f"{_slug(prompt)}-{seed + i}.wav" for i, prompt in enumerate(items)]
    if len(items) == 1:
        return [output]
    digits = len(str(len(items)))
    return [output.with_stem(f"{output.stem}-{i + 1:0{digits}d}") for i in range(len(items))]


def _slug(prompt: str) -> str:
    return re.sub(r"\W+", "-", prompt.lower()).strip("-")[:40].rstrip("-") or _UNPROMPTED


def _check_outputs(args: argparse.Namespace, outputs: list[Path]) -> None:
    from stable_audio_lite.audio.io import check_writable

    for path in outputs:
        check_writable(path)
    pictures = [path.with_suffix(".png") for path in outputs] if args.plot else []
    if pictures:
        from stable_audio_lite.audio.plot import check_plottable

        check_plottable(pictures[0])
    check_outputs([*outputs, *pictures], overwrite=args.overwrite)


def _save(args: argparse.Namespace, result: Generated, index: int, path: Path) -> str:
    """Write one item and return the text to print."""
    gain = result.save(path, index, args.normalize)
    settings = result.settings[index]
    if args.plot:
        from stable_audio_lite.audio.plot import plot_spectrogram

        plot_spectrogram(path.with_suffix(".png"), result.audio[index], result.sample_rate, settings.get("prompt", ""))
    rest = ", ".join(f"{key} {value}" for key, value in settings.items() if key != "prompt" and value is not None)
    louder = f", {'amplified' if gain > 1 else 'attenuated'} to {gain:.3f}" if gain != 1 else ""
    return f"{path}: {settings.get('prompt', 'unprompted')}\n  {rest}{louder}"


def _print_speed(model: StableAudio, seconds: float, loading: float, working: float) -> None:
    print(
        f"{seconds:.1f} s of sound in {working:.1f} s (real-time factor {seconds / working:.2f}x) "
        f"after {loading:.1f} s of loading, on {model.device} in {str(model.dtype).removeprefix('torch.')}"
    )
