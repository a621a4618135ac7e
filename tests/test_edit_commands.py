"""Sound in at the command line: variations, inpainting, loops and continuations; what is refused."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml

from stable_audio_lite import cli
from stable_audio_lite.audio.io import audio_info, read_audio, read_metadata, write_audio
from stable_audio_lite.edits import CROSSFADE_SECONDS
from stable_audio_lite.pipeline import StableAudio
from stable_audio_lite.wording import beats_of, tempo_of

RATE = 44100
FADE = int(CROSSFADE_SECONDS * RATE) + 1


@pytest.fixture
def run(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run a command with the tiny bundle in a folder with `chord.wav`, 1 s with its prompt inside, and others."""
    monkeypatch.chdir(tmp_path)
    time = np.arange(RATE) / RATE
    chord = 0.1 * np.stack([np.sin(2 * np.pi * f * time) + np.sin(2 * np.pi * 330 * time) for f in (220, 277)])
    write_audio("chord.wav", chord, RATE, {"prompt": "warm piano"})
    write_audio("fast.wav", chord, RATE, {"prompt": "piano, 90 bpm, C major"})
    write_audio("bare.wav", chord[:1, :20000], RATE)
    write_audio("instant.wav", chord[:, 20000:20001] + 0.1, RATE)
    write_audio("silent.wav", np.zeros((2, RATE)), RATE)
    write_audio("long.wav", np.tile(chord, 3), RATE)
    Path("broken.wav").write_bytes(b"no sound")
    fixed = ["--model", str(tiny_bundle), "--device", "cpu", "--dtype", "float32", "--steps", "2"]
    return lambda *args: cli.main([*map(str, args), *fixed])


def test_a_variation_needs_no_prompt_where_the_sound_has_one(run, capsys) -> None:
    assert run("generate", "--init", "chord.wav", "--strength", 0.5, "--seed", 3, "--count", 2) == 0
    for seed in (3, 4):
        stored = read_metadata(f"warm-piano-{seed}.wav").settings
        assert (stored["prompt"], stored["init"], stored["strength"]) == ("warm piano", "chord.wav", 0.5)
    assert audio_info("warm-piano-3.wav").frames == RATE
    out = capsys.readouterr().out
    assert "init chord.wav, strength 0.5" in out and "real-time factor" in out
    assert run("generate", "drums", "--init", "bare.wav", "--seed", 3, "-o", "d.wav") == 0
    assert read_metadata("d.wav").settings["strength"] == 0.6 and audio_info("d.wav").frames == 20000


def test_inpainting_keeps_the_rest(run) -> None:
    assert run("generate", "--init", "chord.wav", "--inpaint", "0.3-0.5", "0.7-0.75", "-o", "a.wav") == 0
    before, after = read_audio("chord.wav"), read_audio("a.wav")
    changed = (before - after).abs().amax(0) > 1e-6
    near = torch.zeros(RATE, dtype=torch.bool)
    for first, last in ((0.3, 0.5), (0.7, 0.75)):
        near[round(first * RATE) - FADE : round(last * RATE) + FADE] = True
        assert changed[round(first * RATE) : round(last * RATE)].float().mean() > 0.9
    assert not changed[~near].any()
    assert read_metadata("a.wav").settings["inpaint"] == "0.3-0.5 0.7-0.75"


def test_a_prompt_takes_the_place_of_the_one_inside_whose_tempo_is_another(run) -> None:
    assert run("continue", "fast.wav", "piano", "--bpm", 120, "--seconds", 0.3, "-o", "a.wav") == 0
    assert read_metadata("a.wav").settings["prompt"] == "piano, 120 bpm"
    assert run("continue", "fast.wav", "--bpm", 90, "--seconds", 0.3, "-o", "b.wav") == 0
    assert read_metadata("b.wav").settings["prompt"] == "piano, 90 bpm, C major"


def test_a_loop_lasts_its_bars_to_the_sample(run, capsys) -> None:
    """At the tempo of the prompt, which --bpm and --key add to; a waltz has three beats a bar."""
    assert run("generate", "piano", "--loop", "--bars", 1, "--bpm", 340, "--key", "a minor", "-o", "a.wav") == 0
    stored = read_metadata("a.wav").settings
    assert audio_info("a.wav").frames == round(4 * 60 / 340 * RATE)
    assert (stored["prompt"], stored["loop"], stored["bars"], stored["bpm"]) == (
        "piano, 340 bpm, A minor",
        True,
        1,
        340,
    )
    Path("prompts.txt").write_text("waltz for piano, 300 bpm\npiano at 390 BPM\ndrums, 390 bpm")
    assert run("generate", "--prompts", "prompts.txt", "--loop", "--bars", 1, "-o", "b.wav") == 0
    lengths = [audio_info(f"b-{number}.wav").frames for number in (1, 2, 3)]
    assert lengths == [round(3 * 60 / 300 * RATE), *[round(4 * 60 / 390 * RATE)] * 2]


