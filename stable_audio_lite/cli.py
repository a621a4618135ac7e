"""The `stable-audio-lite` command: generate, restore, encode, decode, info, corpus, plan, evaluate, doctor and more.

Nothing heavy is imported before the arguments are known to be good, so mistakes and `--help` answer at once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from stable_audio_lite.errors import UserError

if TYPE_CHECKING:
    from tqdm import tqdm

    from stable_audio_lite.generation import Generated, Pipeline
    from stable_audio_lite.restoration.degradations import Task

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_UNPROMPTED = "sound"  # stands for the prompt in names of files
_TASK_OPTIONS = {"inpaint": "gap", "bandwidth": "cutoff", "denoise": "noise_db", "dereverb": "room"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage that argparse would print before it."""
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Every mistake becomes one line on stderr."""
    args = _parser().parse_args(argv)
    warnings.filterwarnings("ignore")
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone; leave the interpreter nothing to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemoryError:
        message = "out of memory; lower --batch or --seconds"
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        message = "out of memory; lower --batch or --seconds, or choose another --device"
    print(f"error: {message}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="stable-audio-lite", description="Text to music and sound.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    _add_generate(commands)
    _add_restore(commands)
    _add_encode(commands)
    _add_decode(commands)
    _add_info(commands)
    _add_corpus(commands)
    _add_validate_dataset(commands)
    _add_plan(commands)
    _add_evaluate(commands)
    _add_doctor(commands)
    return parser


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser("generate", help="make sound from text", description="Make sound from text.")
    parser.set_defaults(run=_generate)
    add = parser.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="what to hear; spectrogram models can do without")
    add("--prompts", metavar="FILE", type=Path, help="a text file with one prompt per line, instead of PROMPT")
    add("--seconds", type=float, help="length of the sound (default: the model's window)")
    add("--seed", type=int, help="of the first item, the next one more each (default: random, printed)")
    add("--steps", type=int, help="sampling steps (default: the model's)")
    add("--cfg", type=float, help="guidance scale, 1 is none (default: the model's)")
    add("--negative", metavar="TEXT", help="what not to hear; replaces the unconditional half of guidance")
    add("--count", type=int, default=1, help="items per prompt (default: 1)")
    add("--batch", type=int, default=4, help="items sampled at once (default: 4)")
    add("--sampler", help="how to sample (default: the model's; an unknown name lists them)")
    _add_model(parser)
    add("--lora", metavar="FOLDER", type=Path, help="a LoRA that was trained for this model")
    add("--lora-strength", type=float, default=1.0, help="1 is as trained (default: 1)")
    add(
        "-o",
        "--output",
        type=Path,
        help="a .wav or .flac file (several items: numbered), or a folder (default: named after prompt and seed)",
    )
    add("--plot", action="store_true", help="also write a spectrogram as .png beside each sound")


def _add_model(parser: argparse.ArgumentParser, default: str = "starter") -> None:
    add = parser.add_argument
    add("--model", default=default, help=f"a shipped model, a bundle's folder or a hub id (default: {default})")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ... (default: auto)")
    add("--dtype", default="auto", choices=_DTYPES, help="number type of the weights (default: auto)")


def _add_restore(commands: Any) -> None:
    about = "Repair a sound file of any length: missing stretches or frequencies, noise, reverberation."
    parser = commands.add_parser("restore", help="repair a sound file", description=about)
    parser.set_defaults(run=_restore)
    add = parser.add_argument
    add("file", metavar="IN", type=Path, help="the sound")
    add("-o", "--output", type=Path, required=True, help="a .wav or .flac file")
    add("--task", required=True, choices=tuple(_TASK_OPTIONS), help="what is wrong with it")
    add("--gap", nargs="+", metavar="START-END", help="inpaint: what is missing, in seconds, as in 1.5-1.8")
    add(
        "--cutoff", type=float, metavar="HZ", help="bandwidth: where the sound's frequencies end (default: by its rate)"
    )
    add("--noise-db", type=float, metavar="DB", help="denoise: level, full scale is 0 (default: estimated)")
    add("--room", type=Path, metavar="FILE", help="dereverb: the room's impulse response (default: estimated)")
    add("--steps", type=int, default=50, help="sampling steps (default: 50)")
    add("--eta", type=float, default=0.8, help="share of fresh noise in what is unknown, 0..1 (default: 0.8)")
    add("--eta-b", type=float, default=0.8, help="weight of what is known, 0..1 (default: 0.8)")
    add("--seed", type=int, help="of the noise (default: random, printed)")
    add("--batch", type=int, default=4, help="windows worked on at once (default: 4)")
    _add_model(parser, "restorer")


def _add_encode(commands: Any) -> None:
    about = "Encode audio files of any length to latents, in constant memory."
    parser = commands.add_parser("encode", help="audio files to latents", description=about)
    parser.set_defaults(run=_encode)
    _add_files(parser, "audio files", "folder for NAME.safetensors")


def _add_decode(commands: Any) -> None:
    about = "Decode latents of any length to sound, in constant memory."
    parser = commands.add_parser("decode", help="latents to audio files", description=about)
    parser.set_defaults(run=_decode)
    _add_files(parser, "what encode wrote", "folder for the sounds")
    parser.add_argument("--format", default="wav", choices=("wav", "flac"), help="of the sounds (default: wav)")
    parser.add_argument("--overwrite", action="store_true", help="replace sounds that are there")


def _add_files(parser: argparse.ArgumentParser, files: str, output: str) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", type=Path, help=files)
    parser.add_argument("-o", "--output", type=Path, required=True, help=output)
    _add_model(parser, "starter-vae")


def _add_info(commands: Any) -> None:
    parser = commands.add_parser(
        "info",
        help="parameters, shape and window of a model",
        description="Parameters, shape and window of a model of any kind, or what is stored in a generated file.",
    )
    parser.set_defaults(run=_info)
    parser.add_argument("path", help="a model config (.yaml), a bundle (folder, hub id, 'starter'), or a .wav or .flac")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _generate(args: argparse.Namespace) -> None:
    prompts = _prompts(args)
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    items = [prompt for prompt in prompts or [_UNPROMPTED] for _ in range(args.count)]
    outputs = _outputs(args.output, items, seed)
    _check_outputs(outputs, args.plot)

    started = time.perf_counter()
    from stable_audio_lite.pipeline import load_pipeline

    model = load_pipeline(args.model, args.device, args.dtype, args.lora, args.lora_strength)
    loaded = time.perf_counter()
    seconds = 0.0
    with _Progress(len(items)) as progress:
        for first in range(0, len(items), args.batch):
            stop = min(first + args.batch, len(items))
            result = model.generate(
                items[first:stop] if prompts else None,
                count=1 if prompts else stop - first,
                seconds=args.seconds,
                seed=seed + first,
                steps=args.steps,
                cfg=args.cfg,
                negative=args.negative,
                sampler=args.sampler,
                batch=args.batch,
                progress=progress.within(first, stop),
            )
            for index, path in enumerate(outputs[first:stop]):
                progress.say(_store(result, index, path, args.plot))
            seconds += result.seconds * (stop - first)
    _print_speed(model, seconds, loaded - started, time.perf_counter() - loaded)


def _prompts(args: argparse.Namespace) -> list[str]:
    """One or several prompts, or none for a model that can do without."""
    if args.count < 1 or args.batch < 1:
        raise UserError(f"--count and --batch must be at least 1, got {args.count} and {args.batch}")
    if args.prompt is None and args.prompts is None:
        from stable_audio_lite.bundle import resolve
        from stable_audio_lite.systems import SPECTRAL, load_system

        if load_system(resolve(args.model)).kind in SPECTRAL:
            return []
    if (args.prompt is None) == (args.prompts is None):
        raise UserError("give either a PROMPT or --prompts FILE")
    if args.prompt is not None:
        if not args.prompt.strip():
            raise UserError("the prompt is empty; say what you want to hear")
        return [args.prompt.strip()]
    try:
        lines = args.prompts.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"{args.prompts}: can't be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{args.prompts}: not UTF-8 text; give one prompt per line") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{args.prompts}: holds no prompts; write one per line")
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


def _check_outputs(outputs: list[Path], plot: bool) -> None:
    from stable_audio_lite.audio.io import check_writable

    for path in outputs:
        check_writable(path)
    if plot:
        from stable_audio_lite.audio.plot import check_plottable

        check_plottable(outputs[0].with_suffix(".png"))


def _store(result: Generated, index: int, path: Path, plot: bool) -> str:
    """Write one item; returns the text to print."""
    gain = result.save(path, index)
    settings = result.settings[index]
    if plot:
        from stable_audio_lite.audio.plot import plot_spectrogram

        plot_spectrogram(path.with_suffix(".png"), result.audio[index], result.sample_rate, settings.get("prompt", ""))
    rest = ", ".join(f"{key} {value}" for key, value in settings.items() if key != "prompt" and value is not None)
    quieter = f", attenuated to {gain:.3f}" if gain < 1 else ""
    return f"{path}: {settings.get('prompt', 'unprompted')}\n  {rest}{quieter}"


def _print_speed(model: Pipeline, seconds: float, loading: float, working: float) -> None:
    print(
        f"{seconds:.1f} s of sound in {working:.1f} s (real-time factor {seconds / working:.2f}x) "
        f"after {loading:.1f} s of loading, on {model.device} in {str(model.dtype).removeprefix('torch.')}"
    )


class _Progress:
    """A bar on stderr over all items, which shows itself at the first step: a refused request has none."""

    def __init__(self, items: int):
        self._items = items
        self._bar: tqdm[NoReturn] | None = None

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def within(self, first: int, stop: int) -> Callable[[int, int], None]:
        """A callback (steps done, steps in all) for the batch first..stop."""

        def update(done: int, total: int) -> None:
            if self._bar is None:
                from tqdm import tqdm

                layout = "{l_bar}{bar}| {n:.2f}/{total} [{elapsed}<{remaining}]"
                self._bar = tqdm(total=self._items, leave=False, bar_format=layout)
            self._bar.update(first + (stop - first) * done / total - self._bar.n)

        return update

    def say(self, text: str) -> None:
        """Print to stdout without breaking the bar."""
        if self._bar is not None:
            self._bar.clear()
        print(text, flush=True)


def _restore(args: argparse.Namespace) -> None:
    for name, option in _TASK_OPTIONS.items():
        if name != args.task and getattr(args, option) is not None:
            raise UserError(f"--{option.replace('_', '-')}: belongs to --task {name}, not to {args.task}")
    gaps = tuple(_gap(text) for text in args.gap or ())
    from stable_audio_lite.audio.io import audio_info, check_writable

    check_writable(args.output)
    rate = audio_info(args.file).sample_rate
    from stable_audio_lite.restoration.restorer import Restorer, RestoreSettings

    settings = RestoreSettings(steps=args.steps, eta=args.eta, eta_b=args.eta_b, seed=args.seed, batch=args.batch)
    model = Restorer.from_pretrained(args.model, args.device, args.dtype)
    started = time.perf_counter()
    with _Progress(1) as progress:
        task = _task(args, gaps, rate, model.sample_rate)
        done = model.restore_file(args.file, args.output, task, settings, progress.within(0, 1))
    rest = ", ".join(f"{key} {value}" for key, value in done.settings.items() if value is not None)
    quieter = f", attenuated to {done.gain:.3f}" if done.gain < 1 else ""
    working = time.perf_counter() - started
    print(f"{args.output}: {rest}{quieter}\n{done.seconds:.1f} s of sound in {working:.1f} s on {model.device}")


def _gap(text: str) -> tuple[float, float]:
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)-(\d+\.?\d*|\.\d+)", text)
    if not match:
        raise UserError(f"--gap: {text!r} is not START-END in seconds, as in 1.5-1.8")
    return float(match[1]), float(match[2])


def _task(args: argparse.Namespace, gaps: tuple[tuple[float, float], ...], rate: int, model_rate: int) -> Task:
    from stable_audio_lite.audio.io import read_audio
    from stable_audio_lite.restoration.degradations import Bandwidth, Denoise, Dereverb, Inpaint

    if args.task == "inpaint":
        return Inpaint(gaps)
    if args.task == "bandwidth":
        if args.cutoff is None and rate >= model_rate:
            raise UserError(f"--task bandwidth: give --cutoff, for {args.file} has a rate of {rate} Hz")
        return Bandwidth(rate / 2 if args.cutoff is None else args.cutoff)
    if args.task == "denoise":
        return Denoise(args.noise_db)
    return Dereverb(None if args.room is None else read_audio(args.room, model_rate).mean(0))


def _encode(args: argparse.Namespace) -> None:
    outputs = _renamed(args.files, args.output, ".safetensors")
    from stable_audio_lite.codec import Codec

    codec = Codec.from_pretrained(args.model, args.device, args.dtype)
    for path, output in zip(args.files, outputs, strict=True):
        made = codec.encode_file(path, output)
        print(f"{output}: {made.channels} channels x {made.frames} frames, {made.seconds:.2f} s", flush=True)


def _decode(args: argparse.Namespace) -> None:
    outputs = _renamed(args.files, args.output, f".{args.format}")
    if not args.overwrite and (there := [path for path in outputs if path.exists()]):
        raise UserError(
            f"{there[0]}: is there already, perhaps the original; choose another folder or give --overwrite"
        )
    from stable_audio_lite.codec import Codec

    codec = Codec.from_pretrained(args.model, args.device, args.dtype)
    for path, output in zip(args.files, outputs, strict=True):
        gain = codec.decode_file(path, output)
        print(f"{output}{f': attenuated to {gain:.3f}' if gain < 1 else ''}", flush=True)


def _renamed(files: list[Path], folder: Path, suffix: str) -> list[Path]:
    """A path in `folder` for each file; two files of one name would overwrite each other."""
    if folder.is_file():
        raise UserError(f"{folder}: is a file; -o is the folder to write to")
    if missing := [path for path in files if not path.is_file()]:
        raise UserError(f"{missing[0]}: no such file")
    outputs = [folder / f"{path.stem}{suffix}" for path in files]
    if len(set(outputs)) < len(outputs):
        twice = next(path for path in outputs if outputs.count(path) > 1)
        raise UserError(f"two of the files would become {twice}; rename one or run the command twice")
    return outputs


def _info(args: argparse.Namespace) -> None:
    if Path(args.path).suffix.lower() in (".wav", ".flac"):
        from stable_audio_lite.audio.io import audio_info, read_metadata

        header, stored = audio_info(args.path), read_metadata(args.path).settings
        facts = {"sample_rate": header.sample_rate, "channels": header.channels, "seconds": header.seconds, **stored}
    else:
        from stable_audio_lite.describe import describe

        facts = describe(args.path)
    if args.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    for key, value in _flat(facts):
        rounded = f" ({value / 1e6:.1f} M)" if key.startswith("parameters.") else ""
        print(f"{key:28} {value}{rounded}")


def _flat(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in facts.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            rows.append((prefix + key, " x ".join(map(str, value))))
        else:
            rows.append((prefix + key, value))
    return rows


def _add_corpus(commands: Any) -> None:
    parser = commands.add_parser(
        "corpus",
        help="compose and render captioned music to train on",
        description="Compose and render captioned music to train on; the same seed gives the same corpus.",
    )
    parser.set_defaults(run=_corpus)
    add = parser.add_argument
    add("output", metavar="OUT", type=Path, help="the folder to write")
    add("--items", type=int, default=1000, help="pieces to train on (default: 1000)")
    add("--held-out", type=int, default=100, help="further pieces, kept apart (default: 100)")
    add("--seed", type=int, default=0, help="of the whole corpus (default: 0)")
    add("--workers", type=int, help="processes (default: one per core)")
    add("--min-seconds", type=float, default=4.0, help="shortest piece (default: 4)")
    add("--max-seconds", type=float, default=30.0, help="longest piece (default: 30)")
    add("--max-parts", type=int, default=4, help="most instruments in a piece, drums apart: 1 for solos (default: 4)")
    add("--instruments", metavar="A,B", type=_names, help="who may play, for instance 'piano, flute' (default: all)")
    add("--styles", metavar="A,B", type=_names, help="what may be played, for instance 'jazz, waltz' (default: all)")
    add("--no-drums", action="store_true", help="no piece has drums")
    add("--format", default="flac", choices=("flac", "wav"), help="of the audio files (default: flac)")
    add("--soundfont", metavar="FILE.sf2", help="General MIDI sounds (default: the system's)")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _corpus(args: argparse.Namespace) -> None:
    from stable_audio_lite.corpus.build import build_corpus

    report = build_corpus(
        args.output,
        items=args.items,
        held_out=args.held_out,
        seed=args.seed,
        workers=args.workers,
        min_seconds=args.min_seconds,
        max_seconds=args.max_seconds,
        max_parts=args.max_parts,
        instruments=args.instruments,
        styles=args.styles,
        drums=not args.no_drums,
        audio_format=args.format,
        soundfont=args.soundfont,
    )
    hours = report.seconds / 3600
    print(f"{args.output}: {report.rendered} pieces rendered, {report.kept} kept, {hours:.2f} h in all")


def _add_validate_dataset(commands: Any) -> None:
    parser = commands.add_parser(
        "validate-dataset",
        help="what is in a data set, and what is wrong with it",
        description="Read every file of a data set: hours, rates, channels; broken, silent, clipped or uncaptioned "
        "files. The exit status is 1 if a file is broken.",
    )
    parser.set_defaults(run=_validate_dataset)
    parser.add_argument("path", metavar="DATA", help="a folder of audio, WebDataset shards or a Hugging Face data set")
    parser.add_argument("--workers", type=int, default=4, help="files read at once (default: 4)")
    parser.add_argument("--json", action="store_true", help="print JSON with every faulty file")


def _validate_dataset(args: argparse.Namespace) -> int:
    from stable_audio_lite.data.validate import validate

    if args.workers < 1:
        raise UserError(f"--workers must be at least 1, got {args.workers}")
    report = validate(args.path, args.workers)
    print(json.dumps(report.as_json(), indent=2) if args.json else report.as_text())
    return 1 if "broken" in report.faults else 0


def _add_plan(commands: Any) -> None:
    parser = commands.add_parser(
        "plan",
        help="what a training run will take: memory, disk, time",
        description="Parameters, memory by part, disk, speed, time to finish and the largest batch of a training run, "
        "measured over a few of its steps on this machine. Nothing is written.",
    )
    parser.set_defaults(run=_plan)
    parser.add_argument("config", metavar="CONFIG", type=Path, help="a trainer's YAML file")
    parser.add_argument("--steps", type=int, default=3, help="steps to time (default: 3)")
    parser.add_argument("--processes", type=int, default=1, help="of the run (default: 1)")
    parser.add_argument("--profile", action="store_true", help="also show which operations take the time of a step")


def _plan(args: argparse.Namespace) -> None:
    if args.steps < 1 or args.processes < 1:
        raise UserError(f"--steps and --processes must be at least 1, got {args.steps} and {args.processes}")
    from training.plan import plan

    print(plan(args.config, steps=args.steps, processes=args.processes, profiled=args.profile).as_text())


def _add_evaluate(commands: Any) -> None:
    from evaluation.options import ABOUT, add_arguments

    layout = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(
        "evaluate", help="how good generated sounds are, beside recordings", description=ABOUT, formatter_class=layout
    )
    parser.set_defaults(run=_evaluate)
    add_arguments(parser)


def _evaluate(args: argparse.Namespace) -> None:
    from evaluation.options import options_of

    options = options_of(args)
    from evaluation.run import run

    run(options)


def _add_doctor(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="what is wrong with this installation or a text encoder",
        description="Look at packages, programs, the device, and whether a text encoder tells captions apart. The exit "
        "status is 1 if something is bad.",
    )
    parser.set_defaults(run=_doctor)
    parser.add_argument(
        "source",
        nargs="?",
        default="starter",
        metavar="MODEL",
        help="'starter', a bundle's folder, or a CLAP: transformers folder, hub id or LAION .pt (default: starter)",
    )


def _doctor(args: argparse.Namespace) -> int:
    from stable_audio_lite.doctor import examine

    findings = examine(args.source)
    print("\n".join(finding.as_text() for finding in findings))
    return int(any(finding.state == "bad" for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
