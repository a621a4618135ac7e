"""`stable-audio-lite generate`: sound from text, or from sound and text."""

from __future__ import annotations

import argparse
import itertools
import secrets
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stable_audio_lite.cli.options import add_sampling, check_count, sampling_of, stretch
from stable_audio_lite.cli.progress import ProgressBar
from stable_audio_lite.cli.prompts import prompts_of
from stable_audio_lite.command import Commands, Failures, check_outputs, file_path
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import UNPROMPTED, file_stem
from stable_audio_lite.wording import beats_of, tempo_of

if TYPE_CHECKING:
    from stable_audio_lite.edits import Edit
    from stable_audio_lite.pipeline import Generated, StableAudio

_ABOUT = """Make sound from text, or from sound and text:

--init FILE --strength 0.6              a variation of FILE
--init FILE --inpaint 2.0-3.5 5-6       stretches of FILE made anew, the rest as it is
--loop --bars 4 --bpm 120               a sound whose end meets its beginning

FILE's own prompt is used where it holds one and none is given. `continue` goes on where a sound ends."""


def add_command(commands: Commands) -> None:
    """Add `generate` to the command line."""
    parser = commands.add_parser("generate", help="make sound from text, or from sound", description=_ABOUT)
    parser.set_defaults(run=_run)
    add = parser.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="what to hear; spectrogram models can do without")
    add("--prompts", metavar="FILE", type=file_path, help="a text file with one prompt per line, instead of PROMPT")
    add("--seconds", type=float, help="length of the sound (default: the model's window, or that of FILE)")
    add("--init", metavar="FILE", type=file_path, help="a sound to start from")
    add(
        "--strength",
        type=float,
        help="of a variation: 0 gives FILE as the model renders it, 1 ignores it (default: 0.6)",
    )
    add("--inpaint", nargs="+", metavar="START-END", type=stretch, help="stretches of FILE to make anew, in seconds")
    add("--loop", action="store_true", help="make the sound's end meet its beginning")
    add("--bars", type=int, help="length of a loop, at the tempo of the prompt or --bpm; a waltz has 3 beats a bar")
    add_sampling(parser)
    add("--batch", type=int, default=4, help="items sampled at once (default: 4)")
    output = "a .wav or .flac file (several items: numbered), or a folder (default: named after prompt and seed)"
    add("-o", "--output", type=file_path, help=output)
    peak = "bring the peak of each sound to DB, full scale being 0 (default: -1; without the option, as generated)"
    add("--normalize", type=float, nargs="?", const=-1.0, metavar="DB", help=peak)
    add("--plot", action="store_true", help="also write a spectrogram as .png beside each sound")


def _run(args: argparse.Namespace) -> int:
    _check_options(args)
    prompts = prompts_of(args, args.init)
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    items = [prompt for prompt in prompts or [UNPROMPTED] for _ in range(args.count)]
    outputs = _outputs(args.output, items, seed)
    _check_outputs(args, outputs)

    started = time.perf_counter()
    from stable_audio_lite.pipeline import StableAudio

    model = StableAudio.from_pretrained(args.model, args.device, args.dtype, args.lora, args.lora_strength)
    edits = _edits(args, model, items)
    loaded = time.perf_counter()
    seconds, failures = 0.0, Failures()
    with ProgressBar(len(items), lambda: model.remarks(texts_of(prompts, args.negative))) as progress:
        for first, stop in _batches(edits, args.batch):
            result = model.generate(
                items[first:stop] if prompts else None,
                count=1 if prompts else stop - first,
                seed=seed + first,
                batch=args.batch,
                edit=edits[first],
                progress=progress.within(first, stop),
                **sampling_of(args),
            )
            for index, path in enumerate(outputs[first:stop]):
                progress.clear()
                with failures.of(path):
                    print(_save(args, result, index, path), flush=True)
            seconds += result.seconds * (stop - first)
    if not (status := failures.status(len(items))):
        _print_speed(model, seconds, loaded - started, time.perf_counter() - loaded)
    return status


def texts_of(prompts: Sequence[str], negative: str | None) -> list[str]:
    """List all that a model reads."""
    return [*prompts, *([negative] if negative else [])]


