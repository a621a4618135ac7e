"""Latents and the U-Net that learns on them: caches that fit, exact continuation, noise levels, dropped conditions."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from training_runs import (
    ONE_THREAD,
    ROOT,
    TINY,
    assert_same_weights,
    clap_settings,
    diffusion_settings,
    kill,
    load,
    vae_settings,
)

from stable_audio_lite.audio.io import read_audio, write_audio
from stable_audio_lite.data.latents import LatentCache, read_cache
from stable_audio_lite.errors import UserError
from stable_audio_lite.pipeline import StableAudio
from stable_audio_lite.representation import encoder_hash
from training import command, denoising, pre_encode, train_clap, train_diffusion, train_vae


def test_stratified_shares_cover_every_part() -> None:
    times = denoising.stratified_shares(8, torch.Generator().manual_seed(0))
    assert sorted((times * 8).long().tolist()) == list(range(8))
    late = denoising.stratified_shares(8, torch.Generator().manual_seed(0), lowest=0.2)
    assert sorted(((late - 0.2) * 10).long().tolist()) == list(range(8))


def test_a_shift_moves_times_towards_noise() -> None:
    draws = torch.Generator().manual_seed(0)
    times = denoising.stratified_shares(1000, draws, shift=4.0)
    assert float(times.median()) == pytest.approx(0.8, abs=0.01)
    late = denoising.stratified_shares(1000, draws, lowest=0.2, shift=4.0)
    assert 0.2 <= float(late.min()) < 0.21 and 0.99 < float(late.max()) <= 1
    share = float((late > 0.9).float().mean())  # of u = t / (4 - 3 t), which is uniform from 1/17 on
    assert share == pytest.approx((1 - 0.9 / 1.3) / (1 - 1 / 17), abs=0.01)


def test_a_run_trains_at_its_shifted_times(bundles: dict[str, Path], tmp_path: Path) -> None:
    times = {}
    for shift in (1.0, 20.0):
        settings = diffusion_settings(bundles, tmp_path / "run", 1) | {"time_shift": shift}
        task = train_diffusion.DiffusionTask(load(train_diffusion.TrainDiffusionConfig, settings, tmp_path))
        times[shift] = task.batch(0, 0, 1)["shares"]
    assert torch.allclose(times[20.0], 20 * times[1.0] / (1 + 19 * times[1.0]))


def test_evaluation_hears_the_times_trained_on(bundles: dict[str, Path], tmp_path: Path) -> None:
    """Above the lowest time, at every level there, the same on every call."""
    settings = diffusion_settings(bundles, tmp_path / "run", 1) | {"lowest_time": 0.5}
    task = train_diffusion.DiffusionTask(load(train_diffusion.TrainDiffusionConfig, settings, tmp_path))
    with torch.no_grad():
        figures = task.evaluate(0)
        assert figures == task.evaluate(9)
    assert set(figures) == {"held_out/v", "held_out/v_t2of4", "held_out/v_t3of4"}
    assert figures["held_out/v"] == pytest.approx((figures["held_out/v_t2of4"] + figures["held_out/v_t3of4"]) / 2)


def test_longer_recordings_and_captions_than_a_model_takes(
    bundles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A recording counts as one of the longest length that timing embeddings have; lost ends of captions are named."""
    index = json.loads((bundles["latents"] / "latents.json").read_text())
    cache = LatentCache(tmp_path / "latents", index["encoder"], 4)
    entries = read_cache(bundles["latents"], index["encoder"])[1][:4]
    long = "a tone number one, " * 8 + "and its end"
    cache.write(0, [replace(e, about=replace(e.about, seconds=9999.0, captions=(long,))) for e in entries])
    cache.finish()
    settings = diffusion_settings(bundles | {"latents": cache.folder}, tmp_path / "run", 1)
    task = train_diffusion.DiffusionTask(load(train_diffusion.TrainDiffusionConfig, settings, tmp_path))
    said = capsys.readouterr().err
    assert "4 of 4 captions are longer than the 16 tokens" in said and "and its end" in said
    batch = task.batch(0, 0, 1)
    assert batch["seconds_total"].min() > task.model.timing.max_seconds
    errors, _ = task.errors(batch)
    batch["seconds_total"] = torch.full((4,), float(task.model.timing.max_seconds))
    assert torch.equal(errors, task.errors(batch)[0]) and bool(errors.isfinite().all())


