"""The page: what its form asks for is made, told in full and kept; mistakes are one line; nobody else is called."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from fastapi.testclient import TestClient

from stable_audio_lite import cli
from stable_audio_lite.audio.io import read_audio, read_metadata, write_audio
from stable_audio_lite.edits import CROSSFADE_SECONDS
from stable_audio_lite.errors import UserError
from stable_audio_lite.server.addresses import is_loopback
from stable_audio_lite.server.jobs import Jobs
from stable_audio_lite.server.models import ModelStore
from stable_audio_lite.server.studio import Made, Studio, Wish, peaks, read_source

ROOT = Path(__file__).parents[1]
RATE = 44100
TONE = "a tone.wav"


@pytest.fixture(scope="module")
def jobs(store: ModelStore) -> Iterator[Jobs]:
    jobs = Jobs(store)
    yield jobs
    jobs.close()


@pytest.fixture
def studio(jobs: Jobs, tmp_path: Path) -> Studio:
    for name in ("session", "kept"):
        (tmp_path / name).mkdir()
    return Studio(jobs, tmp_path / "session", tmp_path / "kept")


@pytest.fixture
def make(studio: Studio) -> Callable[..., list[Made]]:
    def make(wish: Wish | None = None, **values: Any) -> list[Made]:
        wish = wish or Wish(**{"prompt": "warm piano", "steps": 2, "seed": 5, "seconds": 0.5} | values)
        job = studio.submit(wish)
        assert job.wait(300)
        return studio.collect(job, wish)

    return make


@pytest.fixture
def tone(tmp_path: Path) -> str:
    """A second of a tone, louder in its last quarter."""
    time = np.arange(RATE) / RATE
    write_audio(tmp_path / TONE, np.where(time < 0.75, 0.1, 0.4) * np.sin(1000 * time) * np.ones((2, 1)), RATE)
    return str(tmp_path / TONE)


def heard(sound: Made | str) -> np.ndarray:
    return read_audio(sound.path if isinstance(sound, Made) else sound, RATE).numpy()


def test_a_wish_becomes_files_that_tell_how_to_make_them_again(make: Callable[..., list[Made]], studio: Studio) -> None:
    """Settings are inside, the same wish gives the same samples, and a second one doesn't replace what is kept."""
    first, second = make(count=2, cfg=2.0, negative="drums")
    inside = read_metadata(first.path).settings
    assert inside == first.settings and inside["negative"] == "drums" and (inside["steps"], inside["cfg"]) == (2, 2.0)
    assert (first.settings["seed"], second.settings["seed"]) == (5, 6) and first.seconds == 0.5
    (again,) = make(second.wish)
    assert np.allclose(heard(again), heard(second), atol=2e-3) and not np.allclose(
        heard(first), heard(second), atol=0.05
    )
    assert sorted(path.name for path in studio.keep.iterdir()) == [  # type: ignore[union-attr]
        "warm-piano-5.wav",
        "warm-piano-6-2.wav",
        "warm-piano-6.wav",
    ]
    studio.discard([first, second, again])
    assert not list(studio.folder.iterdir()) and len(list(studio.keep.iterdir())) == 3  # type: ignore[union-attr]


