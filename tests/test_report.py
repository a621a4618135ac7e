"""The page: escaped, complete, readable by a real browser; broken and missing sounds are named."""

from __future__ import annotations

import base64
import html
import html.parser
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import urllib.parse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation.metrics.description import describe_sound
from evaluation.metrics.summary import summarise
from evaluation.report import __main__ as report_command
from evaluation.report import page as report
from evaluation.report.cards import Places, card, most_similar, prompt_groups
from evaluation.report.charts import strip, timing_grid
from evaluation.result import MetricValue, Neighbour, Result, SoundRecord, save_result
from stable_audio_lite.audio.io import write_audio
from stable_audio_lite.errors import UserError

ROOT = Path(__file__).parents[1]
RATE = 22050
HOSTILE = "<script>document.title='hacked'</script>\"'&<img src=x onerror=alert(1)>"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text outside of styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def make_sound(
    path: Path, prompt: str, requested: float | None, seconds: float = 1.0, hertz: float = 440.0
) -> SoundRecord:
    time = np.arange(round(seconds * RATE)) / RATE
    audio = 0.3 * np.stack((np.sin(2 * np.pi * hertz * time), np.sin(2 * np.pi * 1.5 * hertz * time)))
    write_audio(path, audio, RATE)
    heard = describe_sound(torch.from_numpy(audio).float(), RATE)
    return SoundRecord(
        path=str(path),
        seconds=seconds,
        sample_rate=RATE,
        channels=2,
        prompt=prompt,
        requested=requested,
        measurements=heard,
    )


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result of four generated sounds: one with a hostile name, one missing, one broken; two have recordings."""
    folder = tmp_path_factory.mktemp("evaluated")
    hostile = folder / "made" / f"{HOSTILE.replace('/', '')} #1%41?\n.wav"
    real = make_sound(folder / "real" / "0.wav", "a low tone", None, 1.5)
    real = replace(real, nearest=(Neighbour("hf:some/set/8", 0.75),))
    made = [
        make_sound(hostile, "a low tone", 1.0),
        make_sound(folder / "made" / "1.wav", HOSTILE, 2.0, hertz=220),
        make_sound(folder / "made" / "2.wav", "", 1.0),
        SoundRecord(
            path=str(folder / "made" / "3.wav"), seconds=1.0, sample_rate=8000, channels=1, treatment=(HOSTILE,)
        ),
    ]
    made[1] = replace(
        made[1], nearest=(Neighbour(str(hostile), 0.98765), Neighbour("hf:some/set/7", 0.5)), treatment=("peak -1 dB",)
    )
    (folder / "made" / "2.wav").write_bytes(b"no audio")
    figures, tables = summarise(made, [real])
    clap = MetricValue(
        name="clap_score",
        value=0.3,
        low=0.2,
        high=0.4,
        n=4,
        higher_is_better=True,
        baselines={"real": 0.5, HOSTILE: 0.1},
    )
    result = Result(
        model=HOSTILE,
        settings={"embedders": {HOSTILE: {"weights": HOSTILE}}},
        metrics=(clap, *figures),
        missing={"fd_openl3": f"put the weights into {HOSTILE}"},
        generated=tuple(made),
        reference=(real,),
        left_out={HOSTILE: HOSTILE},
        tables={**tables, HOSTILE: ({HOSTILE: HOSTILE},)},
    )
    save_result(result, folder / "result.json")
    return folder / "result.json"


@pytest.fixture(scope="module")
def page(stored: Path) -> Path:
    path = stored.parent / "pages" / "report.html"
    command = [sys.executable, "-m", "evaluation.report", str(stored), "-o", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 of 5 sounds have no picture and player; the first: " in done.stderr and "2.wav" in done.stderr
    return path


def test_the_page_holds_all_and_runs_nothing(page: Path) -> None:
    """Every hostile text is shown as it is; no script, no handler, nothing fetched but sounds."""
    found = Page(page.read_text(encoding="utf-8"))
    assert not found.all("script") and not found.all("link") and not found.all("iframe")
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]
    assert all(image["src"].startswith("data:image/webp;base64,") for image in found.all("img"))
    assert len(found.all("audio")) == len(found.all("img")) == 3
    assert found.text.count("hacked") >= 10 and "grid" in [table.get("class") for table in found.all("table")]
    for words in ("on time ↑", "fd openl3", "put the weights", "peak -1 dB", "0.988 ", "hf:some/set/7", "[0.2, 0.4]"):
        assert words in found.text, words
    for words in (
        "3.wav: no such file here",
        "can't be read as audio",
        "Stable Audio Open",
        "mean error",
    ):
        assert words in found.text, words


def test_links_lead_to_the_files(page: Path, stored: Path) -> None:
    """Relative, from the page's folder, whatever characters their names hold."""
    found = Page(page.read_text(encoding="utf-8"))
    addresses = [a["src"] for a in found.all("audio")] + [a["href"] for a in found.all("a")]
    local = [a for a in addresses if not a.startswith(("#", "https://arxiv.org/"))]
    assert len(local) == 3 + 4 + 1 + 2  # players, sounds, a nearest one, and both of the table of training sounds
    for address in local:
        assert re.fullmatch(r"[\w./%~-]+", address) and (page.parent / urllib.parse.unquote(address)).is_file(), address