def _check_options(args: argparse.Namespace) -> None:
    check_count(args.count)
    if args.batch < 1:
        raise UserError(f"--batch must be at least 1, got {args.batch}")
    if args.normalize is not None and not -100 <= args.normalize <= 0:
        raise UserError(f"--normalize must lie in -100..0 dB, got {args.normalize:g}")
    if args.loop and args.init:
        raise UserError("--loop: is made from nothing but the prompt; leave out --init, or --loop")
    for name, needed in (("strength", "init"), ("inpaint", "init"), ("bars", "loop")):
        if getattr(args, name) is not None and not getattr(args, needed):
            raise UserError(f"--{name}: needs --{needed}{' FILE' if needed == 'init' else ''}")
    if args.inpaint and args.strength is not None:
        raise UserError("--strength: is of variations; what is inpainted is made anew, so leave it out")


def _edits(args: argparse.Namespace, model: StableAudio, items: Sequence[str]) -> list[Edit]:
    """Make the edit of each item; the same object for those that can be sampled together."""
    from stable_audio_lite.edits import Edit, Inpainting, Loop, Sound, Variation

    if args.loop:
        tempos = [(args.bpm or tempo_of(prompt), beats_of(prompt)) for prompt in items]
        loops = {tempo: Loop(args.bars, *tempo) for tempo in tempos}
        return [loops[tempo] for tempo in tempos]
    edit = Edit()
    if args.init:
        sound = Sound.read(args.init, model.sample_rate)
        edit = Variation(sound, 0.6 if args.strength is None else args.strength)
        edit = Inpainting(sound, args.inpaint) if args.inpaint else edit
    return [edit] * len(items)


def _batches(edits: Sequence[Edit], batch: int) -> Iterator[tuple[int, int]]:
    """First and last item, plus one, of what is sampled at once."""
    for _, alike in itertools.groupby(range(len(edits)), key=lambda item: id(edits[item])):
        run = list(alike)
        for first in run[::batch]:
            yield first, min(first + batch, run[-1] + 1)


def _outputs(output: Path | None, items: list[str], seed: int) -> list[Path]:
    """One path per item: the file itself, numbered files, or files in a folder."""
    if output is None or output.is_dir() or not output.suffix:
        folder = output or Path()
        return [folder / f"{file_stem(prompt)}-{seed + i}.wav" for i, prompt in enumerate(items)]
    return numbered(output, len(items))


def numbered(output: Path, items: int) -> list[Path]:
    """The path itself for one item, or one with a number for each of several."""
    digits = len(str(items))
    several = [output.with_stem(f"{output.stem}-{i + 1:0{digits}d}") for i in range(items)]
    return several if items > 1 else [output]


def _check_outputs(args: argparse.Namespace, outputs: list[Path]) -> None:
    from stable_audio_lite.audio.io import check_writable

    for path in outputs:
        check_writable(path)
    pictures = [path.with_suffix(".png") for path in outputs] if args.plot else []
    if pictures:
        from stable_audio_lite.audio.plot import check_plottable

        check_plottable(pictures[0])
    check_outputs([*outputs, *pictures], [args.init] if args.init else [], overwrite=args.overwrite)


def _save(args: argparse.Namespace, result: Generated, index: int, path: Path) -> str:
    """Write one item and return the text to print."""
    gain = result.save(path, index, args.normalize)
    settings = result.settings[index]
    if args.plot:
        from stable_audio_lite.audio.plot import plot_spectrogram

        plot_spectrogram(path.with_suffix(".png"), result.audio[index], result.sample_rate, settings.get("prompt", ""))
    louder = f", {'amplified' if gain > 1 else 'attenuated'} to {gain:.3f}" if gain != 1 else ""
    return f"{told(path, settings)}{louder}"


def told(path: Path, settings: dict[str, object]) -> str:
    """Lines that say what a file holds and how it was made."""
    rest = ", ".join(f"{key} {value}" for key, value in settings.items() if key != "prompt" and value is not None)
    return f"{path}: {settings.get('prompt', 'unprompted')}\n  {rest}"


def _print_speed(model: StableAudio, seconds: float, loading: float, working: float) -> None:
    print(
        f"{seconds:.1f} s of sound in {working:.1f} s (real-time factor {seconds / working:.2f}x) "
        f"after {loading:.1f} s of loading, on {model.device} in {str(model.dtype).removeprefix('torch.')}"
    )
