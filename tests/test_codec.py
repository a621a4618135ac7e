"""Audio files to latents and back, in pieces: equal to the whole, and one clear line for each mistake."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from evaluation.benchmarks.processes import codec_peaks, noise
from stable_audio_lite.audio.io import audio_info, read_audio, stereo_blocks, write_audio, write_audio_blocks
from stable_audio_lite.bundle import save_bundle
from stable_audio_lite.cli import main
from stable_audio_lite.codec import Codec
from stable_audio_lite.errors import UserError
from stable_audio_lite.systems import build_vae, load_model_config

TINY = Path(__file__).parent.parent / "configs/stable_audio/tiny.yaml"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = load_model_config(TINY)
    folder = tmp_path_factory.mktemp("bundle") / "vae"
    save_bundle(folder, config, {"vae": build_vae(config.vae).state_dict()})
    return folder


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """Some seconds of noise in mono at 32 kHz, of no round length."""
    path = tmp_path / "sound.wav"
    write_audio(path, 0.1 * np.random.default_rng(0).standard_normal((1, 200_003)), 32000)
    return path


@pytest.mark.parametrize("frames", [999, 100_000, 1 << 20])
def test_blocks_equal_the_whole_file(frames: int, sound: Path) -> None:
    """However the file is cut up, resampling included."""
    blocks = torch.cat(list(stereo_blocks(sound, 44100, frames)), 1)
    torch.testing.assert_close(blocks, read_audio(sound, 44100), atol=1e-5, rtol=0)


def test_files_equal_the_whole_in_memory(bundle: Path, sound: Path, tmp_path: Path) -> None:
    codec = Codec.from_pretrained(bundle, "cpu", "float32")
    made = codec.encode_file(sound, tmp_path / "a.safetensors")
    assert made.seconds == pytest.approx(audio_info(sound).seconds, abs=1e-4)
    audio = read_audio(sound, 44100)[None]
    with torch.no_grad():
        latent = codec.vae.encode(audio).mean
        again = codec.vae.decode(latent)[0, :, : audio.shape[2]]
    torch.testing.assert_close(load_file(tmp_path / "a.safetensors")["latent"], latent[0], atol=1e-5, rtol=1e-5)
    gain = codec.decode_file(tmp_path / "a.safetensors", tmp_path / "again.flac")
    torch.testing.assert_close(read_audio(tmp_path / "again.flac"), gain * again, atol=1e-5, rtol=0)


def test_loud_blocks_are_attenuated_together(tmp_path: Path) -> None:
    """The peak comes late, and still no block clips."""
    blocks = [np.full((2, 5), 0.5, np.float32), np.full((2, 3), -2.0, np.float32)]
    assert write_audio_blocks(tmp_path / "a.wav", blocks, 8000) == 0.5
    expected = 0.5 * torch.from_numpy(np.concatenate(blocks, 1))
    torch.testing.assert_close(read_audio(tmp_path / "a.wav", 8000), expected, atol=1e-6, rtol=0)


def test_nothing_is_left_of_a_failed_write(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="NaN"):
        write_audio_blocks(tmp_path / "a.wav", [np.full((2, 5), np.nan, np.float32)], 8000)
    assert list(tmp_path.iterdir()) == []


def test_commands(bundle: Path, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", str(bundle)]
    assert main(["encode", str(sound), "-o", str(tmp_path / "latents"), *model]) == 0
    assert main(["decode", str(tmp_path / "latents/sound.safetensors"), "-o", str(tmp_path / "out"), *model]) == 0
    assert audio_info(tmp_path / "out/sound.wav").frames == round(200_003 * 44100 / 32000)
    assert "sound.safetensors: 64 channels" in capsys.readouterr().out
    # Not over the original, unless asked to.
    shutil.copy(tmp_path / "latents/sound.safetensors", tmp_path)
    before, back = sound.read_bytes(), ["decode", str(tmp_path / "sound.safetensors"), "-o", str(tmp_path), *model]
    assert main(back) == 2 and "sound.wav: is there already" in capsys.readouterr().err
    assert sound.read_bytes() == before
    assert main([*back, "--overwrite"]) == 0 and sound.read_bytes() != before


def test_one_bad_file_of_several_stops_nothing(bundle: Path, sound: Path, tmp_path: Path, capsys) -> None:
    """All others are made, what failed is listed, and the status says so; for both commands."""
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    shutil.copy(sound, tmp_path / "last.wav")
    files = [str(tmp_path / name) for name in ("bad.wav", "sound.wav", "missing.wav", "last.wav")]
    latents, model = tmp_path / "latents", ["--model", str(bundle)]
    assert main(["encode", *files, "-o", str(latents), *model]) == 2
    printed = capsys.readouterr()
    assert sorted(path.name for path in latents.iterdir()) == ["last.safetensors", "sound.safetensors"]
    assert printed.out.count("64 channels") == 2 and printed.err.count("error: ") == 2
    last = printed.err.strip().split("\n")[-1]
    assert last.startswith("2 of 4 failed: ") and "bad.wav" in last and "missing.wav" in last
    (latents / "damaged.safetensors").write_bytes(b"no latents")
    made = sorted(str(path) for path in latents.iterdir())
    assert main(["decode", *made, "-o", str(tmp_path / "out"), *model]) == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["last.wav", "sound.wav"]
    assert "1 of 3 failed: " in capsys.readouterr().err


def test_encoding_replaces_nothing_unasked(bundle: Path, sound: Path, tmp_path: Path, capsys) -> None:
    """The latents of another folder's sound of that name stay."""
    other, latents = tmp_path / "other" / "sound.wav", tmp_path / "latents"
    write_audio(other, 0.1 * np.ones((1, 8000)), 32000)
    command = ["-o", str(latents), "--model", str(bundle)]
    assert main(["encode", str(other), *command]) == 0
    before = (latents / "sound.safetensors").read_bytes()
    assert main(["encode", str(sound), *command]) == 2
    assert "sound.safetensors: is there already" in capsys.readouterr().err
    assert (latents / "sound.safetensors").read_bytes() == before
    assert main(["encode", str(sound), *command, "--overwrite"]) == 0
    assert (latents / "sound.safetensors").read_bytes() != before


