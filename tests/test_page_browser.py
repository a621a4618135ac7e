"""The page in Chromium: typed, waited for, heard, downloaded, mended, cancelled, by two at once, wide and narrow."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from stable_audio_lite.audio.io import read_audio, read_metadata, write_audio

playwright = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [pytest.mark.long, pytest.mark.skipif(BROWSER is None, reason="needs Chromium")]

ROOT = Path(__file__).parents[1]
RATE = 44100
PATIENCE = 300_000  # milliseconds, for machines that are busy
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
FLAGS += ["--disable-sync", "--autoplay-policy=no-user-gesture-required"]
# Writes down every address that the process tries to reach or to look up, before the page's own guard sees it.
WATCHED = """if True:
    import sys
    calls = open(sys.argv.pop(1), "a", buffering=1)
    def watch(event, arguments):
        if event in ("socket.connect", "socket.sendto"):
            print(event, arguments[1], file=calls)
        elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
            print(event, arguments[0], file=calls)
    sys.addaudithook(watch)
    from stable_audio_lite.cli import main
    sys.exit(main())
"""

# Remembers what is played, which is no element of the page.
PLAYED = """
    const played = (window.played = []), play = HTMLMediaElement.prototype.play;
    HTMLMediaElement.prototype.play = function () { played.push(this); return play.call(this); };
