"""One evaluation, from files to its result; `evaluation.run` is the command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from evaluation.embedders import load_embedder
from evaluation.embedders.streams import TargetLevel
from evaluation.metrics.description import Describer
from evaluation.metrics.frechet import load_statistics, save_statistics
from evaluation.metrics.inputs import MetricInputs
from evaluation.metrics.registry import DEFAULTS, METRICS, calibrated, embedder_of
from evaluation.metrics.similarity import Neighbours, diversity, training_neighbours
from evaluation.metrics.summary import summarise
from evaluation.result import MetricValue, Missing, Result, SoundRecord, Table, partners
from evaluation.sounds import Clip, VAERoundTrip, read_clip, white_noise
from evaluation.store import Embedder, FeatureExtractor, Store, embed_all, in_parallel, set_hash, versions
from stable_audio_lite.audio.io import Stored
from stable_audio_lite.data.item import Item
from stable_audio_lite.data.manifest import read_items
from stable_audio_lite.devices import choose_device
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import check_place, sha256

if TYPE_CHECKING:
    from evaluation.run import Options

_PATIENCE = timedelta(days=7)  # that a process waits for the others, whose files may be longer, or not embedded yet
_SIMILARITY = ("clap", "openl3", "passt")  # which embedder tells what is alike: the first that is there


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
        self.names = options.metrics or DEFAULTS
        if unknown := [name for name in self.names if name not in METRICS]:
            raise UserError(f"--metrics: unknown {unknown[0]}; choose some of {', '.join(METRICS)}")
        check_place(options.output)
        if options.save_statistics:
            check_place(options.save_statistics / "openl3.npz")
        self.statistics = load_statistics(options.statistics) if options.statistics else (None, None)
        self.level = TargetLevel(*options.level)
        self.store, self.describer = Store(options.cache), Describer()
        self.left_out: dict[str, str] = {}
        self.missing: dict[str, str] = {}
        self.embedders = self._load_embedders()
        self.similarity = next((self.embedders[name] for name in _SIMILARITY if name in self.embedders), None)
        self.vae_trip = VAERoundTrip(options.vae, str(self.device)) if options.vae else None

    def _load_embedders(self) -> dict[str, Embedder]:
        """Load those that the metrics need, and CLAP for training sounds; `missing` says what others lack."""
        given, found = self.options, {}
        sources = {"openl3": given.openl3, "passt": given.passt, "clap": given.clap}
        where = (given.weights, self.device, self.level)
        lacking: dict[str, str] = {}
        needed = [embedder_of(metric) for metric in self.names] + ["clap"] * bool(given.training)
        for name in dict.fromkeys(needed):
            try:
                found[name] = load_embedder(name, sources[name], *where, batch=given.batch, content=given.content)
            except Missing as error:
                lacking[name] = str(error)
        self.missing |= {metric: lacking[name] for metric in self.names if (name := embedder_of(metric)) in lacking}
        if given.training and not found:
            self.missing["nearest_training"] = lacking["clap"]
        return found

    def gather(self) -> None:
        """Read all files through. A generated sound without a prompt has that of the recording of its name.

        Raises:
            UserError: a source is missing, or none of its files can be read.
        """
        self.generated = self._read(self.options.generated)
        prompts = frozenset(clip.record.prompt for clip in self.generated)
        self.reference = self._read(self.options.recordings, prompts) if self.options.recordings else []
        self.training = self._read(self.options.training) if self.options.training else []
        others = partners([clip.record for clip in self.generated], [clip.record for clip in self.reference])
        for index, (clip, other) in enumerate(zip(self.generated, others, strict=True)):
            if other and not clip.record.prompt:
                self.generated[index] = replace(clip, record=replace(clip.record, prompt=other.prompt))

    def _read(self, source: str, prompts: frozenset[str] = frozenset()) -> list[Clip]:
        def read(item: Item) -> Clip | str:
            """The item's clip, or why there is none."""
            try:
                return read_clip(item, prompts)
            except UserError as error:
                return str(error)

        # Absolute paths lead there from any folder, as links in a result have to.
        items = [
            item if isinstance(item.path, Stored) else replace(item, path=Path(item.path).absolute())
            for item in read_items(source)
        ]
        seen = in_parallel(read, items, self.options.workers)
        self.left_out |= {str(i.path): found for i, found in zip(items, seen, strict=True) if isinstance(found, str)}
        clips = [found for found in seen if isinstance(found, Clip)]
        if not clips:
            raise UserError(f"{source}: none of its {len(items)} files can be used ({seen[0]})")
        return clips

    def embed(self) -> None:
        """Fill the store with all that metrics need; sounds that can't be embedded are left out.

        Raises:
            UserError: the store can't be written, or nothing is left.
        """
        networks = list(self.embedders.values())
        measuring = [self.embedders[name] for name in map(embedder_of, self.names) if name in self.embedders]
        alike = [self.similarity] if self.similarity else []
        self.noise = [white_noise(clip) for clip in self.reference or self.generated]
        self.vae = [self.vae_trip(clip) for clip in self.reference] if self.vae_trip else []
        if self.vae_trip and not self.reference:
            self.missing["vae"] = "needs recordings to encode and decode; give REFERENCE, their folder or list"
        jobs: list[tuple[Clip, Sequence[FeatureExtractor]]] = [
            (clip, [self.describer, *networks]) for clip in self.generated + self.reference
        ]
        jobs += [(clip, measuring) for clip in self.noise + self.vae] + [(clip, alike) for clip in self.training]
        failed = embed_all(jobs, self.store, self.options.workers)
        self.left_out |= failed
        for name in ("generated", "reference", "training", "noise", "vae"):
            setattr(self, name, [clip for clip in getattr(self, name) if clip.record.path not in failed])
        if not self.generated:
            raise UserError(f"{self.options.generated}: no sound could be used ({next(iter(failed.values()))})")

    def sum_up(self) -> Result:
        """The result of what is embedded.

        Raises:
            UserError: statistics can't be written.
        """
        inputs = MetricInputs(self.generated, self.reference, self.noise, self.vae, self.store, *self.statistics)
        metrics, calibration = self._metrics(inputs)
        self._save_statistics(inputs)
        generated, reference = self._records(inputs)
        means, tables = summarise(generated, reference)
        return Result(
            model=self.options.name or Path(self.options.generated).absolute().name,
            settings=self._settings(),
            metrics=(*metrics, *means, *self._diversity(inputs)),
            missing=self.missing,
            generated=tuple(generated),
            reference=tuple(reference),
            left_out=self.left_out,
            tables={"calibration": calibration, **tables},
            origin=self._origin(),
        )

    def _metrics(self, inputs: MetricInputs) -> tuple[list[MetricValue], Table]:
        """The metrics that can be had, and their baselines."""
        found = []
        for metric in (name for name in self.names if name not in self.missing):
            try:
                found.append(calibrated(metric, self.embedders[embedder_of(metric)], inputs))
            except Missing as error:
                self.missing[metric] = str(error)
        return [metric.value for metric in found], tuple(row for metric in found for row in metric.rows)

    def _diversity(self, inputs: MetricInputs) -> list[MetricValue]:
        if self.similarity is None or len(self.generated) < 2:
            return []
        recordings = inputs.means(self.reference, self.similarity) if len(self.reference) > 1 else None
        try:
            return [diversity(inputs.means(self.generated, self.similarity), recordings)]
        except ValueError as error:
            self.missing["diversity"] = str(error)
            return []

    def _save_statistics(self, inputs: MetricInputs) -> None:
        if self.options.save_statistics is None:
            return
        if len(self.reference) < 2:
            self.missing["statistics"] = "need at least 2 recordings"
            return
        for embedder in self.embedders.values():
            with inputs.rows(self.reference, embedder) as rows:
                told = {"name": embedder.name, **embedder.settings}
                save_statistics(self.options.save_statistics / f"{embedder.name}.npz", rows.gaussian(), told)

    def _records(self, inputs: MetricInputs) -> tuple[list[SoundRecord], list[SoundRecord]]:
        """Generated sounds and recordings, with their measurements and the training sounds that are nearest."""
        near: tuple[dict[str, Neighbours], dict[str, Neighbours]] = {}, {}
        if self.training and self.similarity:
            near = training_neighbours(inputs, self.training, self.similarity)
            if self.reference and not near[1]:
                self.missing["nearest_training of recordings"] = "all of them are in --training; give some that are not"
        made, real = (
            [self._record(clip, found.get(clip.key, ())) for clip in clips]
            for clips, found in zip((self.generated, self.reference), near, strict=True)
        )
        return made, real

    def _record(self, clip: Clip, near: Neighbours) -> SoundRecord:
        found = self.store.read(clip, self.describer) or {}
        return replace(clip.record, measurements={k: float(v) for k, v in found.items()}, nearest=near)

    def _settings(self) -> dict[str, object]:
        """All that changes metrics but what is under test: two results may be compared where it agrees."""
        recordings: dict[str, Any] = set_hash(clip.key for clip in self.reference)
        if self.options.statistics:
            recordings = {"statistics": sha256(self.options.statistics)[:12]}
        return {
            "level": str(self.level),
            "resampler": "soxr HQ",
            "reference": recordings,
            "prompts": set_hash(clip.record.prompt for clip in self.generated),
            **({"training": set_hash(clip.key for clip in self.training)} if self.training else {}),
            "similarity": self.similarity.name if self.similarity else None,
            **{name: embedder.settings for name, embedder in self.embedders.items()},
            self.describer.name: self.describer.settings,
            "versions": versions(),
        }

    def _origin(self) -> dict[str, str]:
        """Facts that may differ between results that compare."""
        given = self.options
        sources = {"generated": given.generated, "reference": given.reference, "training": given.training}
        known = {name: str(Path(s).absolute() if Path(s).exists() else s) for name, s in sources.items() if s}
        vae = {"vae": f"{given.vae}, weights {self.vae_trip.hash}"} if self.vae_trip else {}
        return {**known, **vae, "device": str(self.device)}