def test_levels_without_items_are_logged_as_nan() -> None:
    """Every process names every level, or those that log together wait for each other."""
    figures = denoising.loss_by_level(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0.3, 0.4, 1.0]), "v")
    assert [float(v) for v in figures.values()] == pytest.approx([math.nan, 2.0, math.nan, 5.0], nan_ok=True)


@pytest.mark.long
def test_demos_sound_like_the_bundle_and_leave_training_alone(bundles: dict[str, Path], tmp_path: Path) -> None:
    """In files and in TensorBoard, at each guidance scale; the weights are those of a run without."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cls = train_diffusion.TrainDiffusionConfig
    plain = train_diffusion.run(load(cls, diffusion_settings(bundles, tmp_path / "plain", 4), tmp_path))
    demos = {"every": 2, "prompts": ["a tone", "another"], "cfg": [1.0, 3.0], "seconds": 0.3, "steps": 2}
    settings = diffusion_settings(bundles, tmp_path / "run", 4, tracker="tensorboard") | {"demos": demos}
    made = train_diffusion.run(load(cls, settings, tmp_path))
    assert_same_weights(plain, made)
    folders = sorted((tmp_path / "run/demos").iterdir())
    names = {f"prompt{i}-cfg{cfg}" for i in (1, 2) for cfg in (1, 3)}
    assert [f.name for f in folders] == ["step_00000002", "step_00000004"]
    assert all({p.stem for p in f.glob(f"*{kind}")} == names for f in folders for kind in (".wav", ".png"))
    model = StableAudio.from_pretrained(made, "cpu")
    expected = model.generate(["a tone", "another"], seconds=0.3, steps=2, cfg=3.0, seed=0).audio[1]
    last = read_audio(folders[1] / "prompt2-cfg3.wav", 44100)
    torch.testing.assert_close(last, expected / expected.abs().max().clamp_min(1.0), rtol=0, atol=2e-3)
    (events,) = (tmp_path / "run/logs").glob("events*")
    board = EventAccumulator(str(events), size_guidance={"audio": 0, "images": 0}).Reload()
    assert {f"demo/{name}" for name in names} == set(board.Tags()["audio"]) == set(board.Tags()["images"])
    assert [e.step for e in board.Audio("demo/prompt1-cfg1")] == [1, 3]


def test_some_conditions_are_dropped(data: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    """As many as the share says, other ones in every step."""
    settings = diffusion_settings(bundles, tmp_path / "run", 1) | {"condition_dropout": 0.25, "batch_size": 20}
    task = train_diffusion.DiffusionTask(load(train_diffusion.TrainDiffusionConfig, settings, tmp_path))
    dropped = torch.stack([task.batch(step, 0, 1)["dropped"] for step in range(20)])
    assert 0.15 < float(dropped.float().mean()) < 0.35
    assert not torch.equal(dropped[0], dropped[1])


def test_a_pulse_learns_the_beat_that_captions_name(data: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    """It does so whatever the noise, here so much that nothing can be seen; other networks have no such loss."""
    model = yaml.safe_load(TINY.read_text())
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(model | {"unet": model["unet"] | {"pulse": True}}))
    cls, settings = train_diffusion.TrainDiffusionConfig, diffusion_settings(bundles, tmp_path / "run", 1)
    task = train_diffusion.DiffusionTask(load(cls, settings | {"model": str(tmp_path / "model.yaml")}, tmp_path))
    captions = ["a tone number one", "a tone number two"] * 4
    beats = torch.stack([(2 * math.pi * torch.arange(64) / period).cos() for period in (16, 10)] * 4)
    batch = {
        "x0": beats[:, None].expand(8, 64, 64) + 3.0,
        "eps": torch.zeros(8, 64, 64),
        "shares": torch.full((8,), 0.999),
        "captions": captions,
        "seconds_start": torch.zeros(8),
        "seconds_total": torch.ones(8),
        "dropped": torch.zeros(8, dtype=torch.bool),
    }
    optimizer = torch.optim.AdamW(task.modules["model"].network.pulse.parameters(), 1e-2)

    def update(name: str, loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    first, *_, last = [float(task.step(batch, step, update)["loss/pulse"]) for step in range(60)]
    assert first > 0.4 and last < 0.05
    other = batch | {"captions": captions[::-1]}
    assert task.errors(other)[1].item() > 0.5
    plain = train_diffusion.DiffusionTask(load(cls, settings, tmp_path))
    assert plain.errors(batch)[1] is None


def test_training_goes_on_from_a_bundle(data: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    """It starts with the bundle's U-Net and statistics; another VAE's or text encoder's bundle is refused."""
    cls = train_diffusion.TrainDiffusionConfig
    first = train_diffusion.run(load(cls, diffusion_settings(bundles, tmp_path / "first", 3), tmp_path))
    again = diffusion_settings(bundles, tmp_path / "again", 3) | {"initial": str(first)}
    task = train_diffusion.DiffusionTask(load(cls, again, tmp_path))
    trained = load_file(first / "unet.safetensors")
    for key, value in task.modules["model"].network.state_dict().items():
        assert torch.equal(value, trained[key]), key
    assert torch.equal(task.representation.mean[:, 0], trained["latent_mean"])
    other = tmp_path / "other"
    for part, words in (("vae", "another VAE"), ("text_encoder", "another text encoder")):
        shutil.copytree(first, other, dirs_exist_ok=True)
        state = load_file(first / f"{part}.safetensors")
        save_file({k: v + 0.1 for k, v in state.items()}, other / f"{part}.safetensors")
        with pytest.raises(UserError, match=words):
            train_diffusion.DiffusionTask(load(cls, again | {"initial": str(other)}, tmp_path))