def test_a_stretch_is_made_anew_and_the_rest_stays(make: Callable[..., list[Made]], tone: str) -> None:
    (sound,) = make(way="stretch", source=tone, first=0.25, last=0.5, seconds=None)
    before, after = heard(tone), heard(sound)
    fade = int(CROSSFADE_SECONDS * RATE) + 1
    assert before.shape == after.shape
    assert np.allclose(before[:, : RATE // 4 - fade], after[:, : RATE // 4 - fade], atol=1e-4)
    assert np.allclose(before[:, RATE // 2 + fade :], after[:, RATE // 2 + fade :], atol=1e-4)
    assert np.abs(before - after)[:, RATE // 4 : RATE // 2].max() > 0.01
    assert (sound.settings["init"], sound.settings["inpaint"]) == (TONE, "0.25-0.5")


def test_sounds_are_continued_varied_and_looped(make: Callable[..., list[Made]], tone: str) -> None:
    (longer,) = make(way="continuation", source=tone, seconds=0.5)
    assert heard(longer).shape[1] == 1.5 * RATE and longer.settings["continues"] == TONE
    assert np.allclose(heard(longer)[:, :RATE], heard(tone), atol=1e-4)
    (varied,) = make(way="variation", source=tone, strength=0.3)
    assert heard(varied).shape == heard(tone).shape and varied.settings["strength"] == 0.3
    (loop,) = make(way="loop", bars=1, bpm=400)
    assert loop.seconds == pytest.approx(0.6, abs=1e-4) and loop.settings["prompt"] == "warm piano, 400 bpm"
    (waltz,) = make(way="loop", prompt="a waltz, 400 bpm", bars=1, bpm=120)
    assert waltz.seconds == pytest.approx(0.45, abs=1e-4)


def test_of_a_longer_sound_the_models_window_is_varied(make: Callable[..., list[Made]], tmp_path: Path) -> None:
    write_audio(tmp_path / "long.wav", 0.1 * np.random.default_rng(0).standard_normal((2, 3 * RATE)), RATE)
    (varied,) = make(way="variation", source=str(tmp_path / "long.wav"))
    assert varied.seconds == pytest.approx(64 * 1024 / RATE, abs=1e-3)


def test_a_sounds_own_prompt_is_used_where_none_is_given(make: Callable[..., list[Made]]) -> None:
    (sound,) = make()
    (varied,) = make(way="variation", source=str(sound.path), prompt=" ")
    assert varied.settings["prompt"] == "warm piano"


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"prompt": "  "}, "the prompt is empty"),
        ({"way": "variation"}, "sound: give the one to start from"),
        ({"way": "stretch", "source": TONE}, "choose it on the waveform"),
        ({"way": "stretch", "source": TONE, "first": 0.5, "last": 7.0}, "a tone.wav: can't inpaint 0.5-7"),
        ({"way": "continuation", "source": TONE, "seconds": None}, "how many seconds should follow"),
        ({"way": "variation", "source": "words.wav"}, "sound: "),
        ({"way": "variation", "source": "gone.wav"}, "sound: is no longer there; give it again"),
        ({"way": "sideways"}, "way: is one of"),
        ({"way": "loop", "bars": 1}, "needs a tempo"),
        ({"way": "loop", "bars": 400, "bpm": 120}, "at most"),
        ({"count": 9}, "sounds: at most 8"),
        ({"count": 0}, "sounds: say how many, 1 to 8"),
        ({"count": None}, "sounds: say how many, 1 to 8"),
        ({"seed": -1}, "seed must lie in 0"),
        ({"seed": 10**20}, "seed must lie in 0"),
        ({"way": "loop", "bars": 0}, "bars"),
        ({"way": "loop", "bars": 1, "bpm": 0}, "bpm"),
        ({"way": "stretch", "source": TONE, "first": -1.0, "last": 0.5}, "can't inpaint -1-0.5"),
        ({"prompt": "a" * 2001}, "at most 2000 characters here, got 2001"),
        ({"steps": 201}, "steps: at most 200"),
        ({"seconds": 61.0}, "length: at most 60"),
        ({"cfg": 1.0, "negative": "drums"}, "there is none at cfg 1"),
        ({"model": "/etc"}, "there is no '/etc' here"),
        ({"lora": "/etc"}, "there is no '/etc' here"),
    ],
)
def test_mistakes_are_one_line_without_places(
    studio: Studio, tone: str, tmp_path: Path, wish: dict[str, Any], words: str
) -> None:
    (tmp_path / "words.wav").write_text("no sound at all")
    if "source" in wish:
        wish = wish | {"source": str(tmp_path / wish["source"])}
    with pytest.raises(UserError) as caught:
        studio.submit(Wish(**{"prompt": "piano"} | wish))
    text = str(caught.value)
    assert words in text and "\n" not in text and str(tmp_path) not in text


def test_cancelled_work_leaves_no_files(studio: Studio) -> None:
    wish = Wish(prompt="piano", seconds=16, steps=200, count=8)
    job = studio.submit(wish)
    studio.jobs.cancel(job.id)
    with pytest.raises(UserError, match="cancelled"):
        studio.collect(job, wish)
    assert not list(studio.folder.iterdir())


def test_peaks_are_where_the_sound_is(tone: str) -> None:
    tops, seconds = peaks(tone, 100)
    assert len(tops) == 100 and seconds == 1 and max(tops) == 1
    assert tops[80:90] == pytest.approx([1] * 10, abs=0.05) and tops[20:30] == pytest.approx([0.25] * 10, abs=0.05)


def test_short_and_silent_sounds_have_peaks(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros((3, 2)), RATE)
    tops, _ = peaks(str(tmp_path / "a.wav"))
    assert set(tops) == {0.0}


def test_a_source_is_read_with_limits(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "hours.flac", np.zeros(400 * 8000), 8000)
    with pytest.raises(UserError, match="300"):
        read_source(str(tmp_path / "hours.flac"))


def test_hosts_of_this_machine() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost", b"127.0.0.1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org", "")))


def test_nobody_else_may_come_in_without_a_password(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.delenv("STABLE_AUDIO_LITE_PASSWORD", raising=False)
    assert cli.main(["ui", "--host", "0.0.0.0"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: --host 0.0.0.0: opens the page to other machines; give --password"
    )


def test_a_missing_gradio_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "stable_audio_lite.server.page_host", raising=False)
    assert cli.main(["ui"]) == 2
    assert "stable-audio-lite[ui]" in capsys.readouterr().err


def test_the_form_holds_the_wish(page: Any) -> None:
    """Each field of the form is one of the wish, and filling it in again gives the same wish."""
    assert sorted(page.fields) == sorted(field.name for field in fields(Wish))
    wish = replace(Wish(), prompt="piano", seed=7, way="loop", bars=2)
    assert Wish(**dict(zip(page.fields, page.filled(wish), strict=True))) == wish
    bounds = [(field.minimum, field.maximum) for field in page.fields.values() if field.get_block_name() == "number"]
    assert bounds == [(None, None)] * 6  # which Gradio would tell in a message that goes away


def test_only_what_takes_time_goes_through_the_queue(page: Any, make: Callable[..., list[Made]]) -> None:
    """Of events that follow one another within milliseconds, the queue's stream loses answers."""

    def served() -> list[tuple[str, bool]]:
        events = [event for event in page.blocks.fns.values() if event.fn is not None]
        return [(getattr(event.fn, "__name__", ""), event.queue) for event in events]

    form = served()
    with page.blocks:
        page._card(make()[0])
    assert len(served()) == len(form) + 2  # again, and onward, whose other half happens in the browser
    assert {"_heard", "_of_model", "_choose", "_cancel"} < dict(form).keys()
    assert [name for name, queued in served() if queued] == ["_make_sounds", "_leave"]  # that of a closed tab


def test_examples_are_those_that_the_docs_have() -> None:
    """Their commands are listed, so that whoever makes the starter anew hears them again."""
    pytest.importorskip("gradio")
    from stable_audio_lite.server.page import EXAMPLES

    listed = (ROOT / "docs" / "sounds.md").read_text(encoding="utf-8")
    for prompt, seconds, seed in EXAMPLES:
        assert re.search(rf'"{re.escape(prompt)}" --seconds {seconds:g} --seed {seed}\b', listed), prompt


@pytest.fixture
def page(studio: Studio) -> Any:
    pytest.importorskip("gradio")
    from stable_audio_lite.server.page import Page

    return Page(studio)


@pytest.fixture(scope="module")
def client(jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A page with a password."""
    pytest.importorskip("gradio")
    from stable_audio_lite.server import page_host

    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        patch.setattr(page_host, "_GUESS_SECONDS", 0.01)
        with TestClient(page_host.page_app(Studio(jobs, folder), "open sesame")) as client:
            yield client


def test_the_password_is_asked_for(client: TestClient) -> None:
    client.cookies.clear()
    assert client.get("/config").status_code == 401
    assert client.post("/login", data={"username": "me", "password": "open"}).status_code == 400
    assert client.post("/login", data={"username": "me", "password": "open sesame"}).json()["success"]
    assert client.get("/config").status_code == 200


def test_the_page_names_no_other_host_and_forbids_them(client: TestClient, tmp_path: Path) -> None:
    """No script, style or font from elsewhere; files outside of the session's folder are not served."""
    (tmp_path / "secret.txt").write_text("mine")
    client.post("/login", data={"username": "me", "password": "open sesame"})
    answer = client.get("/")
    assert answer.status_code == 200 and "default-src 'self'" in answer.headers["content-security-policy"]
    assert "<link" not in "".join(line for line in answer.text.splitlines() if 'href="http' in line)
    assert 'src="http' not in answer.text
    assert "@import" not in client.get("/theme.css").text and "url(http" not in client.get("/theme.css").text
    for path in (tmp_path / "secret.txt", Path(__file__), "/etc/passwd", "../../etc/passwd"):
        assert client.get(f"/gradio_api/file={path}").status_code in (403, 404), path


def test_the_process_calls_no_other_machine() -> None:
    """Its own it may call."""
    code = """if True:
        import json, socket
        from stable_audio_lite.server.addresses import stay_local
        stay_local()
        own = socket.create_server(("127.0.0.1", 0))
        socket.create_connection(own.getsockname()).close()
        refused = []
        for call in (
            lambda: socket.create_connection(("192.0.2.1", 80), timeout=1),
            lambda: socket.getaddrinfo("example.org", 80),
            lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 53)),
        ):
            try:
                call()
            except PermissionError as error:
                refused.append(str(error))
        print(json.dumps(refused))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [line.split(":")[0] for line in json.loads(done.stdout)] == ["192.0.2.1", "example.org", "192.0.2.1"]