def test_four_bars_at_120_bpm_last_8_seconds(run, tiny_bundle: Path) -> None:
    shutil.copytree(tiny_bundle, "wide")
    config = yaml.safe_load(Path("wide/config.yaml").read_text())
    Path("wide/config.yaml").write_text(yaml.safe_dump(config | {"latent_frames": 384}))
    wide = ["--model", "wide", "--device", "cpu", "--dtype", "float32", "--steps", "1"]
    assert cli.main(["generate", "piano, 120 bpm", "--loop", "--bars", "4", "-o", "a.wav", *wide]) == 0
    assert audio_info("a.wav").frames == 8 * RATE


def test_a_continuation_begins_with_the_sound_itself(run, capsys) -> None:
    """To the sample, and goes on as the pipeline's `extend` does; WAV and FLAC hold the settings."""
    for name in ("a.wav", "b.flac"):
        assert run("continue", "chord.wav", "--seconds", 2.0, "--seed", 5, "-o", name) == 0
        whole = read_audio(name)
        assert whole.shape == (2, 3 * RATE)
        torch.testing.assert_close(whole[:, :RATE], read_audio("chord.wav"), atol=2e-7, rtol=0)
        stored = read_metadata(name).settings
        assert (stored["prompt"], stored["continues"], stored["seed"]) == ("warm piano", "chord.wav", 5)
        assert (stored["seconds_start"], stored["seconds_total"]) == (1.0, 3.0)
        assert read_metadata(name).title == "warm piano"
    torch.testing.assert_close(read_audio("a.wav"), read_audio("b.flac"), atol=2e-7, rtol=0)
    assert run("continue", "bare.wav", "drums", "--seconds", 0.3, "--seed", 1, "--count", 2, "-o", "c.wav") == 0
    assert [read_metadata(f"c-{number}.wav").settings["seed"] for number in (1, 2)] == [1, 2]
    assert "continues bare.wav" in capsys.readouterr().out


