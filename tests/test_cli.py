"""The command line: what it writes, prints and refuses."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from stable_audio_lite import cli
from stable_audio_lite.audio.io import audio_info, read_metadata, write_audio
from stable_audio_lite.pipeline import StableAudio

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "stable_audio"


@pytest.fixture
def generate(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run `generate` with the tiny bundle in an empty folder; returns the exit status."""
    monkeypatch.chdir(tmp_path)
    fixed = ["--model", str(tiny_bundle), "--device", "cpu", "--dtype", "float32", "--steps", "2"]
    return lambda *args: cli.main(["generate", *fixed, *map(str, args)])


def refused(capsys: pytest.CaptureFixture[str], status: int) -> str:
    """The single line on stderr of a run that failed."""
    captured = capsys.readouterr()
    # A progress bar that was wiped leaves carriage returns, no lines.
    lines = [line.rpartition("\r")[2] for line in captured.err.rstrip("\n").split("\n")]
    assert status == 2 and captured.out == ""
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    return lines[0]


def test_one_sound(generate, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("warm piano", "--seconds", 0.5, "--seed", 7, "-o", "a.flac") == 0
    assert audio_info(tmp_path / "a.flac").frames == 22050
    assert soundfile.info(tmp_path / "a.flac").subtype == "PCM_24"
    stored = read_metadata(tmp_path / "a.flac").settings
    assert (stored["prompt"], stored["seed"], stored["steps"]) == ("warm piano", 7, 2)
    out = capsys.readouterr().out
    assert "warm piano" in out and "seed 7" in out and stored["model"] in out and "real-time factor" in out
    assert [p.name for p in tmp_path.iterdir()] == ["a.flac"]


def test_same_command_same_bytes(generate, tmp_path: Path) -> None:
    for name in ("a.wav", "b.wav"):
        assert generate("piano", "--seconds", 0.3, "--seed", 1, "-o", name) == 0
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()


def test_names_without_output_come_from_prompt_and_seed(generate, tmp_path: Path) -> None:
    assert generate("Warm piano, 90 BPM!", "--seconds", 0.2, "--seed", 4, "--count", 2) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["warm-piano-90-bpm-4.wav", "warm-piano-90-bpm-5.wav"]


def test_several_prompts_are_numbered_in_order(generate, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("piano é\n\n  drums  \n", encoding="utf-8")
    assert generate("--prompts", "prompts.txt", "--seconds", 0.2, "--count", 2, "--batch", 3, "-o", "out/a.wav") == 0
    names = [tmp_path / "out" / f"a-{i}.wav" for i in (1, 2, 3, 4)]
    assert [read_metadata(n).title for n in names] == ["piano é", "piano é", "drums", "drums"]
    first = read_metadata(names[0]).settings["seed"]
    assert [read_metadata(n).settings["seed"] for n in names] == [first + i for i in range(4)]


@pytest.mark.parametrize(("batch", "sizes"), [(2, [2, 2, 2]), (6, [6])])
def test_batch_is_what_is_sampled_at_once(generate, batch: int, sizes: list[int], monkeypatch) -> None:
    seen: list[int] = []
    sample = StableAudio._sampling
    monkeypatch.setattr(
        StableAudio, "_sampling", lambda self, items, *rest: seen.append(len(items)) or sample(self, items, *rest)
    )
    assert generate("piano", "--seconds", 0.1, "--count", 6, "--batch", batch, "-o", "out") == 0
    assert seen == sizes


def test_a_folder_as_output(generate, tmp_path: Path) -> None:
    assert generate("piano", "--seconds", 0.2, "--seed", 1, "-o", "some/folder") == 0
    assert (tmp_path / "some" / "folder" / "piano-1.wav").is_file()


def test_plot_lies_beside_the_sound(generate, tmp_path: Path) -> None:
    assert generate("piano", "--seconds", 0.2, "--plot", "-o", "a.wav") == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([""], "prompt is empty"),
        ([], "PROMPT or --prompts"),
        (["piano", "--prompts", "x"], "PROMPT or --prompts"),
        (["--prompts", "missing.txt"], "missing.txt"),
        (["--prompts", "empty.txt"], "empty.txt: holds no prompts"),
        (["--prompts", "binary.txt"], "binary.txt: not UTF-8"),
        (["caf\udce9 piano"], "not valid UTF-8"),
        (["piano", "--negative", "caf\udce9"], "not valid UTF-8"),
        (["piano", "--device", "meta"], "meta"),
        (["piano", "--seconds", 90], "at most 16.0"),
        (["piano", "--seconds", -1], "at most 16.0"),
        (["piano", "--steps", 0], "steps"),
        (["piano", "--count", 0], "--count"),
        (["piano", "--seed", -1], "seed"),
        (["piano", "--sampler", "magic"], "dpmpp-2m"),
        (["piano", "--device", "toaster"], "toaster"),
        (["piano", "--model", "nowhere"], "nowhere"),
        (["piano", "-o", "a.mp3"], "allowed: .wav, .flac"),
        (["piano", "-o", "empty.txt/a.wav"], "empty.txt/a.wav"),
        (["piano", "-o", "/proc/a.wav"], "/proc/a.wav"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_and_leave_nothing(
    generate, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list, message: str
) -> None:
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xff")
    assert message in refused(capsys, generate(*args))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["binary.txt", "empty.txt"]


@pytest.mark.parametrize(
    "args", [["generate", "piano", "--steps", "many"], ["generate", "piano", "--dtype", "int4"], [], ["sing"]], ids=str
)
def test_misspelt_commands_are_one_line_too(capsys: pytest.CaptureFixture[str], args: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(args)
    refused(capsys, caught.value.code)  # type: ignore[arg-type]


def test_output_is_checked_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert "a.mp3" in refused(capsys, cli.main(["generate", "piano", "--model", "nowhere", "-o", "a.mp3"]))


def test_a_full_disk_is_one_line_and_leaves_nothing(
    generate, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "a.wav: can't be written (No space left" in refused(capsys, generate("piano", "-o", "a.wav"))
    assert not list(tmp_path.iterdir())


def test_interruption_is_quiet_and_leaves_nothing(
    generate, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("stable_audio_lite.pipeline.StableAudio.generate", interrupt)
    assert generate("piano", "-o", "a.wav") == 130
    assert capsys.readouterr().err.strip().endswith("interrupted")
    assert not list(tmp_path.iterdir())


def test_broken_weights_never_become_a_file(
    generate, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nan = torch.full((1, 2, 100), torch.nan)
    monkeypatch.setattr("stable_audio_lite.representation.LatentRepresentation.decode", lambda *_: nan)
    assert "NaN" in refused(capsys, generate("piano", "-o", "a.wav"))
    assert not list(tmp_path.iterdir())


def test_info_counts_the_paper_exactly(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", str(CONFIGS / "paper.yaml"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"]["vae"] == 133_431_300
    assert facts["parameters"]["unet"] == 906_679_744
    assert facts["latent_shape"] == [64, 4096] and facts["sample_rate"] == 44100
    assert facts["window_seconds"] == pytest.approx(95.1, abs=0.05)
    assert cli.main(["info", str(CONFIGS / "paper.yaml")]) == 0
    text = capsys.readouterr().out
    assert "133431300" in text and "906679744" in text and "64 x 4096" in text


def test_info_on_a_bundle_counts_what_is_stored(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file

    assert cli.main(["info", str(tiny_bundle), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parts"] == ["vae", "text_encoder", "conditioner", "unet"]
    stored = load_file(tiny_bundle / "vae.safetensors")
    assert facts["parameters"]["vae"] == sum(t.numel() for t in stored.values())


def test_info_on_a_sound_shows_what_made_it(generate, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("piano", "--seconds", 0.2, "--seed", 3, "-o", "a.wav") == 0
    capsys.readouterr()
    assert cli.main(["info", "a.wav", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["prompt"], facts["seed"], facts["channels"]) == ("piano", 3, 2)


@pytest.mark.parametrize("name", ["nowhere", "missing.yaml", "missing.wav"])
def test_info_on_nothing_is_one_line(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert name in refused(capsys, cli.main(["info", name]))


def test_corpus_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "items must be" in refused(capsys, cli.main(["corpus", str(tmp_path / "out"), "--items", "0"]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "args",
    [[], ["generate"], ["restore"], ["encode"], ["decode"], ["info"], ["corpus"], ["validate-dataset"], ["doctor"]],
)
def test_help_answers_at_once(args: list[str]) -> None:
    started = time.perf_counter()
    command = [sys.executable, "-m", "stable_audio_lite.cli", *args, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert time.perf_counter() - started < 2
    assert done.returncode == 0 and done.stdout.startswith("usage: stable-audio-lite")


def test_commands_of_other_packages_are_there_and_light(declared_commands: dict[str, str], capsys) -> None:
    assert set(declared_commands) == {"plan", "evaluate"}
    for name, entry_point in declared_commands.items():
        with pytest.raises(SystemExit) as caught:
            cli.main([name, "--help"])
        assert caught.value.code == 0 and f"stable-audio-lite {name}" in capsys.readouterr().out
        module = entry_point.partition(":")[0]
        code = f"import sys, {module}; print(sorted({{'torch', 'accelerate', 'numpy'}} & set(sys.modules)))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
        assert done.stdout.strip() == "[]"


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert caught.value.code == 0 and capsys.readouterr().out == f"stable-audio-lite {declared}\n"


def test_errors_reach_the_shell() -> None:
    command = [sys.executable, "-m", "stable_audio_lite.cli", "generate", ""]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_bug_shows_its_traceback(generate, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("not the user's mistake")

    monkeypatch.setattr("stable_audio_lite.pipeline.StableAudio.generate", fail)
    with pytest.raises(ValueError, match="not the user's mistake"):
        generate("piano", "-o", "a.wav")


def test_a_prompt_that_the_terminal_lacks_stops_no_batch(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("piano 🎹\ndrums\n", encoding="utf-8")
    command = [sys.executable, "-m", "stable_audio_lite.cli", "generate", "--prompts", "prompts.txt", "-o", "out"]
    fixed = ["--model", str(tiny_bundle), "--device", "cpu", "--steps", "1", "--batch", "1", "--seconds", "0.1"]
    ascii_terminal = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *fixed], capture_output=True, text=True, cwd=tmp_path, env=ascii_terminal)
    assert done.returncode == 0 and "piano \\U0001f3b9" in done.stdout, done.stderr
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_a_sound_too_short_for_the_model_is_one_line(tiny_bundle: Path, tmp_path: Path, capsys) -> None:
    write_audio(tmp_path / "click.wav", np.ones((1, 1)), 96000)
    command = ["encode", str(tmp_path / "click.wav"), "-o", str(tmp_path / "latents"), "--model", str(tiny_bundle)]
    assert "click.wav: too short" in refused(capsys, cli.main(command))
    assert [path.name for path in tmp_path.rglob("*")] == ["click.wav"]


def test_the_library_speaks_of_settings_and_not_of_flags() -> None:
    library = ROOT / "stable_audio_lite"
    for path in library.rglob("*.py"):
        if path.is_relative_to(library / "cli") or path == library / "command.py":
            continue
        texts = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        flags = [text for text in texts if isinstance(text, str) and re.search(r"(^|[\s(])--[a-z]{2}|[\s(]-o\b", text)]
        assert not flags, f"{path}: {flags}"
