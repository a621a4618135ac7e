"""The page: metrics beside what gives them meaning, pictures and players, real beside generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.report.cards import Card, Places, card, most_similar, prompt_groups
from evaluation.report.charts import strip, timing_grid
from evaluation.report.published import COLUMNS, TABLES
from evaluation.result import MetricValue, Result, flat_settings, format_value, load_result
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import check_place, replacing

# What a metric says, and its unit.
_MEANINGS = {
    "kl_passt": ("how differently a tagger classifies a sound and the recording of the same prompt", ""),
    "clap_score": ("how close an encoder of text and audio finds a sound to its prompt", ""),
    "diversity": ("sounds with nothing in common that would be as diverse (Vendi score); grows with n", ""),
    "nearest_training": ("mean cosine of each sound's embedding to that of the closest training sound", ""),
    "on_time": ("share that ends within 0.5 s of the length asked for", "share"),
    "timing_error": ("mean time between the length asked for and the end of the sound", "s"),
    "width_right": ("share within 6 dB of the width of the recording with the same prompt", "share"),
    "width": ("mean power of left − right beside left + right", "dB"),
    "level": ("mean integrated loudness", "LUFS"),
    "intro": ("highest novelty in the first quarter: how much the sound changes there, whatever changes it", "dB"),
    "development": ("highest novelty in the middle half", "dB"),
    "outro": ("highest novelty in the last quarter", "dB"),
}
_DISTANCE = "Fréchet distance between the embeddings of all sounds and those of the reference"
_INFINITE = "extrapolated to infinitely many sounds"
_BIASED = "fewer sounds are farther, so compare the baselines with the generated halves"


def render_page(result: Result, places: Places, prompts: int) -> tuple[str, list[Card]]:
    """The page's HTML, and the cards on it: those of the first `prompts` prompts.

    Raises:
        UserError: jinja2 is not installed.
    """
    template = _template(places)
    from tqdm import tqdm

    groups = prompt_groups(result)
    seen = [
        (title, [card(label, sound, places) for label, sound in sounds])
        for title, sounds in tqdm(groups[:prompts], unit="prompt", disable=None)
    ]
    columns = list(dict.fromkeys(name for metric in result.metrics for name in metric.baselines))
    settings = flat_settings(result.settings)
    page = template.render(
        result=result,
        columns=columns,
        metrics=[(metric, *_meaning(metric), strip(metric, columns)) for metric in result.metrics],
        published_columns=COLUMNS,
        weights={name: settings.get(f"{column['embedder']}.weights") for name, column in COLUMNS.items()},
        published=TABLES if any(result.metric(name) for name in COLUMNS) else (),
        grid=timing_grid(result.tables.get("timing_histogram", ())),
        similar=most_similar(result),
        closest_recording=max((sound.nearest[0].cosine for sound in result.reference if sound.nearest), default=None),
        treatments=_treatments(result),
        settings=settings,
        groups=seen,
        unseen=len(groups) - len(seen),
        embed=places.embed,
    )
    return page, [one for _, cards in seen for one in cards]


def _template(places: Places) -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise UserError("reports need jinja2; install it with: pip install 'stable-audio-lite[evaluate]'") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(figure=_figure, cell=_cell, columns=_columns, link=places.link)
    return environment.get_template("report.html.jinja")


def _meaning(metric: MetricValue) -> tuple[str, str]:
    if not metric.name.startswith("fd_"):
        return _MEANINGS.get(metric.name, ("", ""))
    return (f"{_DISTANCE}, {_INFINITE}" if metric.name.startswith("fd_inf_") else f"{_DISTANCE}; {_BIASED}"), ""


def _figure(value: float, unit: str) -> str:
    """A value without its unit; a share in per cent."""
    return f"{value:.1%}" if unit == "share" else format_value(value)


def _cell(value: Any) -> str:
    """Any value of a table's row."""
    return format_value(value) if isinstance(value, float) else "" if value is None else str(value)


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of all values that any row has, in their order."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _treatments(result: Result) -> dict[str, list[str]]:
    """Files by what was done to them before they were measured."""
    found: dict[str, list[str]] = {}
    for sound in (*result.generated, *result.reference):
        for text in sound.treatment:
            found.setdefault(text, []).append(sound.path)
    return found


def write_report(result_path: Path, page_path: Path, *, embed: bool = False, prompts: int = 200) -> list[Card]:
    """Write the page of a stored result; returns the cards on it.

    Raises:
        UserError: the result can't be read or the page can't be written.
    """
    check_place(page_path)
    result = load_result(result_path)
    if embed:
        import soundfile

        if "MP3" not in soundfile.available_formats():
            raise UserError("--embed needs libsndfile 1.1 or newer (pip install -U soundfile); or leave it out")
    page, cards = render_page(result, Places(page=page_path, result=result_path, embed=embed), prompts)
    with replacing(page_path) as temporary:
        # Names that are no UTF-8 hold characters that can't be written as they are.
        temporary.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    return cards