def test_a_run_keeps_its_statistics(data: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    """Latents of louder sounds are added: they are normalised as those that the U-Net began with."""
    cls, settings = train_diffusion.TrainDiffusionConfig, diffusion_settings(bundles, tmp_path / "run", 1)
    train_diffusion.run(load(cls, settings, tmp_path))
    (louder := tmp_path / "louder").mkdir()
    audio = read_audio(data / "5.wav", 44100)
    write_audio(louder / "0.wav", (3 * audio).clamp(-1, 1).repeat(1, 4), 44100)
    (louder / "metadata.jsonl").write_text('{"file_name": "0.wav", "text": "loud"}')
    more = pre_encode.run(
        pre_encode.PreEncodeConfig(vae=str(bundles["vae"]), data=str(louder), output=str(tmp_path / "more"))
    )
    settings["latents"].append(str(more))
    settings["run"]["steps"] = 2
    task = train_diffusion.DiffusionTask(config := load(cls, settings, tmp_path))
    latents, new = task.representation, task.representation.mean.clone()
    train_diffusion.fit(config.run, task, config)
    first = load_file(tmp_path / "run/bundle/unet.safetensors")
    assert torch.equal(latents.mean[:, 0], first["latent_mean"]) and not torch.allclose(latents.mean, new, atol=1e-4)
    assert torch.equal(latents.std[:, 0], first["latent_std"])
    entry = task.examples.entries[0].latent.float()[:, :1]
    x0 = (entry - first["latent_mean"][:, None]) / first["latent_std"][:, None]
    assert torch.equal(task.examples.windows([0], [random.Random(0)])["x0"][0, :, :1], x0)


@pytest.mark.parametrize(("sigma_min", "share"), [(0.3, 0.1855), (0.03, 0.0191)])
def test_noise_levels_of_a_bundle_are_trained_on(
    sigma_min: float, share: float, bundles: dict[str, Path], tmp_path: Path
) -> None:
    """By default none below where the generation of the bundle that the run goes on from ends: 2/pi atan(sigma_min)."""
    cls = train_diffusion.TrainDiffusionConfig
    settings = diffusion_settings(bundles, tmp_path / "first", 1)
    model = yaml.safe_load(Path(settings["model"]).read_text())
    model["generation"]["sigma_min"] = sigma_min
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(model))
    settings["model"] = str(tmp_path / "model.yaml")
    first = train_diffusion.run(load(cls, settings, tmp_path))
    settings |= {"initial": str(first), "batch_size": 64}
    task = train_diffusion.DiffusionTask(load(cls, settings, tmp_path))
    shares = task.batch(0, 0, 1)["shares"]
    assert share - 1e-4 < float(shares.min()) < share + 1 / 64
    assert f"lowest_time {task.lowest_time:.3g}, as {first} generates" in task.notes[0]
    for given in (0.0, 0.5):
        task = train_diffusion.DiffusionTask(load(cls, settings | {"lowest_time": given}, tmp_path))
        assert task.lowest_time == given and given <= float(task.batch(0, 0, 1)["shares"].min()) < given + 1 / 64


