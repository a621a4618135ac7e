"""One page for one model: figures beside what gives them meaning, pictures and players, real beside generated.

    python -m evaluation.report result.json -o report.html
    python -m evaluation.report result.json -o report.html --embed     # one file to send, with copies of the sounds

The page opens from disk and loads nothing but the sounds, which it links where they lie.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.cards import Card, Places, card, groups, likenesses
from evaluation.charts import histogram, strip
from evaluation.published import METRICS, TABLES
from evaluation.result import Figure, Result, flat_settings, load_result, shown
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import check_place, replacing

# What a figure says, and what it is measured in.
_MEANINGS = {
    "kl_passt": ("how differently a tagger hears a sound and the recording of the same prompt", ""),
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
_BIASED = "fewer sounds are farther, so compare what stands beside it with the generated halves"


def as_html(result: Result, places: Places, prompts: int) -> tuple[str, list[Card]]:
    """The page, and the cards on it: those of the first `prompts` prompts.

    Raises:
        UserError: jinja2 is not installed.
    """
    template = _template()
    from tqdm import tqdm

    found = groups(result)
    seen = [
        (title, [card(label, sound, places) for label, sound in sounds])
        for title, sounds in tqdm(found[:prompts], unit="prompt", disable=None)
    ]
    columns = list(dict.fromkeys(name for figure in result.figures for name in figure.beside))
    settings = flat_settings(result.settings)
    page = template.render(
        result=result,
        columns=columns,
        figures=[(figure, *_meaning(figure), strip(figure, columns)) for figure in result.figures],
        metrics=METRICS,
        weights={name: settings.get(f"{metric.embedder}.weights") for name, metric in METRICS.items()},
        published=TABLES if any(result.figure(name) for name in METRICS) else (),
        histogram=histogram(result.tables.get("timing_histogram", [])),
        likenesses=likenesses(result, places),
        likest=max((sound.nearest[0][1] for sound in result.reference if sound.nearest), default=None),
        treatments=_treatments(result),
        settings=settings,
        groups=seen,
        unseen=len(found) - len(seen),
        embed=places.embed,
    )
    return page, [one for _, cards in seen for one in cards]


def _template() -> Any:
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
    environment.filters.update(measured=measured, bare=bare, cell=cell, columns=columns_of)
    return environment.get_template("report.html.jinja")


def _meaning(figure: Figure) -> tuple[str, str]:
    if not figure.name.startswith("fd_"):
        return _MEANINGS.get(figure.name, ("", ""))
    return (f"{_DISTANCE}, {_INFINITE}" if figure.name.startswith("fd_inf_") else f"{_DISTANCE}; {_BIASED}"), ""


def measured(value: float, scale: str) -> str:
    """A value and what it is measured in; a share in per cent."""
    return bare(value, scale) if scale == "share" else f"{shown(value)} {scale}".strip()


def bare(value: float, scale: str) -> str:
    """As `measured`, without saying in what."""
    return f"{value:.1%}" if scale == "share" else shown(value)


def cell(value: Any) -> str:
    """Any value of a table's row."""
    return shown(value) if isinstance(value, float) else "" if value is None else str(value)


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of all values that any row has, in their order."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _treatments(result: Result) -> dict[str, list[str]]:
    """What was done to files before they were measured, and to which."""
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
        _check_mp3()
    page, cards = as_html(result, Places(page=page_path, result=result_path, embed=embed), prompts)
    with replacing(page_path) as temporary:
        # Names that are no UTF-8 hold characters that can't be written as they are.
        temporary.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    return cards


def _check_mp3() -> None:
    import soundfile

    if "MP3" not in soundfile.available_formats():
        raise UserError("--embed needs libsndfile 1.1 or newer (pip install -U soundfile); or leave it out")


def main() -> None:
    """Run the command; mistakes end in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="JSON that evaluation.run wrote")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="the page (default: RESULT with .html)")
    parser.add_argument("--embed", action="store_true", help="copy the sounds into the page, as MP3")
    parser.add_argument("--prompts", type=int, default=200, help="prompts shown with their sounds (default: 200)")
    args = parser.parse_args()
    page = args.output or args.result.with_suffix(".html")
    try:
        if page.resolve() == args.result.resolve():
            raise UserError(f"{page}: is the result itself; choose another place with -o")
        if args.prompts < 0:
            raise UserError(f"--prompts must be 0 or more, got {args.prompts}")
        cards = write_report(args.result, page, embed=args.embed, prompts=args.prompts)
    except UserError as error:
        sys.exit(f"error: {error}")
    if mute := [one for one in cards if one.trouble]:
        first = mute[0].trouble
        print(f"{len(mute)} of {len(cards)} sounds have no picture and player; the first: {first}", file=sys.stderr)
    print(page)


if __name__ == "__main__":
    main()
