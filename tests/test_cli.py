"""The command line: what it writes, prints and refuses."""

from __future__ import annotations

import ast
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml

from stable_audio_lite import cli
from stable_audio_lite.audio.io import audio_info, read_audio, read_metadata, write_audio
from stable_audio_lite.clap.tokenizer import train_tokenizer
from stable_audio_lite.edits import Sound, Variation
from stable_audio_lite.errors import UserError
from stable_audio_lite.pipeline import Generated, StableAudio
from stable_audio_lite.representation import LatentRepresentation

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
    lines = [line for line in captured.err.replace("\r", "\n").split("\n") if line.strip() and "/1 [" not in line]
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


def test_the_part_of_a_prompt_that_is_not_read_is_named(generate, tmp_path: Path, capsys) -> None:
    """Two prompts that differ there only give the same sound; of the negative as well."""
    long = "warm slow piano, " * 40
    for name, ending in (("a.wav", "and the sea"), ("b.wav", "and a storm")):
        assert generate(long + ending, "--negative", "drums " * 100, "--seed", 1, "--seconds", 0.2, "-o", name) == 0
        notes = [line for line in capsys.readouterr().err.replace("\r", "\n").split("\n") if "not read" in line]
        assert len(notes) == 2 and notes[0].startswith("note: 'warm slow piano") and notes[0].endswith(f"{ending}'")
    assert torch.equal(*(read_audio(tmp_path / name) for name in ("a.wav", "b.wav")))
    assert generate("warm piano", "--seconds", 0.2, "-o", "c.wav") == 0
    assert "not read" not in capsys.readouterr().err


def test_where_the_sound_lies_in_its_piece_can_be_said(generate, tmp_path: Path) -> None:
    given = ("--seconds-start", 1.5, "--seconds-total", 7, "--rescale", 0.5)
    assert generate("piano", "--seconds", 0.2, "--seed", 1, *given, "-o", "a.wav") == 0
    stored = read_metadata(tmp_path / "a.wav").settings
    assert (stored["seconds_start"], stored["seconds_total"], stored["rescale"]) == (1.5, 7, 0.5)


def test_sounds_can_be_brought_to_one_level(generate, tmp_path: Path, capsys) -> None:
    for name, level in (("a.wav", ()), ("b.wav", ("--normalize",)), ("c.flac", ("--normalize", -12))):
        assert generate("piano", "--seconds", 0.2, "--seed", 1, "-o", name, *level) == 0
    plain, full, quiet = (read_audio(tmp_path / name) for name in ("a.wav", "b.wav", "c.flac"))
    assert float(full.abs().max()) == pytest.approx(10 ** (-1 / 20), abs=1e-4)
    assert float(quiet.abs().max()) == pytest.approx(10 ** (-12 / 20), abs=1e-4)
    torch.testing.assert_close(plain / plain.abs().max(), full / full.abs().max(), atol=1e-5, rtol=0)
    assert read_metadata(tmp_path / "c.flac").settings["peak_db"] == -12