def test_real_sounds_stand_beside_generated_ones_of_their_prompt(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    articles = [part.partition("</article>")[0] for part in text.split('<article class="prompt">')[1:]]
    labels = {Page(part).text.split("\n")[1]: re.findall(r'class="label">(\w+)<', part) for part in articles}
    assert labels == {
        "a low tone": ["generated", "real"],
        HOSTILE: ["generated"],
        "2": ["generated"],
        "3": ["generated"],
    }


def test_a_sound_without_a_prompt_stands_under_that_of_its_recording() -> None:
    def sound(path: str, prompt: str = "") -> SoundRecord:
        return SoundRecord(path=path, seconds=1, sample_rate=RATE, channels=2, prompt=prompt)

    made = (sound("made/1.wav"), sound("made/2.wav"), sound("made/3.wav", "a low tone"))
    real = (sound("real/1.wav", "a low tone"),)
    found = prompt_groups(Result(model="m", settings={}, metrics=(), generated=made, reference=real))
    assert found == [
        ("a low tone", [("generated", made[0]), ("generated", made[2]), ("real", real[0])]),
        ("2", [("generated", made[1])]),
    ]


def test_sounds_go_into_the_page(stored: Path, tmp_path: Path) -> None:
    """Embedded, nothing is linked that plays; the copies have the sounds' length; fewer prompts can be shown."""
    import soundfile

    cards = report.write_report(stored, tmp_path / "one.html", embed=True, prompts=1)
    found = Page((tmp_path / "one.html").read_text(encoding="utf-8"))
    assert len(cards) == len(found.all("audio")) == 2 and "3 more prompts are not shown" in found.text
    for player, seconds in zip(found.all("audio"), (1.0, 1.5), strict=True):
        kind, _, data = player["src"].partition(";base64,")
        samples, rate = soundfile.read(io.BytesIO(base64.b64decode(data)))
        assert kind == "data:audio/mpeg" and len(samples) / rate == pytest.approx(seconds, abs=0.06)
        assert np.abs(samples).max() == pytest.approx(0.3, abs=0.05)


def test_marks_and_pictures_are_where_the_sound_is(tmp_path: Path) -> None:
    sound = make_sound(tmp_path / "a.wav", "", 0.5)
    places = Places(page=tmp_path / "page.html", result=tmp_path / "r.json")
    found = card("generated", replace(sound, measurements={"end": 0.75}), places)
    assert found.marks == ((0.5, "asked"), (0.75, "ends")) and found.player == "a.wav" and not found.trouble
    assert found.times[0] == (0, "0 s") and found.times[1] == (pytest.approx(0.2), "0.2 s")
    beyond = card("generated", replace(sound, requested=5.0, measurements={}, path="a.wav"), places)
    odd = write_audio(tmp_path / "odd.wav", torch.zeros(2, 3000), 12345)
    assert odd == 1 and card("real", replace(sound, path="odd.wav"), replace(places, embed=True)).player
    assert beyond.marks == () and beyond.player == "a.wav"  # found from the result's folder


def test_facts_say_what_is_known_of_a_sound(tmp_path: Path) -> None:
    sound = make_sound(tmp_path / "a.wav", "", 0.5)
    places = Places(page=tmp_path / "page.html", result=tmp_path / "r.json")
    heard = {"end": 0.75, "width": -7.0, "intro": 3.0, "odd": 1.0}
    assert card("real", replace(sound, measurements=heard, treatment=("mono", "short")), places).facts == (
        ("length", "1 s"),
        ("stored as", "22.05 kHz stereo"),
        ("asked for", "0.5 s"),
        ("ends", "0.75 s"),
        ("width", "-7 dB"),
        ("intro novelty", "3 dB"),
        ("odd", "1"),
        ("treatment", "mono"),
        ("treatment", "short"),
    )
    plain = card("real", replace(sound, measurements={}, requested=None, channels=1, sample_rate=8000), places)
    assert plain.facts == (("length", "1 s"), ("stored as", "8 kHz mono"))


def test_long_sounds_are_pictured_from_their_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = Places(page=tmp_path / "page.html", result=tmp_path / "r.json")
    sound = make_sound(tmp_path / "a.wav", "", 0.25, seconds=1.0)
    whole = card("real", sound, places)
    monkeypatch.setattr("evaluation.report.cards.PICTURED_SECONDS", 0.5)
    begin = card("real", replace(sound, measurements={"end": 0.75}), places)
    make_sound(tmp_path / "half.wav", "", None, seconds=0.5)
    half = card("real", replace(sound, path=str(tmp_path / "half.wav"), seconds=0.5), places)
    assert begin.marks == ((0.5, "asked"),) and ("pictured", "the first 0.5 s") in begin.facts
    assert begin.picture == half.picture != whole.picture and not any(name == "pictured" for name, _ in whole.facts)


def test_copies_hold_all_of_a_sound_that_mp3_can_hold(tmp_path: Path) -> None:
    """Longer than is read at once, at a rate that MP3 has, the first two of its channels, beyond full scale."""
    import soundfile

    places = Places(page=tmp_path / "page.html", result=tmp_path / "r.json", embed=True)
    for rate, channels, kept in ((44100, 4, 44100), (RATE, 1, RATE), (96000, 2, 44100)):
        path = tmp_path / f"{rate}.wav"
        soundfile.write(path, 3 * np.sin(np.arange(280000) / 7)[:, None].repeat(channels, 1), rate, subtype="FLOAT")
        sound = SoundRecord(path=str(path), seconds=280000 / rate, sample_rate=rate, channels=channels)
        player = card("real", sound, places).player or ""
        samples, found = soundfile.read(io.BytesIO(base64.b64decode(player.partition(",")[2])), always_2d=True)
        assert found == kept and samples.shape[1] == min(channels, 2)
        assert len(samples) / found == pytest.approx(280000 / rate, abs=0.1)
        assert np.abs(samples).max() < 1.2  # as a player sounds it; MP3 goes a little beyond what it was given


def test_a_picture_shows_the_channel_that_sounds(tmp_path: Path) -> None:
    places = Places(page=tmp_path / "page.html", result=tmp_path / "r.json")
    time = np.arange(RATE) / RATE
    pictures = []
    for right in (0.0, 0.3):
        write_audio(tmp_path / "a.wav", np.stack((0 * time, right * np.sin(2764 * time))), RATE)
        sound = SoundRecord(path="a.wav", seconds=1, sample_rate=RATE, channels=2)
        pictures.append(card("real", sound, places).picture)
    assert pictures[0] != pictures[1]


def test_a_strip_holds_its_interval_and_what_is_not_known_is_left_out() -> None:
    figure = MetricValue(name="x", value=5, low=0, high=10, n=9, baselines={"real": 2, "noise": 8, "vae": math.nan})
    drawn = strip(figure, ["real", "noise", "vae"])
    assert 'class="interval" x1="8.0" x2="192.0"' in drawn and 'x1="44.8"' in drawn and "nan" not in drawn
    lone = strip(replace(figure, low=math.nan, high=math.nan), ["real", "noise", "vae"])
    assert "interval" not in lone and 'class="mark c0" x1="8.0"' in lone
    assert 'cx="8.0"' in strip(replace(figure, value=2, low=2, high=2, baselines={"real": 2}), ["real"])


def test_a_grid_lies_where_its_lengths_are() -> None:
    """Lengths asked for to the right and measured ones upward, with shares of the columns."""
    row = {"requested_from": 4.0, "requested_to": 6.0, "measured_from": 4.0, "measured_to": 6.0, "n": 1}
    up = row | {"measured_from": 6.0, "measured_to": 8.0, "n": 3}
    columns, rows = timing_grid([row, up, row | {"requested_from": 6.0, "requested_to": 8.0}])
    assert columns == [(4, 6), (6, 8)]
    assert list(rows.items()) == [((6, 8), [(3, 0.75), (0, 0)]), ((4, 6), [(1, 0.25), (1, 1)])]


def test_strips_draw_what_they_are_given() -> None:
    figure = MetricValue(name="x", value=5, low=4, high=6, n=9, baselines={"real": 2, "noise": 8})
    drawn = strip(figure, ["noise", "real"])
    assert 'cx="100.0"' in drawn and 'class="mark c1" x1="8.0"' in drawn and 'class="mark c0" x1="192.0"' in drawn
    assert strip(replace(figure, baselines={}), []) == ""
    row = {"requested_from": 2.0, "requested_to": 4.0, "measured_from": 4.0, "measured_to": 6.0, "n": 3}
    for strange in ({"n": "x"}, {"requested_from": None}, {"measured_from": [1]}, {"n": 0}):
        assert timing_grid([row | strange]) is None
    assert timing_grid([{}]) is None and timing_grid([]) is None


def test_generated_sounds_that_are_most_like_training_sounds_are_listed(tmp_path: Path) -> None:
    """The closest first, with links to both, and the share of recordings that are less close."""
    for name in ("a", "b", "t"):
        write_audio(tmp_path / f"{name}.wav", torch.zeros(2, 100), RATE)

    def near(name: str, *cosines: float) -> SoundRecord:
        found = tuple(Neighbour(str(tmp_path / "t.wav"), cosine) for cosine in cosines)
        return SoundRecord(path=str(tmp_path / name), seconds=1, sample_rate=RATE, channels=2, nearest=found)

    made = (near("a.wav", 0.5, 0.4), near("b.wav", 0.9, 0.1), near("gone.wav", 0.7), near("c.wav"))
    real = (near("r.wav", 0.6), near("r.wav", 0.8), near("r.wav"))
    places = Places(page=tmp_path / "page.html", result=tmp_path / "r.json")
    result = Result(model="m", settings={}, metrics=(), generated=made, reference=real)
    assert most_similar(result) == [(made[1], 1.0), (made[2], 0.5), (made[0], 0.0)]
    assert most_similar(result, 1) == [(made[1], 1.0)]
    text = report.render_page(result, places, 0)[0]
    section = Page(text.partition('<section id="training">')[2].partition("</section>")[0])
    words = " ".join(section.text.split())
    assert "reaches 0.800;" in words and "0.900100.0% b.wav" in words and "0.70050.0% gone.wav" in words
    assert [a["href"] for a in section.all("a")] == ["b.wav", "t.wav", "t.wav", "a.wav", "t.wav"]
    alone = report.render_page(replace(result, reference=()), places, 0)[0]
    assert "No recordings tell" in alone and "0.900</td><td>–</td>" in alone
    assert 'id="training"' not in report.render_page(replace(result, generated=real[2:]), places, 0)[0]


def test_figures_are_told_in_their_units_and_with_what_they_mean(tmp_path: Path) -> None:
    """An extrapolated distance as such; of one sound no interval; nothing for what a row of a table lacks."""
    figures = (
        MetricValue(name="timing_error", value=0.25, low=0.1, high=0.4, n=7),
        MetricValue(name="on_time", value=0.5, low=0.25, high=0.75, n=7, baselines={"real": 1.0}),
        MetricValue(name="width", value=-12.5, low=math.nan, high=math.nan, n=1),
        MetricValue(name="fd_inf_clap", value=2.0, low=1.0, high=3.0, n=7),
        MetricValue(name="fd_clap", value=4.0, low=3.0, high=5.0, n=7),
    )
    tables = {"some": ({"a": 1.5, "b": "x"}, {"a": None, "c": 2})}
    places = Places(page=tmp_path / "page.html", result=tmp_path / "r.json")
    text = report.render_page(Result(model="m", settings={}, metrics=figures, tables=tables), places, 5)[0]
    rows = [" ".join(Page(part).text.split()) for part in text.split('<tr><th scope="row">')[1:6]]
    for row, words in zip(
        rows, ("0.25 s [0.1, 0.4]", "50.0% [25.0%, 75.0%]", "-12.5 dB 1", "2 [1, 3]", "4 [3, 5]"), strict=True
    ):
        assert words in row, row
    assert "real 100.0%" in rows[1] and "extrapolated" in rows[3] and "extrapolated" not in rows[4]
    assert "fewer sounds are farther" in rows[4] and "fewer sounds are farther" not in rows[3]
    assert "nan" not in rows[2] and "[" not in rows[2]
    cells = [re.findall(r"<td.*?>(.*?)</td>", row) for row in re.findall("<tr>(<td.*?)</tr>", text)]
    assert cells[:2] == [["1.5", "x", ""], ["", "", "2"]]


def test_files_that_were_treated_are_listed_under_what_was_done(tmp_path: Path) -> None:
    """Recordings too, and names that are no UTF-8."""
    made = [
        SoundRecord(path=f"{name}.wav", seconds=1, sample_rate=RATE, channels=1, treatment=done)
        for name, done in (("a", ("mono",)), ("b\udcff", ("mono", "short")), ("c", ()))
    ]
    result = Result(model="m", settings={}, metrics=(), generated=tuple(made), reference=(replace(made[0], path="r"),))
    save_result(result, tmp_path / "r.json")
    report.write_report(tmp_path / "r.json", tmp_path / "page.html", prompts=0)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    lists = re.findall(r"<summary>(.*?)</summary><ul>(.*?)</ul>", text)
    assert [(name, re.findall("<li>(.*?)</li>", files)) for name, files in lists] == [
        ("mono (3)", ["a.wav", "b&#56575;.wav", "r"]),
        ("short (1)", ["b&#56575;.wav"]),
    ]


def test_published_rows_stand_only_beside_figures_that_compare(tmp_path: Path) -> None:
    result = Result(model="m", settings={}, metrics=(MetricValue(name="fd_clap", value=1, low=0, high=2, n=3),))
    places = Places(page=tmp_path / "page.html", result=tmp_path / "r.json")
    assert "MusicCaps" not in report.render_page(result, places, 5)[0]
    result = replace(result, metrics=(MetricValue(name="fd_openl3", value=1, low=0, high=2, n=3, unit="windows"),))
    text = report.render_page(result, places, 5)[0]
    assert "MusicCaps" in text and "3 windows" in text and "generated halves" in text and "unknown weights" in text
    text = report.render_page(replace(result, settings={"openl3": {"weights": "12ab"}}), places, 5)[0]
    assert "weights 12ab" in text and "unknown weights" not in text
    assert "Nothing was measured" in report.render_page(replace(result, metrics=()), places, 5)[0]


def test_mistakes_end_in_one_line(stored: Path, tmp_path: Path) -> None:
    def run(*arguments: str | Path) -> str:
        command = [sys.executable, "-m", "evaluation.report", *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode != 0 and done.stderr.count("\n") == 1 and done.stdout == ""
        return done.stderr

    (tmp_path / "bad.json").write_text("{}")
    assert "--prompts must be 0 or more" in run(stored, "--prompts", "-1")
    assert "bad.json: not a result" in run(tmp_path / "bad.json")
    assert "is a folder" in run(stored, "-o", tmp_path)
    before = stored.read_bytes()
    assert "is the file that is read" in run(stored, "-o", stored, "--overwrite")
    (tmp_path / "page.html").write_text("mine")
    assert "page.html: is there already" in run(stored, "-o", tmp_path / "page.html")
    assert stored.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["bad.json", "page.html"]


def test_a_missing_template_engine_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UserError, match=r"stable-audio-lite\[evaluate\]"):
        report.render_page(
            Result(model="m", settings={}, metrics=()), Places(page=tmp_path / "p", result=tmp_path / "r"), 1
        )


def test_the_page_lies_beside_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_result(Result(model="m", settings={}, metrics=(), origin={"device": "cpu"}), tmp_path / "r.json")
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "r.json")])
    report_command.main()
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert '<tr><th scope="row" class="text">device</th><td class="text">cpu</td></tr>' in text


