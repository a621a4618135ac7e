"""The reconstruction report: figures with known answers, alignment, codecs, the command."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from evaluation.codecs import align, dac_codec, ffmpeg_codec
from evaluation.metrics.fidelity import OCTAVES, clicks, fidelity, octave_errors, phase_error, si_sdr
from evaluation.reconstruction import main, posterior_statistics
from stable_audio_lite.audio.io import write_audio
from stable_audio_lite.bundle import save_bundle
from stable_audio_lite.errors import UserError
from stable_audio_lite.models.vae import Posterior
from stable_audio_lite.systems import build_vae, load_model_config

ROOT = Path(__file__).parent.parent
RATE = 44100
needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")


@pytest.fixture
def music() -> torch.Tensor:
    """Two seconds of partials and noise with different channels."""
    generator = torch.Generator().manual_seed(0)
    time = torch.arange(2 * RATE) / RATE
    tones = torch.stack([torch.sin(2 * math.pi * f * time + f) for f in (220, 440, 1234, 5000)])
    mix = torch.tensor([[0.2, 0.1, 0.05, 0.02], [0.1, 0.15, 0.02, 0.04]])
    return mix @ tones + 0.01 * torch.randn(2, len(time), generator=generator)


def test_a_perfect_copy_has_no_error(music: torch.Tensor) -> None:
    row = fidelity(music, music, RATE)
    assert row.si_sdr_db > 100 and row.mid_error_db <= -100 and row.side_error_db <= -100
    for value in (row.stft, row.mel, row.phase_error, row.clicks, row.level_db, row.drift_db, *row.octaves_db):
        assert value == pytest.approx(0, abs=1e-4)


def test_noise_of_known_power_is_measured(music: torch.Tensor) -> None:
    """20 dB under the signal, and a gain changes nothing for SI-SDR but is the level's error."""
    noise = torch.randn(music.shape, generator=torch.Generator().manual_seed(1))
    noise *= 0.1 * music.std(1, keepdim=True)
    assert si_sdr(3 * (music + noise), music) == pytest.approx(20, abs=0.1)
    assert fidelity(0.5 * music, music, RATE).level_db == pytest.approx(-6.02, abs=0.01)


def test_side_and_phase_hear_the_stereo_image(music: torch.Tensor) -> None:
    """Mono keeps the middle; a shift of one channel by a quarter of a period is an angle of pi / 2."""
    mono = music.mean(0, keepdim=True).repeat(2, 1)
    row = fidelity(mono, music, RATE)
    assert row.mid_error_db < -90 and row.side_error_db > -30
    time = torch.arange(RATE) / RATE
    tone = torch.sin(2 * math.pi * 441 * time).repeat(2, 1)
    turned = torch.stack((tone[0], torch.sin(2 * math.pi * 441 * time + math.pi / 2)))
    assert phase_error(turned, tone) == pytest.approx(math.pi / 2, abs=0.02)


def test_clicks_are_counted_where_the_input_has_none(music: torch.Tensor) -> None:
    clicked = music.clone()
    clicked[:, 20_000] += 0.5
    clicked[0, 60_000] -= 0.5
    assert clicks(clicked, music, RATE) == pytest.approx(1.0)  # two in two seconds
    assert clicks(clicked, clicked, RATE) == 0


def test_octaves_find_the_band(music: torch.Tensor) -> None:
    """Ten dB more of what lies around 1.2 kHz shows there and nowhere else."""
    spectrum = torch.fft.rfft(music)
    band = torch.linspace(0, RATE / 2, spectrum.shape[1])
    spectrum[:, (band > 750) & (band < 1350)] *= 10**0.5
    errors = dict(zip(OCTAVES, octave_errors(torch.fft.irfft(spectrum, music.shape[1]), music, RATE), strict=True))
    assert errors[1000.0] == pytest.approx(10, abs=0.5)
    assert all(value < 1 for centre, value in errors.items() if centre != 1000.0)


@pytest.mark.parametrize("delay", [-700, 0, 1105])
def test_codecs_are_aligned(delay: int, music: torch.Tensor) -> None:
    moved = torch.roll(music, delay, 1)
    same = align(moved, music)[:, 2000:-2000]
    torch.testing.assert_close(same, music[:, 2000:-2000])