@pytest.mark.long
def test_memory_of_both_commands_is_measured(bundle: Path, tmp_path: Path) -> None:
    """Each of a file of the length, in megabytes of a process that holds torch; a command that fails is named."""
    assert all(50 < figure < 4000 for figure in codec_peaks(str(bundle), 0.02, tmp_path))
    decoded, written = read_audio(tmp_path / "noise.wav"), np.concatenate(list(noise(1.2)), 1)
    assert decoded.shape == written.shape and abs(float(decoded.std()) - 0.1) > 0.01  # decode's, not the noise
    assert load_file(tmp_path / "noise.safetensors")["latent"].shape[1] == math.ceil(1.2 * 44100 / 1024)
    with pytest.raises(UserError, match="encode .*: failed"):
        codec_peaks(str(tmp_path / "none"), 0.02, tmp_path)


def test_mistakes_are_named(bundle: Path, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each ends with one line that names the file, a status other than 0, and nothing written."""
    config = load_model_config(TINY)
    torch.manual_seed(1)
    save_bundle(tmp_path / "other", config, {"vae": build_vae(config.vae).state_dict()})
    Codec.from_pretrained(tmp_path / "other").encode_file(sound, tmp_path / "foreign.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "no_latent.safetensors")
    codec = Codec.from_pretrained(bundle)
    about = {"encoder": codec.encoder, "samples": "1024"}
    latent = torch.zeros(codec.vae.config.latent_channels, 2)
    for name, tensor, samples in (("short", latent, "1024"), ("whole", latent.int(), "2048"), ("lie", latent, "²")):
        save_file({"latent": tensor}, tmp_path / f"{name}.safetensors", about | {"samples": samples})
    (tmp_path / "twin").mkdir()
    shutil.copy(sound, tmp_path / "twin/sound.wav")
    cases = [
        (["decode", str(tmp_path / "foreign.safetensors")], "another VAE"),
        (["decode", str(tmp_path / "no_latent.safetensors")], "no latents"),
        (["decode", str(tmp_path / "short.safetensors")], "damaged, its 2 frames don't make 1024 samples"),
        (["decode", str(tmp_path / "whole.safetensors")], "no latents"),
        (["decode", str(tmp_path / "lie.safetensors")], "no latents"),
        (["decode", str(sound)], "no safetensors"),
        (["encode", str(tmp_path / "none.wav")], "no such file"),
        (["encode", str(tmp_path / "twin")], "twin: is a folder; give the files in it"),
        (["encode", str(tmp_path / "no_latent.safetensors")], "can't be read as audio"),
        (["encode", str(sound), str(tmp_path / "twin/sound.wav")], "two of the files"),
    ]
    for command, words in cases:
        assert main([*command, "-o", str(tmp_path / "out"), "--model", str(bundle)]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, command
    assert not list(tmp_path.glob("out/*"))