def browse(page: Path) -> tuple[str, str]:
    """The page's DOM once it is loaded, and the console."""
    options = ["--headless=new", "--hide-scrollbars", "--disable-gpu", "--enable-logging=stderr"]
    options += ["--allow-file-access-from-files", f"--user-data-dir={page.parent / 'profile'}", "--timeout=60000"]
    options += ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    command = [str(BROWSER), *options, "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@needs_browser
def test_a_browser_shows_it_without_complaint(page: Path) -> None:
    dom, console = browse(page)
    found = Page(dom)
    assert console == "" and "<title>" in dom and "hacked" in re.findall("<title>(.*?)</title>", dom)[0]
    assert len(found.all("audio")) == 3 and not found.all("script")
    assert dom.count('<th scope="row">clap score ↑') == 1 and '<table class="grid">' in dom


# Runs in a page around the report, when all in it is loaded.
PROBE = """
  const inside = document.querySelector("iframe").contentDocument, root = inside.documentElement;
  document.querySelector("pre").textContent = JSON.stringify({
    heard: [...inside.querySelectorAll("audio")].map(audio => +audio.duration.toFixed(1)),
    pictures: [...inside.images].map(image => image.naturalWidth),
    width: root.clientWidth, overflow: root.scrollWidth - root.clientWidth,
  })
"""


@needs_browser
def test_a_browser_plays_the_sounds_and_a_phone_needs_no_sideways_scrolling(page: Path) -> None:
    """In a frame as wide as a phone; the players of this copy load at once."""
    text = page.read_text(encoding="utf-8")
    (page.parent / "eager.html").write_text(text.replace('preload="none"', 'preload="metadata"'), encoding="utf-8")
    frame = page.parent / "frame.html"
    frame.write_text(
        f"<!doctype html><pre></pre><script>onload = () => {{ {PROBE} }}</script>"
        '<iframe src="eager.html" style="width:360px;height:800px;border:0"></iframe>'
    )
    dom, _ = browse(frame)
    said = json.loads(html.unescape(re.findall("<pre>(.*?)</pre>", dom)[0]))
    assert said == {"heard": [1.0, 1.5, 1.0], "pictures": [600, 600, 600], "width": 360, "overflow": 0}
