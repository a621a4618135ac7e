"""Measure generated sounds against recordings, and store what was found.

    python -m evaluation.run music/ corpus/held_out --clap starter --metrics fd_clap,clap_score -o result.json
    accelerate launch --num_processes 8 -m evaluation.run music/ recordings/ --vae starter

Every figure stands beside the same metric between halves of the recordings, for white noise, with shuffled captions and
through the VAE alone, with its 95 % bootstrap interval over the generated sounds. `--training DATA` lists the training
sounds that are most like each, beside how like them the recordings are. Embeddings are kept: the same command goes on
where it was stopped.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from evaluation.case import Case
from evaluation.embedders import Embedder, load_embedder
from evaluation.embedding import Describer, Listener, Store, embed_all, in_parallel
from evaluation.frechet import load_statistics, save_statistics
from evaluation.manifest import set_hash, versions
from evaluation.metrics import DEFAULTS, METRICS, embedder_of, measure
from evaluation.options import ABOUT, Options, add_arguments, options_of
from evaluation.result import Figure, Missing, Nearest, Result, Sound, as_text, partners, save_result
from evaluation.sounds import Clip, RoundTrip, examine, white_noise
from evaluation.streams import Level
from stable_audio_lite.audio.io import Stored
from stable_audio_lite.data.item import Item
from stable_audio_lite.data.manifest import read_items
from stable_audio_lite.devices import choose_device
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import check_place, sha256

_PATIENCE = timedelta(days=7)  # that a process waits for the others, whose files may be longer, or not embedded yet
_LIKENESS = ("clap", "openl3", "passt")  # which embedder tells what is alike: the first that is there


class Evaluation:
    """One evaluation, step by step: load embedders, read the sounds through, embed them, sum up."""

    def __init__(self, options: Options):
        """Check the options and load what they ask for.

        Raises:
            UserError: a metric is unknown, the output can't be written, or weights that were given are damaged.
        """
        self.options = options
        cpu = options.device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU")
        self.state = PartialState(cpu=cpu, timeout=_PATIENCE)
        self.device = self.state.device if self.state.num_processes > 1 else choose_device(options.device)
        self.metrics = options.metrics or DEFAULTS
        if unknown := [name for name in self.metrics if name not in METRICS]:
            raise UserError(f"--metrics: unknown {unknown[0]}; choose some of {', '.join(METRICS)}")
        check_place(options.output)
        if options.save_statistics:
            check_place(options.save_statistics / "openl3.npz")
        self.statistics = load_statistics(options.statistics) if options.statistics else (None, None)
        self.store, self.describer = Store(options.cache), Describer()
        self.left_out: dict[str, str] = {}
        self.missing: dict[str, str] = {}
        self.embedders: dict[str, Embedder] = {}
        self._load_embedders()
        self.likeness = next((self.embedders[name] for name in _LIKENESS if name in self.embedders), None)
        self.trip = RoundTrip(options.vae, str(self.device)) if options.vae else None

    def _load_embedders(self) -> None:
        """Those that the metrics need, CLAP for training sounds; of those that can't be had, what they lack."""
        given = self.options
        sources = {"openl3": given.openl3, "passt": given.passt, "clap": given.clap}
        lacking: dict[str, str] = {}
        needed = [embedder_of(metric) for metric in self.metrics] + ["clap"] * bool(given.training)
        for name in dict.fromkeys(needed):
            source, level = sources[name], Level(*given.level)
            try:
                self.embedders[name] = load_embedder(
                    name, source, given.weights, self.device, level=level, batch=given.batch, content=given.content
                )
            except Missing as error:
                lacking[name] = str(error)
        self.missing = {metric: lacking[name] for metric in self.metrics if (name := embedder_of(metric)) in lacking}
        if given.training and not self.embedders:
            self.missing["nearest_training"] = lacking["clap"]

    def gather(self) -> None:
        """Read all files through. A generated sound without a prompt has that of the recording of its name.

        Raises:
            UserError: a source is missing, or none of its files can be read.
        """
        self.generated = self._read(self.options.generated)
        prompts = frozenset(clip.sound.prompt for clip in self.generated)
        self.reference = self._read(self.options.recordings, prompts) if self.options.recordings else []
        self.training = self._read(self.options.training) if self.options.training else []
        others = partners([clip.sound for clip in self.generated], [clip.sound for clip in self.reference])
        for index, (clip, other) in enumerate(zip(self.generated, others, strict=True)):
            if other and not clip.sound.prompt:
                self.generated[index] = replace(clip, sound=replace(clip.sound, prompt=other.prompt))

    def _read(self, source: str, prompts: frozenset[str] = frozenset()) -> list[Clip]:
        items = [_placed(item) for item in read_items(source)]
        seen = in_parallel(lambda item: _examined(item, prompts), items, self.options.workers)
        self.left_out |= {str(i.path): found for i, found in zip(items, seen, strict=True) if isinstance(found, str)}
        clips = [found for found in seen if isinstance(found, Clip)]
        if not clips:
            raise UserError(f"{source}: none of its {len(items)} files can be used ({seen[0]})")
        return clips

    def embed(self) -> None:
        """Have the store hold all that is heard; what can't be is left out.

        Raises:
            UserError: the store can't be written, or nothing is left.
        """
        networks = list(self.embedders.values())
        measuring = [self.embedders[name] for name in map(embedder_of, self.metrics) if name in self.embedders]
        alike = [self.likeness] if self.likeness else []
        self.noise = [white_noise(clip) for clip in self.reference or self.generated]
        self.vae = [self.trip(clip) for clip in self.reference] if self.trip else []
        if self.trip and not self.reference:
            self.missing["vae"] = "needs recordings to encode and decode; give REFERENCE, their folder or list"
        jobs: list[tuple[Clip, Sequence[Listener]]] = [
            (clip, [self.describer, *networks]) for clip in self.generated + self.reference
        ]
        jobs += [(clip, measuring) for clip in self.noise + self.vae] + [(clip, alike) for clip in self.training]
        failed = embed_all(jobs, self.store, self.options.workers)
        self.left_out |= failed
        for name in ("generated", "reference", "training", "noise", "vae"):
            setattr(self, name, [clip for clip in getattr(self, name) if clip.sound.path not in failed])
        if not self.generated:
            raise UserError(f"{self.options.generated}: no sound could be used ({next(iter(failed.values()))})")

    def sum_up(self) -> Result:
        """The result of what is embedded.

        Raises:
            UserError: statistics can't be written.
        """
        from evaluation.listening import summarise

        case = Case(self.generated, self.reference, self.noise, self.vae, self.store, *self.statistics)
        figures, calibration = self._measure(case)
        self._save_statistics(case)
        generated, reference = self._heard(case)
        heard, tables = summarise(generated, reference)
        return Result(
            model=self.options.name or Path(self.options.generated).absolute().name,
            settings=self.settings(),
            figures=(*figures, *heard, *self._diversity(case)),
            missing=self.missing,
            generated=tuple(generated),
            reference=tuple(reference),
            left_out=self.left_out,
            tables={"calibration": calibration, **tables},
            origin=self._origin(),
        )

    def _measure(self, case: Case) -> tuple[list[Figure], list[dict[str, Any]]]:
        """The metrics that can be had, and what stands beside them."""
        figures, calibration = [], []
        for metric in (name for name in self.metrics if name not in self.missing):
            try:
                measured = measure(metric, self.embedders[embedder_of(metric)], case)
            except Missing as error:
                self.missing[metric] = str(error)
            else:
                figures.append(measured.figure)
                calibration += measured.rows
        return figures, calibration

    def _diversity(self, case: Case) -> list[Figure]:
        from evaluation.neighbours import diversity

        if self.likeness is None or len(self.generated) < 2:
            return []
        recordings = case.means(self.reference, self.likeness) if len(self.reference) > 1 else None
        try:
            return [diversity(case.means(self.generated, self.likeness), recordings)]
        except ValueError as error:
            self.missing["diversity"] = str(error)
            return []

    def _save_statistics(self, case: Case) -> None:
        if self.options.save_statistics is None:
            return
        if len(self.reference) < 2:
            self.missing["statistics"] = "need at least 2 recordings"
            return
        for embedder in self.embedders.values():
            with case.rows(self.reference, embedder) as rows:
                told = {"name": embedder.name, **embedder.settings}
                save_statistics(self.options.save_statistics / f"{embedder.name}.npz", rows.gaussian(), told)

    def _heard(self, case: Case) -> tuple[list[Sound], list[Sound]]:
        """Generated sounds and recordings, with what was heard in them and the training sounds that are nearest."""
        from evaluation.neighbours import closest

        near: tuple[dict[str, Nearest], dict[str, Nearest]] = {}, {}
        if self.training and self.likeness:
            near = closest(case, self.training, self.likeness)
            if self.reference and not near[1]:
                self.missing["nearest_training of recordings"] = "all of them are in --training; give some that are not"
        made, real = (
            [self._sound(clip, found.get(clip.key, ())) for clip in clips]
            for clips, found in zip((self.generated, self.reference), near, strict=True)
        )
        return made, real

    def _sound(self, clip: Clip, near: Nearest) -> Sound:
        heard = self.store.read(clip, self.describer) or {}
        return replace(clip.sound, heard={name: float(value) for name, value in heard.items()}, nearest=near)

    def settings(self) -> dict[str, Any]:
        """Whatever changes figures but what is under test: two results may be compared where it agrees."""
        recordings: dict[str, Any] = set_hash(clip.key for clip in self.reference)
        if self.options.statistics:
            recordings = {"statistics": sha256(self.options.statistics)[:12]}
        return {
            "level": str(Level(*self.options.level)),
            "resampler": "soxr HQ",
            "reference": recordings,
            "prompts": set_hash(clip.sound.prompt for clip in self.generated),
            **({"training": set_hash(clip.key for clip in self.training)} if self.training else {}),
            "likeness": self.likeness.name if self.likeness else None,
            **{name: embedder.settings for name, embedder in self.embedders.items()},
            "listening": self.describer.settings,
            "versions": versions(),
        }

    def _origin(self) -> dict[str, str]:
        """What may differ between results that compare."""
        given = self.options
        sources = {"generated": given.generated, "reference": given.reference, "training": given.training}
        known = {name: str(Path(s).absolute() if Path(s).exists() else s) for name, s in sources.items() if s}
        vae = {"vae": f"{given.vae}, weights {self.trip.hash}"} if self.trip else {}
        return {**known, **vae, "device": str(self.device)}