"""


class Served:
    """A page that is served by a process, and the folders that it uses."""

    def __init__(self, folder: Path, bundle: Path):
        self.calls, self.kept, self.temporary = folder / "calls.txt", folder / "kept", folder / "temporary"
        self.temporary.mkdir()
        command = [sys.executable, "-c", WATCHED, str(self.calls), "ui", "--model", str(bundle), "--port", "0"]
        environment = os.environ | {"TMPDIR": str(self.temporary), "PYTHONPATH": str(ROOT)}
        self.log = (folder / "log.txt").open("w+")
        self.process = subprocess.Popen(
            [*command, "--keep", str(self.kept)], env=environment, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().split()[0]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(300)


@pytest.fixture(scope="module")
def served(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("page"), tiny_bundle)
    yield served
    if served.process.poll() is None:
        served.process.kill()
        served.process.wait()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=FLAGS)  # with a profile of its own
        yield browser
        browser.close()


class Tab:
    """A tab of somebody who uses the page; remembers what it asked the network for, and what went wrong."""

    def __init__(self, browser: Any, address: str, width: int = 1400):
        self.context = browser.new_context(viewport={"width": width, "height": 900})
        self.context.set_default_timeout(PATIENCE)
        self.context.add_init_script(PLAYED)
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.faults: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.faults.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.goto(address)
        self.make.wait_for()

    @property
    def make(self) -> Any:
        return self.page.get_by_role("button", name="Make", exact=True)

    @property
    def cancel(self) -> Any:
        return self.page.get_by_role("button", name="Cancel", exact=True)

    @property
    def cards(self) -> Any:
        return self.page.locator(".card")

    def fill(self, **values: object) -> None:
        labels = {"prompt": "What to hear"}
        labels |= {name: f"number input for {name.capitalize()}" for name in ("seconds", "steps")}
        for name, value in values.items():
            self.page.get_by_label(labels.get(name, name.capitalize()), exact=True).first.fill(str(value))

    def value(self, label: str) -> str:
        return self.page.get_by_label(label, exact=True).first.input_value()

    def status(self, text: str) -> None:
        """Wait until the line below the button says so."""
        self.page.locator("#status").get_by_text(text).wait_for()

    def download(self, card: int, to: Path) -> Path:
        with self.page.expect_download() as caught:
            self.cards.nth(card).get_by_text("Download").click()
        path = to / caught.value.suggested_filename
        caught.value.save_as(path)
        return path

    def give(self, sound: Path) -> None:
        """Give a sound to start from."""
        self.page.locator("#source input[type=file]").set_input_files(str(sound))


@pytest.fixture
def tab(browser: Any, served: Served) -> Iterator[Callable[..., Tab]]:
    tabs: list[Tab] = []

    def open_tab(width: int = 1400) -> Tab:
        tabs.append(Tab(browser, served.address, width))
        return tabs[-1]

    yield open_tab
    for tab in tabs:
        tab.context.close()
        hosts = {urlsplit(url).netloc for url in tab.requests if url.startswith(("http", "ws"))}
        assert hosts == {urlsplit(served.address).netloc}, hosts
        assert tab.faults == []


def test_words_become_a_sound_to_play_and_to_keep(tab: Callable[..., Tab], served: Served, tmp_path: Path) -> None:
    """Prompt, wait, play, download; the file has its settings inside; the same again is the same sound."""
    one = tab()
    assert one.value("Seed") == ""
    one.fill(prompt="warm slow piano", seconds=1, seed=3, sounds=2)
    one.make.click()
    one.status("2 sounds in")
    one.cards.nth(1).wait_for()
    playwright.expect(one.cards.locator("img[alt=Spectrogram]")).to_have_count(2, timeout=PATIENCE)
    player = one.cards.first.get_by_test_id("waveform-Audio")
    playwright.expect(player.locator("#duration")).to_have_text("0:01")  # before, a click may be lost
    player.get_by_role("button", name="Play", exact=True).click()
    one.page.wait_for_function("window.played.some(media => media.duration > 0.99 && media.currentTime > 0.1)")
    path = one.download(0, tmp_path)
    settings = read_metadata(path).settings
    assert (settings["prompt"], settings["seed"], settings["seconds"]) == ("warm slow piano", 3, 1.0)
    assert path.read_bytes() == (served.kept / path.name).read_bytes()
    shown = one.cards.first.locator(".settings").inner_text()
    assert "seed 3" in shown and f"model {settings['model']}" in shown

    one.fill(prompt="something else", seed=9, sounds=1)
    one.cards.nth(1).get_by_text("Again with these settings").click()
    playwright.expect(one.page.get_by_label("Seed", exact=True)).to_have_value("4", timeout=PATIENCE)
    assert one.value("What to hear") == "warm slow piano" and one.value("Sounds") == "1"
    one.make.click()
    one.status("1 sound in")
    playwright.expect(one.cards).to_have_count(1, timeout=PATIENCE)
    (tmp_path / "again").mkdir()
    again = one.download(0, tmp_path / "again")
    assert np.allclose(read_audio(again), read_audio(served.kept / "warm-slow-piano-4.wav"), atol=2e-3)
    playwright.expect(one.page.locator("#gallery .thumbnail-item")).to_have_count(3, timeout=PATIENCE)


def test_a_stretch_that_is_dragged_over_is_made_anew(tab: Callable[..., Tab], tmp_path: Path) -> None:
    time = np.arange(RATE) / RATE
    write_audio(tmp_path / "tone.wav", 0.2 * np.sin(1000 * time) * np.ones((2, 1)), RATE)
    one = tab()
    one.page.get_by_text("Mend a stretch").click()
    one.give(tmp_path / "tone.wav")
    one.page.locator("#stretch").get_by_text("Drag over").wait_for()
    strip = one.page.locator("#stretch .strip")
    strip.scroll_into_view_if_needed()
    box = strip.bounding_box()
    one.page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 30)
    one.page.mouse.down()
    one.page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 30, steps=3)
    one.page.mouse.up()
    playwright.expect(one.page.get_by_label("to second", exact=True)).not_to_have_value("", timeout=PATIENCE)
    first, last = float(one.value("From second")), float(one.value("to second"))
    assert (first, last) == (pytest.approx(0.3, abs=0.02), pytest.approx(0.6, abs=0.02))
    one.fill(prompt="fast techno drums", seed=1)
    one.make.click()
    one.status("1 sound in")
    one.cards.first.wait_for()
    path = one.download(0, tmp_path)
    assert read_metadata(path).settings["inpaint"] == f"{first:g}-{last:g}"
    before, after = (read_audio(p).numpy() for p in (tmp_path / "tone.wav", path))
    changed = np.flatnonzero(np.abs(before - after).max(0) > 1e-3) / RATE
    assert first - 0.03 < changed.min() and changed.max() < last + 0.03 and len(changed) > 0.2 * RATE


def test_work_is_cancelled_and_mistakes_are_told(tab: Callable[..., Tab]) -> None:
    one = tab()
    one.make.click()
    one.status("the prompt is empty; say what you want to hear")
    long_work(one)
    one.cancel.click()
    one.status("cancelled")
    playwright.expect(one.make).to_be_enabled(timeout=PATIENCE)
    playwright.expect(one.cards).to_have_count(0, timeout=PATIENCE)


def test_two_tabs_take_turns_and_have_their_own_galleries(tab: Callable[..., Tab]) -> None:
    """One waits while the other's is made, goes on when that is over, or when its tab is closed."""
    one, two, three = tab(), tab(), tab()
    long_work(one)
    for other, seed in ((two, 1), (three, 2)):
        other.fill(prompt="piano", seconds=0.5, seed=seed)
        other.make.click()
        other.status("Waiting")
    one.context.close()
    for other in (two, three):
        other.status("1 sound in")
        other.cards.first.wait_for()
        playwright.expect(other.page.locator("#gallery .thumbnail-item")).to_have_count(1, timeout=PATIENCE)
    assert "seed 1" in two.cards.first.inner_text() and "seed 2" in three.cards.first.inner_text()