def test_dead_channels_are_found() -> None:
    """A channel whose mean hardly moves beside its noise; the KL is that of unit Gaussians in nats."""
    mean, std = torch.randn(1, 3, 500, generator=torch.Generator().manual_seed(0)), torch.full((1, 3, 500), 0.5)
    mean[:, 1] *= 1e-3
    latents = posterior_statistics([Posterior(mean, std)])
    assert latents.dead == (1,)
    exact = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, std), torch.distributions.Normal(0.0, 1.0)
    )
    assert latents.kl == pytest.approx(exact.mean((0, 2)).tolist(), rel=1e-4)


@needs_ffmpeg
def test_more_bits_sound_better(music: torch.Tensor) -> None:
    for kind in ("opus", "mp3"):
        few, many = (fidelity(ffmpeg_codec(f"{kind}:{rate}", RATE)(music), music, RATE) for rate in (32, 128))
        assert many.mel < few.mel and many.si_sdr_db > few.si_sdr_db


def test_dac_is_read_and_others_are_refused(music: torch.Tensor, tmp_path: Path) -> None:
    """A small DAC's file gives what the model itself does; another rate or a lone encoder is named."""
    import dac

    torch.manual_seed(0)
    shape = {"encoder_dim": 4, "encoder_rates": [2, 4], "decoder_dim": 32, "decoder_rates": [4, 2]}
    shape |= {"n_codebooks": 2, "codebook_size": 16, "codebook_dim": 4, "sample_rate": RATE}
    model = dac.DAC(**shape).eval()
    path, lone = tmp_path / "weights.pth", tmp_path / "lone.pth"
    torch.save({"state_dict": model.state_dict(), "metadata": {"kwargs": shape}}, path)
    torch.save({"state_dict": {"encoder.block.0.bias": torch.zeros(4)}}, lone)
    audio = music[:, :8001]
    with torch.no_grad():
        expected = model(model.preprocess(audio[:, None], RATE))["audio"][:, 0]
    torch.testing.assert_close(dac_codec(str(path), RATE)(audio), align(expected, audio))
    for file, rate, words in ((path, 48000, "for 44100 Hz, the VAE is for 48000"), (lone, RATE, "no complete DAC")):
        with pytest.raises(UserError, match=words):
            dac_codec(str(file), rate)


def test_unknown_codecs_are_named() -> None:
    with pytest.raises(UserError, match="flac:9"):
        ffmpeg_codec("flac:9", RATE)


@pytest.mark.parametrize("given", [("--items", "0"), ("--items", "-1"), ("--seconds", "0"), ("--seconds", "nan")])
def test_amounts_out_of_range_are_named(
    given: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["reconstruction", "nowhere", "nowhere", *given])
    assert main() == 2
    assert "--items must be at least 1 and --seconds above 0" in capsys.readouterr().err


@pytest.mark.long
def test_command_prints_and_draws(music: torch.Tensor, tmp_path: Path) -> None:
    config = load_model_config(ROOT / "configs/stable_audio/tiny.yaml")
    save_bundle(tmp_path / "vae", config, {"vae": build_vae(config.vae).state_dict()})
    write_audio(tmp_path / "data/a.wav", music, RATE)
    write_audio(tmp_path / "data/short.wav", music[:, :900], RATE)
    write_audio(tmp_path / "data/silent.wav", 0 * music, RATE)
    (tmp_path / "data/broken.wav").write_bytes(b"no audio")
    page = tmp_path / "report.html"
    command = [sys.executable, "-m", "evaluation.reconstruction", str(tmp_path / "vae"), str(tmp_path / "data")]
    done = subprocess.run([*command, "--codecs", "", "--html", str(page)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "VAE" in done.stdout and "dead channels" in done.stdout
    assert done.stdout.startswith("1 files") and done.stdout.count("left out: ") == 3
    assert page.read_text().count("data:image/webp") == 3
    done = subprocess.run([*command[:4], str(tmp_path / "none")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and done.stderr.count("\n") == 1 and "none" in done.stderr
