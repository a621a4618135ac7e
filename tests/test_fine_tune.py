"""One command from a folder of music to a bundle: what it writes, chooses, goes on with and refuses."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from training_runs import ONE_THREAD, ROOT, assert_same_weights, distance, kill, losses

from stable_audio_lite import cli
from stable_audio_lite.audio.io import audio_info
from stable_audio_lite.config import load_config
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import locked
from stable_audio_lite.pipeline import StableAudio
from training import fine_tune, pre_encode, train_diffusion
from training.fine_tune import FineTuning
from training.plan import RunPlan

pytestmark = pytest.mark.usefixtures("declared_commands")

START = """
import sys
from stable_audio_lite.command import Parser
from training.commands import add_train
parser = Parser()
add_train(parser.add_subparsers())
arguments = parser.parse_args(sys.argv[1:])
sys.exit(arguments.run(arguments))
"""


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Settings by which other runs in this process aren't disturbed, and which are quick."""
    path = tmp_path / "plain.yaml"
    run = {"precision": "no", "tracker": "none", "log_every": 1}
    path.write_text(yaml.safe_dump({"run": run, "demos": None}))
    return path


@pytest.fixture
def music(data: Path, tmp_path: Path) -> Path:
    """The six tones, captioned by a text beside each, with a broken file among them."""
    folder = tmp_path / "my music"
    folder.mkdir()
    for number in range(6):
        shutil.copy(data / f"{number}.wav", folder)
        (folder / f"{number}.txt").write_text(f"it's tone {number}")
    return folder


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of known speed, so that nothing has to be measured."""
    monkeypatch.setattr(fine_tune, "measure", lambda *args, **more: plan_of())


def words_of(music: Path, output: Path, base: Path, config: Path, *more: str) -> list[str]:
    return ["train", str(music), "-o", str(output), "--from", str(base), "--config", str(config), *more]


def test_one_command_makes_a_bundle_and_the_next_a_sound(
    music: Path, tiny_bundle: Path, plain: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name = tmp_path / "mine"
    plain.write_text(plain.read_text().replace("demos: null", "demos: {every: 3, seconds: 0.2, steps: 1}"))
    command = words_of(music, name, tiny_bundle, plain, "--batch-size", "2")
    assert cli.main([*command, "--steps", "4"]) == 0
    out, err = capfd.readouterr()
    assert "6 files" in err and "6 encoded" in err and "4 steps of 2 windows from 6 pieces: about" in err
    assert "from step 0 to 4" in err and len(losses(name)) == 4
    assert [p.name for p in sorted((name / "demos").iterdir())] == [f"step_{n:08d}" for n in (3, 4)]
    printed = shlex.split(out.splitlines()[-1])
    assert printed[:3] == ["stable-audio-lite", "generate", "it's tone 0"]
    assert cli.main([*printed[1:], "--seconds", "0.3", "--steps", "2", "-o", str(tmp_path / "a.wav")]) == 0
    assert audio_info(tmp_path / "a.wav").seconds == pytest.approx(0.3)
    settings = {"device": "cpu", "dtype": "float32"}
    merged = StableAudio.from_pretrained(name / "bundle", **settings)
    beside = StableAudio.from_pretrained(tiny_bundle, lora=name / "bundle/lora", **settings)
    sounds = [m.generate("tone", seconds=0.2, steps=2, seed=1).audio for m in (merged, beside)]
    torch.testing.assert_close(*sounds, rtol=1e-4, atol=1e-5)

    capfd.readouterr()
    edited = (name / "train_diffusion.yaml").read_text().replace("lr: 0.001", "lr: 0.002  # mine")
    (name / "train_diffusion.yaml").write_text(edited)
    assert cli.main([*command, "--steps", "6"]) == 0
    err = capfd.readouterr().err
    assert "6 kept" in err and "from step 4 to 6" in err and "optimizer.lr was 0.001, is 0.002" in err
    assert sorted(losses(name)) == list(range(6))


@pytest.mark.usefixtures("unmeasured")
def test_the_trainers_by_hand_do_the_same(
    music: Path, tiny_bundle: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another folder, on the files that were written; they are as they were, comments too, when nothing is new."""
    name = tmp_path / "mine"
    command = words_of(music, name, tiny_bundle, plain, "--batch-size", "2", "--steps", "3")
    assert cli.main(command) == 0
    written = {file: file.read_bytes() for file in name.glob("*.yaml")}
    bundle = shutil.copytree(name / "bundle", tmp_path / "kept")
    for folder in ("bundle", "checkpoints", "latents"):
        shutil.rmtree(name / folder)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    pre_encode.run(load_config(name / "pre_encode.yaml", pre_encode.PreEncodeConfig))
    train_diffusion.run(load_config(name / "train_diffusion.yaml", train_diffusion.TrainDiffusionConfig))
    assert_same_weights(bundle, name / "bundle")
    assert_same_weights(bundle / "lora", name / "bundle/lora")
    assert cli.main(command) == 0
    assert {file: file.read_bytes() for file in written if file.name != "config.yaml"} == {
        file: data for file, data in written.items() if file.name != "config.yaml"
    }


