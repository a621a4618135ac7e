"""Requests and answers of the service, as pydantic checks and OpenAPI describes them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from stable_audio_lite import edits
from stable_audio_lite.diffusion.samplers import SAMPLERS
from stable_audio_lite.errors import UserError
from stable_audio_lite.pipeline import Plan, StableAudio
from stable_audio_lite.request import check_number
from stable_audio_lite.server.jobs import MOST_CHARACTERS, Job, Jobs, State
from stable_audio_lite.server.models import ModelChoice, ModelStore
from stable_audio_lite.systems import MAX_CFG, StableAudioConfig
from stable_audio_lite.wording import beats_of, tempo_of


class Message(BaseModel):
    """A message that has the keys that it says, with values of the types that it says; 4.0 is a whole number too."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _whole(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in given.items()}


class VariationEdit(Message):
    """Make the sound over from a noisy version of it."""

    kind: Literal["variation"]
    strength: float = Field(0.6, ge=0, le=1, description="0 gives it back as the model renders it, 1 ignores it")


class Stretch(Message):
    """A stretch of a sound, in seconds."""

    start: float = Field(ge=0)
    end: float = Field(gt=0)


class InpaintingEdit(Message):
    """Make stretches of the sound anew; the rest stays."""

    kind: Literal["inpainting"]
    stretches: list[Stretch] = Field(min_length=1, max_length=32)


class ContinuationEdit(Message):
    """Go on where the sound ends; what comes out begins with it, and `seconds` is the length that is added."""

    kind: Literal["continuation"]


class LoopEdit(Message):
    """Make a sound, from the prompt alone, whose end meets its beginning."""

    kind: Literal["loop"]
    bars: int | None = Field(None, ge=1, le=1000)
    bpm: float | None = Field(None, ge=20, le=400, description="that of the prompt, where it states one")
    beats: int | None = Field(None, ge=1, le=16, description="of a bar: 3 of a waltz, otherwise 4")


SoundEdit = Annotated[VariationEdit | InpaintingEdit | ContinuationEdit, Field(discriminator="kind")]
_FROM_SOUND = ("variation", "inpainting", "continuation")


class ServiceLimits(Message):
    """The most that one request may ask for.

    Attributes:
        seconds: of sound, to make or to send.
        steps: for sampling.
        count: sounds.
        upload_bytes: size of a sound that is sent.
    """

    seconds: float = 60
    steps: int = 250
    count: int = 8
    upload_bytes: int = 25_000_000


class _Request(Message):
    """Fields of both requests; what is left out is the model's own default."""

    prompt: str | None = Field(None, max_length=MOST_CHARACTERS, description="what to hear")
    model: str | None = Field(None, max_length=1000, description="one of /v1/models")
    lora: str | None = Field(None, max_length=1000, description="one of /v1/models")
    lora_strength: float | None = Field(None, ge=-10, le=10)
    seconds: float | None = Field(None, gt=0, le=1e6, description="length of the sounds")
    seconds_start: float | None = Field(None, ge=0, le=1e6, description="where in the described piece they begin")
    seconds_total: float | None = Field(None, ge=0, le=1e6, description="length of the described piece")
    steps: int | None = Field(None, ge=1, le=10**6)
    cfg: float | None = Field(None, ge=0, le=MAX_CFG, description="guidance scale, 1 is none")
    rescale: float | None = Field(None, ge=0, le=1)
    negative: str | None = Field(None, max_length=MOST_CHARACTERS, description="what not to hear")
    sampler: str | None = Field(None, max_length=100)
    seed: int | None = Field(None, ge=0, le=2**53 - 1, description="of the first sound, the next one more each")
    count: int = Field(1, ge=1, le=1000)

    @property
    def _settings(self) -> dict[str, Any]:
        return self.model_dump(include=_SETTINGS)

    def _within(self, plan: Plan, limits: ServiceLimits) -> Plan:
        for name, value in (("seconds", plan.request.seconds), ("steps", plan.request.steps), ("count", self.count)):
            check_number(name, value)
            if value > (most := getattr(limits, name)):
                raise UserError(f"{name}: at most {most:g} may be asked for here, got {value:g}")
        return plan


class GenerationRequest(_Request):
    """A request for sounds from words; what is left out is the model's own default."""

    edit: LoopEdit | None = Field(None, description="how to make them; what starts from a sound is an EditRequest")

    @field_validator("edit", mode="before")
    @classmethod
    def _alone(cls, edit: Any) -> Any:
        if isinstance(edit, dict) and edit.get("kind") in _FROM_SOUND:
            raise ValueError("starts from a sound; send one beside the request, as multipart/form-data")
        return edit

    def plan(self, outline: StableAudio, limits: ServiceLimits) -> Plan:
        """Check the request against a model, and the `limits`.

        Raises:
            UserError: it asks for what the model doesn't do, or for too much.
        """
        edit = edits.Edit()
        if self.edit is not None:
            prompt = self.prompt or ""
            bpm = tempo_of(prompt) if self.edit.bpm is None else self.edit.bpm
            edit = edits.Loop(self.edit.bars, bpm, self.edit.beats or beats_of(prompt))
        return self._within(_prompted(outline, self.prompt, count=self.count, edit=edit, **self._settings), limits)


