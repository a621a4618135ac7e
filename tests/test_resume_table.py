"""Runs that go on after one thing has changed: refused by name before anything is written, or continued."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from training_runs import (
    ONE_THREAD,
    ROOT,
    TINY,
    clap_settings,
    diffusion_settings,
    forget_precision,
    load,
    run_settings,
    vae_settings,
)

from stable_audio_lite.errors import UserError
from training import pre_encode, train_clap, train_diffusion, train_vae

Settings = dict[str, Any]
TRAINERS = {
    "vae": (train_vae, train_vae.TrainVAEConfig),
    "clap": (train_clap, train_clap.TrainClapConfig),
    "diffusion": (train_diffusion, train_diffusion.TrainDiffusionConfig),
    "lora": (train_diffusion, train_diffusion.TrainDiffusionConfig),
    "sound": (train_diffusion, train_diffusion.TrainDiffusionConfig),
}


@dataclass(frozen=True)
class World:
    """What runs are made of, and a folder for what is changed."""

    data: Path
    vae: Path
    clap: Path
    latents: Path
    unet: Path
    new: Path

    def settings(self, name: str, output: Path, steps: int) -> Settings:
        bundles = {"vae": self.vae, "clap": self.clap, "latents": self.latents}
        if name == "vae":
            return vae_settings(self.data, output, steps) | {"discriminator_start": 0}
        if name == "clap":
            return clap_settings(self.data, output, steps, ema_decay=0)
        if name == "sound":
            model, run = str(ROOT / "configs/complex_stft/tiny.yaml"), run_settings(output, steps)
            return {"model": model, "data": str(self.data), "batch_size": 2, "optimizer": {"lr": 1e-3}, "run": run}
        settings = diffusion_settings(bundles, output, steps) | {"batch_size": 2, "held_out": None}
        return settings | ({"initial": str(self.unet), "lora": {"rank": 2, "alpha": 2}} if name == "lora" else {})

    def model(self, base: Path, **changes: Any) -> str:
        """Path of a model's YAML with other values at dotted keys, written with __ for the dot."""
        model = yaml.safe_load(base.read_text())
        for key, value in changes.items():
            part, name = key.split("__")
            model[part][name] = value
        (self.new / "model.yaml").write_text(yaml.safe_dump(model))
        return str(self.new / "model.yaml")

    def trained(self, bundle: Path, part: str, prefix: str = "") -> Path:
        """Copy a bundle as if the weights of `part` that begin with `prefix` had been trained further."""
        shutil.copytree(bundle, folder := self.new / "trained")
        state = load_file(bundle / f"{part}.safetensors")
        moved = {k: v * 1.01 if k.startswith(prefix) and v.is_floating_point() else v for k, v in state.items()}
        save_file(moved, folder / f"{part}.safetensors")
        return folder

    def encoded(self, vae: Path, data: Path) -> Path:
        config = pre_encode.PreEncodeConfig(vae=str(vae), data=str(data), output=str(self.new / "latents"))
        return pre_encode.run(config)

    def captioned(self, words: str) -> Path:
        """The data with other captions."""
        shutil.copytree(self.data, folder := self.new / "data")
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        rows = [{"file_name": row["file_name"], "text": f"{words} {i}"} for i, row in enumerate(rows)]
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder


@pytest.fixture(scope="module")
def started(
    data: Path, bundles: dict[str, Path], tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[World, dict[str, Path]]:
    """The world, and runs of one step in it, each made when it is first asked for."""
    unet = tmp_path_factory.mktemp("unet") / "bundle"
    shutil.copytree(tiny_bundle, unet)
    for source, file in (("vae", "vae.safetensors"), ("clap", "text_encoder.safetensors"), ("clap", "tokenizer.json")):
        shutil.copy(bundles[source] / file, unet)
    return World(data, bundles["vae"], bundles["clap"], bundles["latents"], unet, unet), {}


Change = Callable[[World, Settings], object]


def setting(**changes: Any) -> Change:
    """A change of settings; __ is the dot of a key."""

    def change(world: World, settings: Settings) -> None:
        for key, value in changes.items():
            *above, last = key.split("__")
            place = settings
            for part in above:
                place = place[part]
            place[last] = value

    return change


def model(base: Path, **changes: Any) -> Change:
    return lambda world, settings: settings.update(model=world.model(base, **changes))


def reordered(world: World, settings: Settings) -> None:
    shutil.copytree(world.data, folder := world.new / "data")
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "metadata.jsonl").write_text("\n".join(reversed(lines)))
    settings.update(data=[str(folder)])