@pytest.mark.usefixtures("unmeasured")
def test_all_weights_are_trained_if_asked_for(music: Path, tiny_bundle: Path, plain: Path, tmp_path: Path) -> None:
    name = tmp_path / "mine"
    command = words_of(music, name, tiny_bundle, plain, "--batch-size", "2", "--steps", "2")
    assert cli.main([*command, "--full", "--learning-rate", "0.01"]) == 0
    assert not (name / "bundle/lora").exists()
    settings = load_config(name / "train_diffusion.yaml", train_diffusion.TrainDiffusionConfig)
    assert settings.lora is None and settings.optimizer.lr == 0.01
    for part, changed in (("unet", True), ("conditioner", True), ("vae", False), ("text_encoder", False)):
        files = [(folder / f"{part}.safetensors").read_bytes() for folder in (tiny_bundle, name / "bundle")]
        assert (files[0] != files[1]) == changed, part
    with pytest.raises(UserError, match="was begun with --full: give it again"):
        fine_tune.fine_tune(FineTuning(data=str(music), output=name, base=str(tiny_bundle)))


@pytest.mark.usefixtures("unmeasured")
def test_a_bad_file_is_named_and_left_out_up_to_a_share(
    music: Path, tiny_bundle: Path, plain: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for number in range(6, 10):  # ten good ones in all
        shutil.copy(music / "0.wav", music / f"{number}.wav")
        (music / f"{number}.txt").write_text("a tone")
    (music / "broken.wav").write_bytes(b"RIFF and no more")
    (music / "broken.txt").write_text("nothing")
    command = words_of(music, tmp_path / "mine", tiny_bundle, plain, "--batch-size", "2", "--steps", "1")
    assert cli.main(command) == 0
    err = capfd.readouterr().err
    assert "1 broken:" in err and "broken.wav" in err and "10 encoded" in err and "1 left out" in err
    shutil.copy(music / "broken.wav", music / "5.wav")
    assert cli.main(words_of(music, tmp_path / "other", tiny_bundle, plain)) == 2
    err = capfd.readouterr().err.splitlines()
    assert "2 of 11 files are broken or silent, max_unreadable allows 10%" in err[-1]
    assert not (tmp_path / "other/latents").exists()


def test_what_can_not_work_is_refused_before_any_work(
    music: Path, tiny_bundle: Path, plain: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def refused(output: Path, *more: str, data: Path = music) -> str:
        assert cli.main(words_of(data, output, tiny_bundle, plain, *more)) == 2
        error = capfd.readouterr().err
        assert error.count("error: ") == 1
        return error.splitlines()[-1]

    name = tmp_path / "mine"
    (music / "3.txt").unlink()
    assert "3.wav: has no caption (1 of 6 files" in (said := refused(name)) and "stable-audio-lite caption" in said
    (music / "3.txt").write_text("tone")
    assert "lies within the music" in refused(music / "mine")
    assert "--steps must be above 0" in refused(name, "--steps", "0")
    assert "--learning-rate must be above 0" in refused(name, "--learning-rate", "nan")
    assert "--learning-rate must be at most 1" in refused(name, "--learning-rate", "1e30")
    assert "nowhere" in refused(name, "--from", "nowhere")
    assert "its name is not valid UTF-8; rename it" in refused(tmp_path / "caf\udce9")
    assert "restorer: is of kind complex_stft" in refused(name, "--from", "restorer")
    assert not name.exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").touch()
    assert "full: holds other files" in refused(tmp_path / "full")
    with locked(name):
        assert "is at work in" in refused(name)


@pytest.mark.usefixtures("unmeasured")
def test_a_run_stays_with_its_music_and_its_model(
    music: Path, tiny_bundle: Path, plain: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name, other = tmp_path / "mine", shutil.copytree(music, tmp_path / "other music")
    assert cli.main(words_of(music, name, tiny_bundle, plain, "--batch-size", "2", "--steps", "1")) == 0
    written = {file: file.read_bytes() for file in name.glob("*.yaml")}
    model = shutil.copytree(tiny_bundle, tmp_path / "model")
    for words, data, base in (("FOLDER", other, tiny_bundle), ("--from", music, model)):
        capfd.readouterr()
        assert cli.main(words_of(data, name, base, plain)) == 2
        assert f"was begun with {words} " in capfd.readouterr().err
    assert {file: file.read_bytes() for file in name.glob("*.yaml")} == written


def plan_of(**more: object) -> RunPlan:
    sizes = dict.fromkeys(
        ("weights", "frozen_weights", "gradients", "optimizers", "averages", "checkpoint", "bundle", "disk_free"), 1
    )
    rest = {"trainer": "train_diffusion", "trained": {}, "frozen": {}, "activations": 2, "per_item": 1.0, "free": 100}
    rest |= {"items": 6, "processes": 1, "batch_size": 2, "accumulate": 1, "seconds": 1.0, "flops": 1}
    return RunPlan(**sizes | rest | {"steps": 1, "done": 0, "keep_last": 2} | more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("machine", "options", "wanted"),
    [
        ({}, {}, {"batch_size": 16, "accumulate": 1, "steps": 1800, "checkpoint_every": 120, "every": 450}),
        ({"seconds": 0.01}, {}, {"steps": 2000, "checkpoint_every": 500, "every": 500}),
        ({"seconds": 60.0}, {}, {"steps": 200, "checkpoint_every": 10, "every": 50}),
        ({"free": 5}, {}, {"batch_size": 4, "accumulate": 4}),
        ({"free": 1}, {}, {"batch_size": 1, "accumulate": 16}),
        ({"free": 5}, {"batch_size": 3, "steps": 7}, {"batch_size": 3, "accumulate": None, "steps": 7, "every": 2}),
    ],
)
def test_the_machine_decides_what_the_request_leaves_open(
    machine: dict, options: dict, wanted: dict, music: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(fine_tune, "measure", lambda *args, **more: plan_of(**machine))
    run = fine_tune._Run(FineTuning(data=str(music), output=tmp_path / "mine", base=str(tiny_bundle), **options))
    settings = run._fitted(run.settings_asked(), 1, say=True)
    found = {"batch_size": settings["batch_size"], "every": settings["demos"]["every"]} | settings["run"]
    assert {key: found.get(key) for key in wanted} == wanted


def test_little_memory_costs_time_before_it_is_refused(
    music: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tight(trainer: str, config: train_diffusion.TrainDiffusionConfig, **more: int) -> RunPlan:
        return plan_of(free=3 if config.gradient_checkpointing else 0)

    monkeypatch.setattr(fine_tune, "measure", tight)
    request = FineTuning(data=str(music), output=tmp_path / "mine", base=str(tiny_bundle))
    run = fine_tune._Run(request)
    assert run._fitted(run.settings_asked(), 1, say=False)["gradient_checkpointing"]
    run = fine_tune._Run(replace(request, batch_size=4))
    with pytest.raises(UserError, match="not enough memory .* a batch of 2 at most"):
        run._fitted(run.settings_asked(), 1, say=False)
    monkeypatch.setattr(fine_tune, "measure", lambda *args, **more: plan_of(free=0))
    run = fine_tune._Run(replace(request, full=True))
    with pytest.raises(UserError, match="not enough memory .* a smaller one, or no --full"):
        run._fitted(run.settings_asked(), 1, say=False)


@pytest.mark.long
@pytest.mark.usefixtures("unmeasured", "one_thread")
def test_killed_five_times_it_ends_with_the_same_weights(data: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """At random moments: while it encodes, measures and trains."""
    config = tmp_path / "config.yaml"
    run = {"precision": "no", "tracker": "none", "checkpoint_every": 10, "log_every": 1}
    config.write_text(yaml.safe_dump({"run": run, "demos": None}))
    options = ("--batch-size", "2", "--steps", "200")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert cli.main(words_of(data, whole, tiny_bundle, config, *options)) == 0
    command = [sys.executable, "-c", START, *words_of(data, killed, tiny_bundle, config, *options)]
    kill(command, (killed / "pre_encode.yaml").exists, within=0.3)
    kill(command, (killed / "latents/latents.json").exists, within=0.5)
    for _ in range(3):
        before = len(losses(killed)) if (killed / "losses.jsonl").exists() else 0
        kill(command, lambda before=before: _steps(killed) > before, within=0.3)
    assert max(losses(killed)) < 199
    assert cli.main(words_of(data, killed, tiny_bundle, config, *options)) == 0
    assert_same_weights(whole / "bundle", killed / "bundle")
    assert_same_weights(whole / "bundle/lora", killed / "bundle/lora")


@pytest.mark.long
@pytest.mark.usefixtures("unmeasured")
def test_two_processes_take_the_same_command(music: Path, tiny_bundle: Path, plain: Path, tmp_path: Path) -> None:
    """They measure, encode and train together, as one does with twice the batch."""
    program = tmp_path / "program.py"
    program.write_text(START)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(program)]
    options = words_of(music, tmp_path / "two", tiny_bundle, plain, "--batch-size", "2", "--steps", "4")
    environment = ONE_THREAD | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*launch, *options], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "6 encoded, 0 kept" in done.stderr and "2 processes on cpu" in done.stderr
    assert done.stderr.count("a LoRA of") == done.stdout.count("hear it with") == 1
    assert cli.main(words_of(music, tmp_path / "one", tiny_bundle, plain, "--batch-size", "4", "--steps", "4")) == 0
    for name in ("unet", "lora/adapter_model"):
        one, two = (load_file(tmp_path / run / f"bundle/{name}.safetensors") for run in ("one", "two"))
        assert distance(one, two) < 1e-3


def _steps(output: Path) -> int:
    file = output / "losses.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0