@pytest.mark.parametrize("width", [1400, 400])
def test_it_fits_wide_and_narrow(tab: Callable[..., Tab], width: int, tmp_path: Path) -> None:
    """No sideways scrolling; an example fills in the form; screenshots go to SCREENSHOTS, where that is set."""
    one = tab(width)
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    one.page.get_by_text("Loop", exact=True).click()
    one.page.get_by_label("Bars").wait_for()
    one.page.screenshot(path=folder / f"loop-{width}.png", full_page=True)
    one.page.get_by_text("From words", exact=True).click()
    one.fill(prompt="a very long prompt of many words " * 5, seconds=1)
    one.make.click()
    one.status("1 sound in")
    one.cards.first.wait_for()
    one.page.locator("#gallery img").first.wait_for()
    one.page.screenshot(path=folder / f"made-{width}.png", full_page=True)
    assert one.page.evaluate("document.scrollingElement.scrollWidth") == width


def test_a_request_that_names_an_address_is_refused(tab: Callable[..., Tab], served: Served) -> None:
    one = tab()
    for path in ("gradio_api/file=http://192.0.2.1/a.wav", "gradio_api/proxy=http://192.0.2.1/a.wav"):
        assert one.page.evaluate("path => fetch(path).then(answer => answer.status)", path) >= 400
    one.faults.clear()  # the browser's own note of that


def test_it_stops_and_leaves_nothing_and_called_nobody(browser: Any, served: Served) -> None:
    """The last one here, a tab open: files are gone but for those that are kept, every address was this machine's."""
    last = Tab(browser, served.address)
    assert served.stop() == 0
    last.context.close()
    left = [path for path in served.temporary.rglob("*") if path.is_file()]
    assert left == [] and list(served.kept.glob("*.wav"))
    served.log.seek(0)
    log = served.log.read()
    assert "Traceback" not in log and "ERROR" not in log
    calls = served.calls.read_text().splitlines() if served.calls.exists() else []
    others = [line for line in calls if not re.search(r"127\.0\.0\.1|::1|localhost|AF_UNIX", line)]
    assert not [line for line in others if "192.0.2.1" not in line], others


def long_work(tab: Tab) -> None:
    """Begin what takes long enough to be stopped."""
    tab.page.get_by_role("button", name="More").click()
    tab.fill(prompt="piano", seconds=16, steps=200, sounds=8)
    tab.make.click()
    tab.page.get_by_role("progressbar").wait_for()
