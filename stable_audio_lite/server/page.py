"""The page: a form, the sounds that it made with player and spectrogram, and a gallery of the session's.

Gradio draws it and carries what is typed to `Studio`. Each tab is a session of its own; all share one queue.
"""

from __future__ import annotations

import asyncio
import base64
import html
import json
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from stable_audio_lite.audio.plot import time_ticks
from stable_audio_lite.command import explained
from stable_audio_lite.errors import UserError
from stable_audio_lite.pipeline import StableAudio
from stable_audio_lite.server.jobs import Job
from stable_audio_lite.server.studio import (
    FROM_SOUND,
    MOST_SECONDS,
    MOST_STEPS,
    Made,
    Studio,
    Way,
    Wish,
    peaks,
)

TITLE = "Stable Audio Lite"
EXAMPLES: tuple[tuple[str, float, int], ...] = (
    ("solo trumpet, jazz", 8, 19),
    ("A slow classical piece for solo piano in A minor", 8, 11),
    ("solo violin, folk, sad", 8, 16),
    ("house with synth lead and drums, 120 bpm", 8, 17),
)
"""Prompts that the starter obeys, with length and seed of the answers that docs/sounds.md has."""

_LABELS: dict[Way, str] = {
    "new": "From words",
    "loop": "Loop",
    "variation": "Variation",
    "stretch": "Mend a stretch",
    "continuation": "Continue",
}
_SHOWN: dict[str, tuple[Way, ...]] = {
    "seconds": ("new", "continuation"),
    "count": ("new", "loop", "variation", "stretch"),
    "loop": ("loop",),
    "source": FROM_SOUND,
    "variation": ("variation",),
    "stretch": ("stretch",),
}
"""Parts of the form, and the ways that they matter to."""

_PARTS_SHOWN = f"""way => {json.dumps(list(_SHOWN.values()))}.map(
    ways => ({{__type__: "update", visible: ways.includes(way)}}))"""
_COLOURS = "#a78bfa", "#6d28d9"  # of the waveform, before and after it has been heard
_ASK = 0.2  # seconds between two looks at a job
# What takes no time is answered directly. Through Gradio's queue, whose stream of answers the browser opens and closes,
# the answer to what follows within milliseconds can be lost.
_AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
_FILES = Path(__file__).parent
STYLE = _FILES / "page.css"