def test_an_item_that_can_not_be_saved_stops_no_others(generate, tmp_path: Path, monkeypatch, capsys) -> None:
    save = Generated.save

    def failing(self: Generated, path: Path, *rest: object) -> float:
        if self.seeds[0] == 4:
            raise UserError(f"{path}: not written, the audio holds NaN")
        return save(self, path, *rest)

    monkeypatch.setattr(Generated, "save", failing)
    assert generate("piano", "--seconds", 0.1, "--seed", 3, "--count", 3, "--batch", 1, "-o", "out") == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["piano-3.wav", "piano-5.wav"]
    assert "1 of 3 failed: out/piano-4.wav" in capsys.readouterr().err


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
        (["piano", "--steps", 0], "steps must be at least 1"),
        (["piano", "--steps", 10**9], "at most 10000, got 1000000000"),
        (["piano", "--count", 0], "--count must lie in 1..10000"),
        (["piano", "--count", 1234567890], "--count must lie in 1..10000"),
        (["piano", "--seed", -1], "seed"),
        (["piano", "--sampler", "magic"], "dpmpp-2m"),
        (["piano", "--sampler", ""], "unknown sampler ''"),
        (["piano", "--device", "toaster"], "toaster"),
        (["piano", "--model", "nowhere"], "nowhere"),
        (["piano", "-o", "a.mp3"], "allowed: .wav, .flac"),
        (["piano", "-o", "empty.txt/a.wav"], "empty.txt/a.wav"),
        (["piano", "-o", "/proc/a.wav"], "/proc/a.wav"),
        (["piano", "-o", "taken.wav"], "taken.wav: is there already"),
        (["piano", "-o", "new.wav", "--plot"], "new.png: is there already"),
        (["piano", "--cfg", "1e9"], "cfg must lie in 0..100"),
        (["piano", "--cfg", 1, "--negative", "drums"], "negative changes guidance"),
        (["piano", "--cfg", 1, "--rescale", 0.5], "rescale changes guidance"),
        (["piano", "--lora-strength", "nan"], "lora_strength"),
        (["piano", "--lora-strength", 0.5], "lora_strength"),
        (["piano", "--normalize", 3], "--normalize must lie in -100..0"),
        (["piano", "--seconds-start", 9, "--seconds-total", 8], "seconds_start <= seconds_total"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_and_leave_nothing(
    generate, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list, message: str
) -> None:
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xff")
    for name in ("taken.wav", "new.png"):
        (tmp_path / name).write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert message in refused(capsys, generate(*args))
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


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
    monkeypatch.setattr(LatentRepresentation, "decode_stream", lambda *_: iter([nan]))
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


def test_info_on_a_sound_that_is_not_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of any suffix; what is no sound is told as such."""
    soundfile.write(tmp_path / "x.mp3", np.zeros((44100, 1)), 44100)
    assert cli.main(["info", str(tmp_path / "x.mp3"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["channels"] == 1
    (tmp_path / "notes.txt").write_text("no sound")
    assert "notes.txt: can't be read as audio" in refused(capsys, cli.main(["info", str(tmp_path / "notes.txt")]))


def test_the_window_that_info_tells_can_be_asked_for(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though it is no whole number of milliseconds, and the nearest is longer: as long, and of a variation."""
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    config = yaml.safe_load((bundle / "config.yaml").read_text())
    (bundle / "config.yaml").write_text(yaml.safe_dump(config | {"latent_frames": 48}))  # 1.11456 s
    assert cli.main(["info", str(bundle), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["window_seconds"] <= facts["window_samples"] / facts["sample_rate"]
    model = StableAudio.from_pretrained(bundle, "cpu", "float32")
    sound = Sound(torch.rand(2, facts["window_samples"] + 1) - 0.5, 44100)
    made = model.generate("piano", seconds=facts["window_seconds"], steps=1, edit=Variation(sound, 0.5))
    assert made.audio.shape[-1] == round(facts["window_seconds"] * 44100)


def test_info_lists_the_words_of_a_model_and_generate_names_others(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, copy)
    config = yaml.safe_load((copy / "config.yaml").read_text())
    texts = ["solo harp, 120 bpm", "harpsichord and drums", "drum solo", "harp and harpsichord"] * 3
    tokenizer = train_tokenizer(texts, config["clap"]["vocab_size"])
    (copy / "tokenizer.json").write_text(tokenizer.to_str())
    assert cli.main(["info", str(copy), "--json"]) == 0
    assert {"harpsichord", "drums", "solo", "bpm"} <= set(json.loads(capsys.readouterr().out)["words"])
    fixed = ["--model", str(copy), "--device", "cpu", "--steps", "1", "--seconds", "0.1", "-o", str(tmp_path / "out")]
    assert cli.main(["generate", "Solo theremin", "--negative", "harp", *fixed]) == 0
    notes = [line for line in capsys.readouterr().err.replace("\r", "\n").split("\n") if line.startswith("note: ")]
    assert len(notes) == 1 and notes[0].endswith("learned from: theremin")


@pytest.mark.parametrize("name", ["nowhere", "missing.yaml", "missing.wav"])
def test_info_on_nothing_is_one_line(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert name in refused(capsys, cli.main(["info", name]))


def test_corpus_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "items must be" in refused(capsys, cli.main(["corpus", str(tmp_path / "out"), "--items", "0"]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command", ["", *"generate restore encode decode info corpus caption validate-dataset doctor".split()]
)
def test_help_answers_at_once(command: str) -> None:
    """In processor time, for others may keep the processor busy."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    started = spent()
    line = [sys.executable, "-m", "stable_audio_lite.cli", *command.split(), "--help"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert spent() - started < 2
    assert done.returncode == 0 and done.stdout.startswith("usage: stable-audio-lite")


def test_commands_of_other_packages_are_there_and_light(declared_commands: dict[str, str], capsys) -> None:
    assert set(declared_commands) == {"train", "plan", "evaluate"}
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