def latents_added(world: World, settings: Settings) -> None:
    settings["latents"].append(str(world.encoded(world.vae, world.captioned("another sound"))))


def vae_trained(world: World, settings: Settings) -> None:
    vae = world.trained(world.vae, "vae")
    settings.update(vae=str(vae), latents=[str(world.encoded(vae, world.data))])


def clap_trained(world: World, settings: Settings) -> None:
    settings.update(clap=str(world.trained(world.clap, "text_encoder")))


def tokenizer_trained(world: World, settings: Settings) -> None:
    clap = world.trained(world.clap, "text_encoder", "no weight")
    words = json.loads((clap / "tokenizer.json").read_text())
    words["model"]["merges"].pop()
    (clap / "tokenizer.json").write_text(json.dumps(words))
    settings.update(clap=str(clap))


def data_moved(world: World, settings: Settings) -> None:
    shutil.copytree(world.data, world.new / "data")
    settings.update(data=str(world.new / "data"))


SPECTRAL = ROOT / "configs/complex_stft/tiny.yaml"
OPTIMIZER = {"lr": 1e-3, "muon_lr": 0.02}
HASH = "[0-9a-f]{12}"
TABLE: list[tuple[str, str, Change, str | None]] = [
    ("vae", "nothing", setting(), None),
    ("vae", "learning rates and their schedule", setting(optimizer=OPTIMIZER | {"lr": 2e-3, "decay": "cosine"}), None),
    ("vae", "weights of losses", setting(**{"weights__kl/latent": 1e-3}), None),
    ("vae", "precision", setting(run__precision="bf16"), None),
    ("vae", "batch size and accumulation", setting(batch_size=3, run__accumulate=2), None),
    ("vae", "seed", setting(run__seed=7), None),
    ("vae", "decay of the averages", setting(run__ema_decay=0.9), None),
    ("vae", "a path of the data", data_moved, None),
    ("vae", "how it generates", model(TINY, generation__cfg=5.0), None),
    ("vae", "no averages", setting(run__ema_decay=0), "run.ema_decay was above 0, is 0"),
    ("vae", "Muon taken away", setting(optimizer={"lr": 1e-3}), "optimizer.muon_lr was given, is none"),
    (
        "vae",
        "Muon for the judge",
        setting(discriminator_optimizer=OPTIMIZER),
        "discriminator_optimizer.muon_lr was none",
    ),
    ("vae", "a larger judge", setting(discriminator__filters=8), "discriminator.filters was 4, is 8"),
    ("vae", "no judge", setting(discriminator=None, discriminator_optimizer=None), "discriminator was .*, is none"),
    ("vae", "the model", model(TINY, vae__encoder_width=8), "model.vae.encoder_width was 4, is 8"),
    (
        "vae",
        "a frozen encoder",
        lambda w, s: s.update(initial=str(w.vae), freeze_encoder=True),
        "freeze_encoder was False",
    ),
    ("clap", "captions", lambda w, s: s.update(data=[str(w.captioned("quite other words"))]), None),
    ("clap", "order of the data", reordered, None),
    ("clap", "more data", lambda w, s: s["data"].append(str(w.data)), None),
    ("clap", "averages", setting(run__ema_decay=0.9), "run.ema_decay was 0, is above 0"),
    ("clap", "Muon added", setting(optimizer=OPTIMIZER), "optimizer.muon_lr was none, is given"),
    ("clap", "the model", model(TINY, clap__text_feed_forward=32), "model.clap.text_feed_forward was 64, is 32"),
    ("diffusion", "latents added", latents_added, None),
    ("diffusion", "other captions", lambda w, s: s.update(latents=[str(w.encoded(w.vae, w.captioned("so")))]), None),
    ("diffusion", "the decoder", lambda w, s: s.update(vae=str(w.trained(w.vae, "vae", "decoder."))), None),
    ("diffusion", "path of the CLAP", lambda w, s: s.update(clap=str(w.trained(w.clap, "text_encoder", "none"))), None),
    ("diffusion", "noise levels and dropout", setting(lowest_time=0.2, time_shift=2.0, condition_dropout=0.2), None),
    ("diffusion", "the VAE", vae_trained, f"vae was encoder {HASH}, is encoder {HASH}"),
    ("diffusion", "the CLAP", clap_trained, f"clap was text encoder {HASH}, is text encoder {HASH}"),
    ("diffusion", "the tokenizer", tokenizer_trained, f"clap was text encoder {HASH}, is text encoder {HASH}"),
    ("diffusion", "the model", model(TINY, unet__width=64), "model.unet.width was 32, is 64"),
    ("diffusion", "a LoRA", lambda w, s: s.update(initial=str(w.unet), lora={"rank": 2}), "lora was none, is {'rank'"),
    ("lora", "nothing", setting(), None),
    ("lora", "rank", setting(lora__rank=4), "lora.rank was 2, is 4"),
    ("lora", "scale", setting(lora__alpha=4), "lora.alpha was 2, is 4"),
    (
        "lora",
        "what it changes",
        lambda w, s: s.update(initial=str(w.trained(w.unet, "unet"))),
        "initial was frozen weights",
    ),
    ("lora", "no LoRA", setting(lora=None), "lora was .*, is none"),
    ("sound", "nothing", setting(), None),
    ("sound", "the schedule of the noise", model(SPECTRAL, schedule__steps=50), "model.schedule.steps was 100, is 50"),
    ("sound", "the spectrogram", model(SPECTRAL, spectrogram__scale=20.0), "model.spectrogram.scale was 30.0, is 20.0"),
]


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time and bytes of each file, but of the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.mark.parametrize(("name", "changed", "change", "refused"), TABLE, ids=[f"{n}: {c}" for n, c, _, _ in TABLE])
def test_a_run_goes_on_or_is_refused(
    name: str, changed: str, change: Change, refused: str | None, started: tuple[World, dict[str, Path]], tmp_path: Path
) -> None:
    world, runs = started
    trainer, cls = TRAINERS[name]
    if name not in runs:
        runs[name] = world.new.parent / name
        trainer.run(load(cls, world.settings(name, runs[name], 1), tmp_path))
    shutil.copytree(runs[name], output := tmp_path / "moved")
    settings = world.settings(name, output, 2)
    (tmp_path / "new").mkdir()
    change(World(**vars(world) | {"new": tmp_path / "new"}), settings)
    config, before = load(cls, settings, tmp_path), contents(output)
    forget_precision()
    if refused is None:
        trainer.run(config)
        forget_precision()
        info = json.loads((output / "checkpoints/step_00000002/state.json").read_text())
        assert info["step"] == 2 and info["health"]["skipped"] == 0
        for file in ("latent_mean", "latent_std") if name == "diffusion" else ():
            one, two = (load_file(folder / "bundle/unet.safetensors")[file] for folder in (runs[name], output))
            assert torch.equal(one, two)
        return
    with pytest.raises(UserError, match=refused) as caught:
        trainer.run(config)
    assert "\n" not in str(caught.value) and not re.search("damaged|remove", str(caught.value))
    assert contents(output) == before


@pytest.mark.long
def test_other_numbers_of_processes_go_on(started: tuple[World, dict[str, Path]], tmp_path: Path) -> None:
    """One, two and one again, by the README's command for processors, which says how many it runs and where from."""
    text = " ".join((ROOT / "README.md").read_text().split())
    found = r"`accelerate launch \S+ --num_processes 8 (-m \S+ --config) \S+` \(on processors: `(torchrun [^`]*2)`\)"
    ((rest, launcher),) = re.findall(found, text)
    world, _ = started
    config = tmp_path / "two.yaml"
    trainer, cls = TRAINERS["diffusion"]
    trainer.run(load(cls, world.settings("diffusion", tmp_path / "run", 1), tmp_path))
    config.write_text(yaml.safe_dump(world.settings("diffusion", tmp_path / "run", 2)))
    words = [*launcher.split(), *rest.split(), str(config)]
    words[0] = str(Path(sys.executable).with_name(words[0]))
    environment = ONE_THREAD | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"2 processes on cpu, float32, {tmp_path / 'run'}: from step 1 to 2" in done.stderr
    trainer.run(load(cls, world.settings("diffusion", tmp_path / "run", 3), tmp_path))
    assert (tmp_path / "run/checkpoints/step_00000003").is_dir()