class Page:
    """Components of the page, and what happens on their events."""

    def __init__(self, studio: Studio):
        """Lay it out; `blocks` is what Gradio serves."""
        self.studio = studio
        self._jobs: dict[str, Job] = {}  # of each session
        self.fields: dict[str, Any] = {}
        self._parts: dict[str, Any] = {}
        with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as self.blocks:
            self._made = gr.State([], time_to_live=None, delete_callback=studio.discard)
            self._shown = gr.State([])
            self._heading()
            with gr.Row(equal_height=False):
                with gr.Column(scale=2, min_width=320, elem_id="form"):
                    self._form()
                with gr.Column(scale=3, min_width=320, elem_id="results"):
                    self._results()
            self._events()

    def _heading(self) -> None:
        on = f"{', '.join(map(_short, self.studio.store.names))} on {self.studio.store.device}"
        gr.HTML(f"<h1>{TITLE}</h1><p>Music from words, and from sound. <small>{html.escape(on)}</small></p>")

    def _form(self) -> None:
        # Numbers have no bounds here: what is wrong with one is told by the studio, in words and in its place.
        add, part, model = self.fields.__setitem__, self._parts.__setitem__, self.studio.outline(Wish())
        add("way", gr.Radio([(label, way) for way, label in _LABELS.items()], value="new", show_label=False))
        add("prompt", gr.Textbox(label="What to hear", lines=2, max_lines=4, placeholder="solo piano, slow, classical"))
        self._examples = gr.Dataset(
            label="Try",
            components=[gr.Textbox(visible=False)],
            samples=[[text] for text, _, _ in EXAMPLES],
            type="index",
            visible="starter" in self.studio.store.names,
        )
        with gr.Column(visible=False) as column:
            part("source", column)
            label, sources = "Sound to start from", ["upload", "microphone"]
            options: dict[str, Any] = {"sources": sources, "type": "filepath", "editable": False, "buttons": []}
            add("source", gr.Audio(label=label, elem_id="source", **options))
            with gr.Column(visible=False) as column:
                part("stretch", column)
                self._picker = gr.HTML(
                    value={},
                    html_template=(_FILES / "stretch.html").read_text(encoding="utf-8"),
                    js_on_load=(_FILES / "stretch.js").read_text(encoding="utf-8"),
                    elem_id="stretch",
                )
                with gr.Row():
                    add("first", gr.Number(label="From second", step=0.1, min_width=100))
                    add("last", gr.Number(label="to second", step=0.1, min_width=100))
            with gr.Column(visible=False) as column:
                part("variation", column)
                about = "0 keeps the sound, 1 ignores it"
                add("strength", gr.Slider(0, 1, value=0.6, step=0.05, label="Strength", info=about))
        with gr.Row(visible=False) as row:
            part("loop", row)
            add("bars", gr.Number(label="Bars", value=4, precision=0, min_width=100))
            about = "bpm, where the prompt says none"
            add("bpm", gr.Number(label="Tempo", value=120, min_width=100, info=about))
        with gr.Column() as column:
            part("seconds", column)
            length = _length(model)
            add("seconds", gr.Slider(0.5, length, value=min(8, length), step=0.5, label="Seconds", elem_id="seconds"))
        with gr.Row(equal_height=True):
            seed = gr.Number(label="Seed", precision=0, placeholder="any", min_width=100)
            add("seed", seed)
            self._die = gr.Button("⚄ Draw", size="md", min_width=80, elem_id="die")
            with gr.Column(min_width=100) as column:
                part("count", column)
                add("count", gr.Number(label="Sounds", value=1, precision=0))
        with gr.Accordion("More", open=False):
            defaults = model.config.generation
            add("negative", gr.Textbox(label="What not to hear", placeholder="drums"))
            about = "more take longer and sound cleaner"
            add(
                "steps",
                gr.Slider(1, MOST_STEPS, value=defaults.steps, step=1, label="Steps", info=about, elem_id="steps"),
            )
            about = "how closely to follow the words; 1 is no guidance"
            add("cfg", gr.Slider(1, 15, value=defaults.cfg, step=0.1, label="Guidance", info=about))
            self._models()
        with gr.Row():
            self._make = gr.Button("Make", variant="primary", scale=3, elem_id="make")
            self._stop = gr.Button("Cancel", scale=1, min_width=90, interactive=False, elem_id="cancel")
        self._status = gr.HTML("", elem_id="status")

    def _models(self) -> None:
        store, add = self.studio.store, self.fields.__setitem__
        models = [(_short(name), name) for name in store.names]
        loras = [("none", ""), *((_short(name), name) for name in store.loras)]
        add("model", gr.Dropdown(models, value=store.default, label="Model", visible=len(models) > 1))
        with gr.Row(visible=bool(store.loras)):
            add("lora", gr.Dropdown(loras, value="", label="LoRA", min_width=120))
            add("lora_strength", gr.Slider(-2, 2, value=1, step=0.05, label="Its strength", min_width=120))

    def _results(self) -> None:
        self._empty = gr.HTML('<p class="empty">Say what you want to hear, and press <b>Make</b>.</p>')

        @gr.render(inputs=[self._shown], triggers=[self._shown.change], queue=False)
        def show(shown: list[Made]) -> None:
            for sound in shown:
                self._card(sound)

        label = "Made in this session" + (f", and kept in {self.studio.keep.name}" if self.studio.keep else "")
        self._gallery = gr.Gallery(
            label=label,
            columns=2,
            height="auto",
            object_fit="cover",
            allow_preview=False,
            interactive=False,
            buttons=[],
            visible=False,
            elem_id="gallery",
        )

    def _card(self, sound: Made) -> None:
        with gr.Column(elem_classes="card"):
            gr.HTML(f"<h3>{html.escape(sound.settings.get('prompt') or 'unprompted')}</h3>")
            gr.Audio(
                str(sound.path),
                type="filepath",
                interactive=False,
                show_label=False,
                buttons=[],
                waveform_options=gr.WaveformOptions(waveform_color=_COLOURS[0], waveform_progress_color=_COLOURS[1]),
            )
            gr.HTML(_picture(sound) + _settings(sound))
            with gr.Row():
                gr.DownloadButton("Download", str(sound.path), size="sm", min_width=90, elem_classes="download")
                again = gr.Button("Again with these settings", size="sm", min_width=120, elem_classes="again")
                onward = gr.Button("Start from this sound", size="sm", min_width=120, elem_classes="onward")
        fields = list(self.fields.values())
        again.click(partial(self.filled, sound.wish), None, fields, **_AT_ONCE)
        # At once, so that whoever chooses another way before the sound is there keeps it.
        onward.click(None, None, self.fields["way"], js="() => 'variation'")
        onward.click(lambda: str(sound.path), None, self.fields["source"], **_AT_ONCE)

    def _events(self) -> None:
        fields = self.fields
        # What needs no files happens in the browser, at once: Make may be pressed before the server answers.
        fields["way"].change(None, fields["way"], [self._parts[name] for name in _SHOWN], js=_PARTS_SHOWN)
        filled = [fields[name] for name in ("prompt", "seconds", "seed")]
        self._examples.click(None, self._examples, filled, js=f"index => {json.dumps(EXAMPLES)}[index]")
        self._die.click(None, None, fields["seed"], js="() => Math.floor(Math.random() * 2 ** 31)")
        fields["model"].input(
            self._of_model, fields["model"], [fields[name] for name in ("seconds", "steps", "cfg")], **_AT_ONCE
        )
        ends = [fields["first"], fields["last"]]
        fields["source"].change(self._heard, [fields["source"], *ends], [self._picker, self._status], **_AT_ONCE)
        fields["source"].upload(lambda: (None, None), None, ends, **_AT_ONCE)
        self._picker.input(None, self._picker, ends, js="value => [value.first, value.last]")
        for end in ends:
            end.change(
                None, [self._picker, *ends], self._picker, js="(value, first, last) => ({...value, first, last})"
            )
        gr.on(
            [self._make.click, fields["prompt"].submit],
            self._make_sounds,
            {*fields.values(), self._made},
            [self._status, self._make, self._stop, self._made, self._shown, self._gallery, self._empty],
            concurrency_limit=None,
            show_progress="hidden",
        )
        # Gradio shows a number that it has none for as 0.
        self.blocks.load(None, None, [fields["seed"], *ends], js="() => [null, null, null]")
        self._stop.click(self._cancel, None, None, **_AT_ONCE)
        self._gallery.select(self._choose, self._made, self._shown, **_AT_ONCE)
        self.blocks.unload(self._leave)

    def filled(self, wish: Wish) -> list[Any]:
        """Values of all fields, in order, that make a sound again."""
        return [getattr(wish, name) for name in self.fields]

    async def _make_sounds(self, values: dict[Any, Any], request: gr.Request) -> AsyncIterator[dict[Any, Any]]:
        """Queue the wish, show how far it is, then its sounds."""
        wish = Wish(**{name: values[field] for name, field in self.fields.items()})
        busy = {self._make: gr.update(interactive=False), self._stop: gr.update(interactive=True)}
        free = {self._make: gr.update(interactive=True), self._stop: gr.update(interactive=False)}
        try:
            job = await asyncio.to_thread(self.studio.submit, wish)
        except UserError as error:
            yield {self._status: _trouble(str(error))}
            return
        self._jobs[str(request.session_hash)] = job
        told = ""
        while not job.ended:
            if (now := _progress(job, self.studio.jobs.position(job))) != told:
                yield {self._status: (told := now), **busy}
            await asyncio.sleep(_ASK)
        job.collected = True
        try:
            new = await asyncio.to_thread(self.studio.collect, job, wish)
        except Exception as error:
            line = explained(error)
            yield {self._status: _trouble(line or "an error inside; the log says more"), **free}
            if line is None:
                raise
            return
        made = [*reversed(new), *values[self._made]]
        yield {
            self._status: _done(job, new),
            self._made: made,
            self._shown: new,
            self._gallery: gr.update(value=[(str(sound.picture), _caption(sound)) for sound in made], visible=True),
            self._empty: gr.update(visible=False),
            **free,
        }

    def _cancel(self, request: gr.Request) -> None:
        if (job := self._jobs.get(str(request.session_hash))) is not None and not job.ended:
            self.studio.jobs.cancel(job.id)

    def _leave(self, request: gr.Request) -> None:
        """Cancel what a closed tab waited for."""
        self._cancel(request)
        self._jobs.pop(str(request.session_hash), None)

    def _choose(self, made: list[Made], event: gr.SelectData) -> list[Made]:
        return [made[event.index]]

    def _of_model(self, name: str) -> list[Any]:
        """Limits and defaults of another model."""
        model = self.studio.outline(Wish(model=name))
        length, defaults = _length(model), model.config.generation
        return [gr.update(maximum=length, value=min(8, length)), defaults.steps, defaults.cfg]

    def _heard(self, source: str | None, first: float | None, last: float | None) -> tuple[dict[str, Any], str]:
        """The waveform of a sound that was given, to choose a stretch on."""
        try:
            tops, seconds = peaks(source) if source else ([], 0.0)
        except UserError as error:
            return {}, _trouble(str(error))
        return {"peaks": tops, "seconds": seconds, "first": first, "last": last}, ""