def _placed(item: Item) -> Item:
    """With a path that leads there from any folder, as links in a result have to."""
    return item if isinstance(item.path, Stored) else replace(item, path=Path(item.path).absolute())


def _examined(item: Item, prompts: frozenset[str]) -> Clip | str:
    try:
        return examine(item, prompts)
    except UserError as error:
        return str(error)


def evaluate(options: Options) -> Result | None:
    """All of an evaluation; None in processes other than the first, which alone sums up.

    Raises:
        UserError: an option or a source is wrong, weights that were given are damaged, or no sound can be used.
    """
    evaluation = Evaluation(options)
    evaluation.gather()
    evaluation.embed()
    main_process = evaluation.state.is_main_process
    # The first process alone goes on. A process that ended at once could tear down what gloo's threads still hold.
    evaluation.state.wait_for_everyone()
    evaluation.state.destroy_process_group()
    return evaluation.sum_up() if main_process else None


def run(options: Options) -> None:
    """Evaluate, store and print.

    Raises:
        UserError: as `evaluate`, or the result can't be written.
    """
    if (result := evaluate(options)) is not None:
        save_result(result, options.output)
        print(as_text(result))
        print(options.output)


def main() -> None:
    """Run the command; mistakes end in one line."""
    parser = argparse.ArgumentParser(description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    warnings.filterwarnings("ignore")
    try:
        run(options_of(parser.parse_args()))
    except (UserError, OSError) as error:  # OSError: no room for temporary files
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on with what is embedded")


if __name__ == "__main__":
    main()