def test_what_is_too_loud_is_turned_down_and_the_source_stays(run, monkeypatch, capsys) -> None:
    from stable_audio_lite.edits import After, Edit

    for kind in (Edit, After):
        decode = kind.decode
        monkeypatch.setattr(kind, "decode", lambda self, *args, decode=decode: 1000 * decode(self, *args))
    assert run("continue", "chord.wav", "--seconds", 1.5, "-o", "a.wav") == 0
    whole = read_audio("a.wav")
    torch.testing.assert_close(whole[:, :RATE], read_audio("chord.wav"), atol=2e-7, rtol=0)
    assert whole.abs().max() <= 1 and "turned down to 0.0" in capsys.readouterr().out
    later = whole[:, RATE + RATE // 4 :]  # but for fades to other gains, nothing is clipped
    assert float((later.abs() > 0.999).float().mean()) < 0.05


def test_a_stretch_that_is_too_loud_is_turned_down_alone(run, monkeypatch, capsys) -> None:
    from stable_audio_lite.representation import LatentRepresentation

    decode = LatentRepresentation.decode_between
    monkeypatch.setattr(LatentRepresentation, "decode_between", lambda *args: 1000 * decode(*args))
    assert run("generate", "--init", "chord.wav", "--inpaint", "0.3-0.5", "--count", 2, "-o", "a.wav") == 0
    assert "attenuated" not in capsys.readouterr().out
    for made in (read_audio("a-1.wav"), read_audio("a-2.wav")):
        assert torch.equal(made[:, 23000:], read_audio("chord.wav")[:, 23000:])
        assert 0.3 < float(made.abs().max()) <= 1


def test_a_sound_beyond_full_scale_is_attenuated_and_that_is_said(run, capsys) -> None:
    loud = 4 * read_audio("chord.wav").numpy() / read_audio("chord.wav").abs().max().item()
    soundfile.write("loud.wav", loud.T, RATE, subtype="FLOAT")
    assert run("continue", "loud.wav", "drums", "--seconds", 0.3, "-o", "a.wav") == 0
    torch.testing.assert_close(read_audio("a.wav")[:, :RATE], torch.from_numpy(loud) / 4, atol=2e-6, rtol=0)
    assert "all of it attenuated to 0.250" in capsys.readouterr().out


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_continuation_leaves_nothing(
    run, tmp_path: Path, monkeypatch, capsys, number: signal.Signals, status: int
) -> None:
    before = sorted(tmp_path.iterdir())
    extended = StableAudio._extended

    def interrupted(*args: object):  # type: ignore[no-untyped-def]
        yield next(extended(*args))
        if number == signal.SIGINT:
            raise KeyboardInterrupt  # a process in the background ignores the signal itself
        os.kill(os.getpid(), number)

    monkeypatch.setattr(StableAudio, "_extended", interrupted)
    try:
        assert run("continue", "chord.wav", "--seconds", 3, "-o", "a.wav") == status
    except SystemExit as error:
        assert error.code == status
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate", "x", "--init", "none.wav"], "none.wav: no such"),
        (["generate", "x", "--init", "instant.wav"], "instant.wav: too short to be made over; give 0.023 s or more"),
        (["continue", "instant.wav", "x", "--seconds", 1], "instant.wav: too short to go on from"),
        (["generate", "x", "--init", "broken.wav"], "broken.wav: can't be read as audio"),
        (["generate", "x", "--init", "silent.wav"], "silent.wav: is silent"),
        (["generate", "x", "--init", "long.wav"], "long.wav: lasts 3.000 s, longer than the window"),
        (["generate", "x", "--init", "chord.wav", "--seconds", 2], "chord.wav: lasts 1.000 s"),
        (["generate", "x", "--init", "chord.wav", "--strength", 1.5], "strength must lie in 0..1"),
        (["generate", "x", "--init", "chord.wav", "--strength", "nan"], "strength must lie in 0..1"),
        (["generate", "--init", "bare.wav"], "bare.wav has none inside"),
        (["generate", "x", "--init", "chord.wav", "--inpaint", "0.5-1.5"], "stretches lie in order within 0-1.000 s"),
        (["generate", "x", "--init", "chord.wav", "--inpaint", "0-1"], "nothing of it would stay"),
        (["generate", "x", "--init", "chord.wav", "--inpaint", "1:2"], "is not START-END"),
        (
            ["generate", "x", "--init", "chord.wav", "--inpaint", "0-0.5", "--strength", 0.5],
            "--strength: is of variations",
        ),
        (["generate", "x", "--init", "chord.wav", "--loop"], "leave out --init"),
        (["generate", "x", "--init", "chord.wav", "-o", "chord.wav", "--overwrite"], "is the file that is read"),
        (["generate", "x", "--strength", 0.5], "--strength: needs --init FILE"),
        (["generate", "x", "--inpaint", "0-1"], "--inpaint: needs --init FILE"),
        (["generate", "x", "--bars", 4], "--bars: needs --loop"),
        (["generate", "x", "--loop", "--bars", 4], "needs a tempo"),
        (["generate", "x", "--loop", "--bars", 4, "--bpm", 120], "lasts at most 0.743 s, not 8; give 324 bpm or more"),
        (["generate", "x", "--loop", "--bpm", 340, "--seconds", 0.6], "no whole number of bars"),
        (["generate", "x", "--loop", "--bpm", 340, "--seconds", "inf"], "seconds must lie above 0 and be finite"),
        (["generate", "x, 90 bpm", "--bpm", 120], "--bpm 120: 'x, 90 bpm' says 90 bpm; leave out one"),
        (["generate", "x, 90 bpm or 120 bpm", "--bpm", 120], "says several tempos; leave out one"),
        (["generate", "x", "--bpm", 5], "--bpm must lie in 20..400"),
        (["generate", "x in C major", "--key", "A minor"], "'x in C major' says C major; leave out one"),
        (["generate", "x", "--key", "H minor"], "--key: 'H minor' is not one of C, C#"),
        (["continue", "none.wav", "x", "--seconds", 1], "none.wav: no such"),
        (["continue", "silent.wav", "x", "--seconds", 1], "silent.wav: is silent"),
        (["continue", "bare.wav", "--seconds", 1], "give a PROMPT; bare.wav has none inside"),
        (
            ["continue", "fast.wav", "--seconds", 1, "--bpm", 120],
            "--bpm 120: the prompt inside fast.wav says 90 bpm; leave it out, or give a PROMPT",
        ),
        (
            ["generate", "--init", "fast.wav", "--key", "A minor"],
            "--key A minor: the prompt inside fast.wav says C major; leave it out, or give a PROMPT",
        ),
        (["continue", "chord.wav", "--seconds", 0], "seconds must lie above 0"),
        (["continue", "chord.wav", "--seconds", 99], "seconds must lie above 0 and at most"),
        (["continue", "chord.wav", "--seconds", 1, "-o", "chord.wav", "--overwrite"], "is the file that is read"),
        (["continue", "chord.wav", "--seconds", 1, "-o", "long.wav"], "long.wav: is there already"),
        (["continue", "chord.wav", "--seconds", 1, "-o", "a.mp3"], "allowed: .wav, .flac"),
        (["continue", "chord.wav", "--seconds", 1, "--count", 0], "--count must lie in 1..10000"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_what_is_not_possible_is_one_line_and_leaves_nothing(run, tmp_path: Path, capsys, args, message: str) -> None:
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    try:
        status = run(*args)
    except SystemExit as error:
        status = error.code
    captured = capsys.readouterr()
    lines = [line.rpartition("\r")[2] for line in captured.err.rstrip("\n").split("\n")]
    assert status == 2 and captured.out == "" and len(lines) == 1 and message in lines[0], captured.err
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_tempos_are_read_as_captions_say_them() -> None:
    for prompt, bpm in (
        ("piano, 120 bpm", 120),
        ("piano 95BPM", 95),
        ("tempo 84, flute", 84),
        ("about 100 beats per minute", 100),
        ("piano, 90 bpm, really 90 bpm", 90),
        ("piano, 90 bpm or 100 bpm", None),
        ("opus 120", None),
    ):
        assert tempo_of(prompt) == bpm, prompt
    assert (beats_of("a Waltz for flute"), beats_of("walzer")) == (3, 4)