def _short(name: str) -> str:
    """Name to show: a folder's without its place, which is nobody's business."""
    return Path(name).name if Path(name).is_dir() else name


def _length(model: StableAudio) -> float:
    """Longest sound to offer."""
    if model.conditioner is None:
        return int(2 * model.window_seconds) / 2
    return min(MOST_SECONDS, float(model.conditioner.config.max_seconds))


def _progress(job: Job, before: int | None) -> str:
    if before is not None:
        text = "Waiting for another sound to be ready" if not before else f"Waiting: {before} more before you"
    elif (left := job.left_seconds) is None:
        text = "Starting"
    else:
        time = f"{left:.0f} s" if left < 100 else f"{left / 60:.0f} min"
        text = f"{job.progress:.0%}, {time} left"
    share = f"{100 * job.progress:.0f}"
    bar = f'role="progressbar" aria-valuenow="{share}" aria-valuemin="0" aria-valuemax="100"'
    return f'<div class="bar" {bar}><div style="width:{share}%"></div></div><p>{text}</p>'


def _done(job: Job, made: list[Made]) -> str:
    sounds = "1 sound" if len(made) == 1 else f"{len(made)} sounds"
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in job.notes)
    return f"<p>{sounds} in {job.finished - job.started:.1f} s.</p>{notes}"


def _trouble(text: str) -> str:
    return f'<p class="trouble" role="alert">{html.escape(text)}</p>'


def _caption(sound: Made) -> str:
    return f"{sound.settings.get('prompt') or 'unprompted'} · {sound.settings['seed']}"


def _picture(sound: Made) -> str:
    """The spectrogram with its scales."""
    data = base64.b64encode(sound.picture.read_bytes()).decode()
    heights = "".join(
        f'<span class="height" style="bottom:{100 * height:.1f}%">{hertz:,} Hz</span>'
        for hertz, height in sound.heights.items()
    )
    times = "".join(
        f'<span class="time" style="left:{100 * share:.1f}%">{text}</span>' for share, text in time_ticks(sound.seconds)
    )
    image = f'<img src="data:image/webp;base64,{data}" alt="Spectrogram">'
    return f'<figure class="picture">{image}{heights}{times}</figure>'


def _settings(sound: Made) -> str:
    """Everything that made the sound, as its file holds it."""
    pairs = [(k, v) for k, v in sound.settings.items() if k != "prompt" and v is not None]
    items = "".join(f"<span><b>{html.escape(str(k))}</b> {html.escape(str(v))}</span>" for k, v in pairs)
    return f'<p class="settings">{items}</p>'
