"""Fixtures that several test files share."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import clap_settings, load, vae_settings

from stable_audio_lite import cli
from stable_audio_lite.audio.io import write_audio
from stable_audio_lite.bundle import save_bundle
from stable_audio_lite.clap.text_encoder import TextEncoder
from stable_audio_lite.clap.tokenizer import train_tokenizer
from stable_audio_lite.models.conditioner import Conditioner
from stable_audio_lite.server.models import ModelStore
from stable_audio_lite.systems import build_vae, load_model_config
from training import pre_encode, train_clap, train_vae

ROOT = Path(__file__).parents[1]
TINY = ROOT / "configs" / "stable_audio" / "tiny.yaml"


@pytest.fixture
def declared_commands(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Subcommands that pyproject.toml declares, which the command line then has, however old the installation is."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][cli.ENTRY_POINTS]
    entries = [EntryPoint(name, value, cli.ENTRY_POINTS) for name, value in declared.items()]
    monkeypatch.setattr(cli, "entry_points", lambda group: entries)
    return declared


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete bundle of configs/stable_audio/tiny.yaml with random weights; copy it before changing it."""
    config = load_model_config(TINY)
    torch.manual_seed(0)
    tokenizer = train_tokenizer(
        ["warm slow piano", "fast techno drums", "a quiet string quartet"], config.clap.vocab_size
    )
    unet = config.network()
    with torch.no_grad():
        # Layers that start at zero would hide the prompt from the output.
        for parameter in unet.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        unet.latent_std.fill_(0.7)
        unet.latent_mean.fill_(0.1)
    parts = {
        "vae": build_vae(config.vae),
        "text_encoder": TextEncoder(config.clap, tokenizer),
        "conditioner": Conditioner(config.timing, config.context_width),
        "unet": unet,
    }
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    save_bundle(folder, config, {k: m.state_dict() for k, m in parts.items()}, tokenizer_json=tokenizer.to_str())
    return folder


@pytest.fixture(scope="session")
def store(tiny_bundle: Path) -> ModelStore:
    """The tiny bundle as a server has it, loaded when a test first asks for it."""
    return ModelStore([tiny_bundle], device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six captioned tones of 1 to 2.5 s."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    rows = []
    for index in range(6):
        seconds = 1 + 0.3 * index
        time_axis = np.arange(round(seconds * 44100)) / 44100
        tone = 0.3 * np.sin(2 * np.pi * 110 * (index + 1) * time_axis)
        audio = np.stack((tone, 0.5 * tone)) + 0.01 * rng.standard_normal((2, len(tone)))
        write_audio(folder / f"{index}.wav", audio, 44100)
        captions = [f"a tone number {index}", f"tone, {110 * (index + 1)} hertz"]
        rows.append({"file_name": f"{index}.wav", "text": captions[0], "captions": captions, "seconds": seconds})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def bundles(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny VAE, CLAP and latent cache from one short run of each trainer."""
    folder = tmp_path_factory.mktemp("bundles")
    vae = train_vae.run(load(train_vae.TrainVAEConfig, vae_settings(data, folder / "vae", 2), folder))
    clap = train_clap.run(load(train_clap.TrainClapConfig, clap_settings(data, folder / "clap", 2), folder))
    latents = pre_encode.run(pre_encode.PreEncodeConfig(vae=str(vae), data=str(data), output=str(folder / "latents")))
    return {"vae": vae, "clap": clap, "latents": latents}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Round as a process with `training_runs.ONE_THREAD` does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