def test_latents_of_another_vae_are_refused(data: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    other = train_vae.run(load(train_vae.TrainVAEConfig, vae_settings(data, tmp_path / "other", 3), tmp_path))
    settings = diffusion_settings(bundles | {"vae": other}, tmp_path / "run", 1)
    with pytest.raises(UserError, match="another VAE"):
        train_diffusion.run(load(train_diffusion.TrainDiffusionConfig, settings, tmp_path))
    config = pre_encode.PreEncodeConfig(vae=str(other), data=str(data), output=str(bundles["latents"]))
    with pytest.raises(UserError, match="another VAE"):
        pre_encode.run(config)


def test_items_without_caption_are_named(data: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(data / "0.wav", tmp_path)
    config = pre_encode.PreEncodeConfig(vae=str(bundles["vae"]), data=str(tmp_path), output=str(tmp_path / "latents"))
    with pytest.raises(UserError, match="0.wav: has no caption"):
        pre_encode.run(config)
    assert not (tmp_path / "latents").exists()


def test_what_can_not_be_read_is_left_out(data: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    """By pre-encoding, by what reads its latents and by the CLAP's trainer, which list it; too many end the run."""
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    (folder / "3.wav").write_bytes(b"no audio")
    config = pre_encode.PreEncodeConfig(vae=str(bundles["vae"]), data=str(folder), output=str(tmp_path / "latents"))
    with pytest.raises(UserError, match=r"3.wav.*1 of 6 files.*max_unreadable allows 1.00%"):
        pre_encode.run(config)
    pre_encode.run(replace(config, max_unreadable=0.2))
    assert json.loads((tmp_path / "latents/unreadable.jsonl").read_text())["file"].endswith("3.wav")
    index = json.loads((tmp_path / "latents/latents.json").read_text())
    assert (index["items"], index["missing"]) == (6, [3])
    settings = diffusion_settings(bundles | {"latents": tmp_path / "latents"}, tmp_path / "run", 2)
    task = train_diffusion.DiffusionTask(load(train_diffusion.TrainDiffusionConfig, settings, tmp_path))
    assert [entry.number for entry in task.examples.entries] == [0, 1, 2, 4, 5]
    clap = clap_settings(folder, tmp_path / "clap", 4) | {"max_unreadable": 0.2, "held_out": str(folder)}
    clap["run"] |= {"evaluate_every": 2}
    train_clap.run(load(train_clap.TrainClapConfig, clap, tmp_path))
    assert json.loads((tmp_path / "clap/unreadable.jsonl").read_text())["file"].endswith("3.wav")


@pytest.mark.long
def test_killed_pre_encoding_goes_on(data: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    """SIGKILL at a random moment leaves whole shards only; the same command ends with the cache of one whole run."""
    many, cache = tmp_path / "many", tmp_path / "latents"
    many.mkdir()
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    for copy in range(10):  # long enough to be killed in the middle
        for row in rows:
            (many / f"{copy}-{row['file_name']}").symlink_to(data / row["file_name"])
    copies = [row | {"file_name": f"{copy}-{row['file_name']}"} for copy in range(10) for row in rows]
    (many / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in copies))
    config = tmp_path / "pre_encode.yaml"
    settings = {"vae": str(bundles["vae"]), "data": str(many), "output": str(cache), "shard_items": 2}
    config.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "training.pre_encode", "--config", str(config)]
    kill(command, lambda: any(cache.glob("*.tar")), within=0.1)
    before = {p: p.stat().st_mtime_ns for p in cache.glob("*.tar")}
    assert 0 < len(before) < 30 and not (cache / "latents.json").exists()
    subprocess.run(command, cwd=ROOT, env=ONE_THREAD, check=True, capture_output=True)
    assert all(p.stat().st_mtime_ns == changed for p, changed in before.items())  # those were whole: not encoded again
    config.write_text(yaml.safe_dump(settings | {"output": str(many / "whole")}))
    subprocess.run(command, cwd=ROOT, env=ONE_THREAD, check=True, capture_output=True)
    assert_same_shards(many / "whole", cache, 30)
    assert len(json.loads((cache / "latents.json").read_text())["mean"]) == 64


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_pre_encoding_goes_on(
    number: int,
    data: Path,
    bundles: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Stopped in the second shard, it says so; the same command goes on there, and the cache is that of a whole run."""
    settings = {"vae": str(bundles["vae"]), "data": str(data), "shard_items": 2}
    config = pre_encode.PreEncodeConfig(**settings, output=str(tmp_path / "latents"))
    (tmp_path / "encode.yaml").write_text(yaml.safe_dump(settings | {"output": config.output}))
    monkeypatch.setattr(sys, "argv", ["pre_encode", "--config", str(tmp_path / "encode.yaml")])
    encode, encoded = pre_encode.encode_item, []

    def counting(vae: object, index: int, item: object, sample_rate: int) -> object:
        if len(encoded) == 3:
            os.kill(os.getpid(), number)
        encoded.append(item)
        return encode(vae, index, item, sample_rate)

    monkeypatch.setattr(pre_encode, "encode_item", counting)
    # A process in a shell's background ignores SIGINT.
    handlers = {n: signal.signal(n, signal.default_int_handler) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as ended:
            command.main("", pre_encode.PreEncodeConfig, pre_encode.run)
    finally:
        for n, handler in handlers.items():
            signal.signal(n, handler)
    assert ended.value.code == 128 + number
    assert capsys.readouterr().err.splitlines()[-1] == "stopped; the same command goes on from what is finished"
    assert {path.name for path in (tmp_path / "latents").iterdir()} == {".lock", "cache.json", "000000.tar"}
    monkeypatch.setattr(pre_encode, "encode_item", lambda *args: encoded.append(args[1]) or encode(*args))
    encoded.clear()
    pre_encode.run(config)
    assert encoded == [2, 3, 4, 5]
    pre_encode.run(pre_encode.PreEncodeConfig(**settings, output=str(tmp_path / "whole")))
    assert_same_shards(tmp_path / "whole", tmp_path / "latents", 3)


def test_what_changed_is_encoded_again(
    data: Path,
    bundles: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A caption corrected, a file replaced, one mended: the cache is that of a first run, and what it took is said."""
    shutil.copytree(data, folder := tmp_path / "data")
    (folder / "3.wav").write_bytes(b"no audio")
    settings = {"vae": str(bundles["vae"]), "data": str(folder), "shard_items": 2, "max_unreadable": 0.2}
    config = pre_encode.PreEncodeConfig(**settings, output=str(tmp_path / "latents"))
    encode, encoded = pre_encode.encode_item, []
    monkeypatch.setattr(pre_encode, "encode_item", lambda *args: encoded.append(args[1]) or encode(*args))
    pre_encode.run(config)
    assert "5 encoded, 0 kept, 0 kept with new captions or metadata, 1 left out" in capsys.readouterr().err
    lines = (folder / "metadata.jsonl").read_text().replace("a tone number 1", "corrected")
    (folder / "metadata.jsonl").write_text(lines)
    shutil.copy(data / "3.wav", folder)
    shutil.copy(data / "0.wav", folder / "5.wav")
    encoded.clear()
    pre_encode.run(config)
    assert encoded == [3, 5]
    assert "2 encoded, 3 kept, 1 kept with new captions or metadata, 0 left out" in capsys.readouterr().err
    assert not (tmp_path / "latents/unreadable.jsonl").read_text()
    pre_encode.run(replace(config, output=str(tmp_path / "whole")))
    assert_same_shards(tmp_path / "whole", tmp_path / "latents", 3)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "latents").glob("*.tar")}
    encoded.clear()
    pre_encode.run(config)
    assert not encoded and {path: path.stat().st_mtime_ns for path in times} == times
    with pytest.raises(UserError, match="made otherwise .dtype was float32, is bfloat16"):
        pre_encode.run(replace(config, dtype="bfloat16"))


def assert_same_shards(one: Path, other: Path, count: int) -> None:
    names = sorted(path.name for path in one.glob("*.tar"))
    assert len(names) == count
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in (*names, "latents.json"))


def test_cached_items_say_what_they_are(data: Path, bundles: dict[str, Path]) -> None:
    """Length to the sample, the file's own hash, captions and metadata."""
    encoder = encoder_hash(load_file(bundles["vae"] / "vae.safetensors"))
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    for entry, row in zip(read_cache(bundles["latents"], encoder)[1], rows, strict=True):
        assert entry.about.name == row["file_name"] and list(entry.about.captions) == row["captions"]
        assert (entry.about.seconds_start, entry.about.metadata) == (0.0, row)
        assert entry.about.seconds == pytest.approx(row["seconds"], abs=1 / 44100)
        assert entry.about.audio == hashlib.sha256((data / row["file_name"]).read_bytes()).hexdigest()