class EditRequest(_Request):
    """A request for sounds from a sound; what is left out is the model's own default, a prompt that of the sound."""

    edit: SoundEdit = Field(description="how to make them")

    def plan(self, outline: StableAudio, limits: ServiceLimits, sound: edits.Sound) -> Plan:
        """Check the request against a model, the `limits` and the sound that it starts from.

        Raises:
            UserError: it asks for what the model doesn't do, for too much, or for what doesn't go with the sound.
        """
        if isinstance(self.edit, ContinuationEdit):
            if self.count != 1 or self.seconds is None:
                raise UserError("edit: a continuation needs seconds, and a count of 1")
            return self._within(outline.plan_extension(self.prompt, after=sound, **self._settings), limits)
        if isinstance(self.edit, InpaintingEdit):
            gaps = [(part.start, part.end) for part in self.edit.stretches]
            edit: edits.Edit = edits.Inpainting(sound, gaps)
        else:
            edit = edits.Variation(sound, self.edit.strength)
        return self._within(_prompted(outline, self.prompt, count=self.count, edit=edit, **self._settings), limits)


def request_schemas(store: ModelStore, limits: ServiceLimits, place: str) -> dict[str, Any]:
    """Describe requests as JSON schemas, by name, with what these models and limits allow; references go to `place`."""
    found: dict[str, Any] = {}
    for kind in (GenerationRequest, EditRequest):
        schema = kind.model_json_schema(ref_template=place)
        found |= schema.pop("$defs") | {kind.__name__: schema}
        fields = schema["properties"]
        for name in ("seconds", "steps"):
            fields[name]["anyOf"][0]["maximum"] = getattr(limits, name)
        fields["count"]["maximum"] = limits.count
        fields["sampler"]["anyOf"][0]["enum"] = list(SAMPLERS)
    words = found["GenerationRequest"]
    if all(_needs_words(store.outline(ModelChoice(name))) for name in store.names):
        (text, _), about = words["properties"]["prompt"]["anyOf"], words["properties"]["prompt"]["description"]
        words["properties"]["prompt"] = {**text, "minLength": 1, "description": about, "title": "Prompt"}
        words["required"] = ["prompt"]
    return found


def _needs_words(outline: StableAudio) -> bool:
    return isinstance(outline.config, StableAudioConfig)


def _prompted(outline: StableAudio, prompt: str | None, **settings: Any) -> Plan:
    plan = outline.plan(prompt, **settings)
    if plan.items[0][0] is None and _needs_words(outline):
        raise UserError("prompt: is missing; say what you want to hear")
    return plan


_SETTINGS = {
    "seconds", "seconds_start", "seconds_total", "steps", "cfg", "rescale", "negative", "sampler", "seed"
}  # fmt: skip


class SoundAnswer(Message):
    """A sound of a job: its address, also while it is made, and all that makes it again."""

    address: str
    stream: str
    settings: dict[str, Any]


class GenerationAnswer(Message):
    """A job: how far it is, and its sounds."""

    id: str
    state: State
    progress: float = Field(ge=0, le=1, description="share of the work that is done")
    position: int | None = Field(description="jobs that wait before it, while it waits")
    left_seconds: float | None = Field(description="time that it still takes, roughly, while it runs")
    error: str | None = Field(description="why it failed, in one line")
    notes: list[str] = Field(description="what of the prompt the model doesn't read or know")
    sounds: list[SoundAnswer]
    expires_seconds: float | None = Field(description="time until it is forgotten, at the latest, once it has ended")

    @classmethod
    def of(cls, jobs: Jobs, job: Job) -> GenerationAnswer:
        """Describe a job as it is now."""
        address = f"/v1/generations/{job.id}/sounds"
        empty: list[dict[str, Any]] = [{}] * job.items
        return cls(
            id=job.id,
            state=job.state,
            progress=job.progress,
            position=jobs.position(job),
            left_seconds=job.left_seconds,
            error=job.error or None,
            notes=job.notes,
            sounds=[
                SoundAnswer(address=f"{address}/{item}", stream=f"{address}/{item}/stream", settings=settings)
                for item, settings in enumerate(job.settings or empty)
            ],
            expires_seconds=jobs.expires_seconds(job),
        )


class ModelAnswer(Message):
    """A model that may be asked for.

    Attributes:
        name: to ask for it by.
        kind: of system.
        hash: identifies its contents.
        sample_rate: Hz.
        window_seconds: length of a sound that nothing is said about.
        reads_prompts: whether it takes a prompt.
        defaults: of its settings.
        loaded: whether it is in memory.
    """

    name: str
    kind: str
    hash: str
    sample_rate: int
    window_seconds: float
    reads_prompts: bool
    defaults: dict[str, Any]
    loaded: bool


class ModelsAnswer(Message):
    """All that may be asked for, and the most that one request may ask for."""

    default: str
    models: list[ModelAnswer]
    loras: list[str]
    limits: ServiceLimits

    @classmethod
    def of(cls, jobs: Jobs, limits: ServiceLimits) -> ModelsAnswer:
        """Describe the models of a queue."""
        store, models = jobs.store, []
        for name in store.names:
            outline = store.outline(ModelChoice(name))
            defaults = outline.config.generation
            models.append(
                ModelAnswer(
                    name=name,
                    kind=outline.config.kind,
                    hash=outline.hash,
                    sample_rate=outline.sample_rate,
                    window_seconds=outline.window_seconds,
                    reads_prompts=outline.conditioner is not None,
                    defaults={key: getattr(defaults, key) for key in ("steps", "cfg", "rescale", "sampler")},
                    loaded=any(choice.name == name for choice in store.loaded),
                )
            )
        return cls(default=store.default, models=models, loras=list(store.loras), limits=limits)


class HealthAnswer(Message):
    """The state of a process that takes requests: its device, and how many jobs wait and run."""

    state: Literal["ok"]
    version: str
    device: str
    waiting: int
    running: int


class Problem(BaseModel):
    """An answer to a request that could not be met (RFC 9457); `detail` is one line that says what to do."""

    type: Literal["about:blank"] = "about:blank"
    title: str
    status: int
    detail: str
