"""The evaluation of restoration: what it does to sounds, how it measures, and a whole run."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from evaluation import restoration
from evaluation.restoration import (
    DegradationSettings,
    degrade,
    interpolate_frames,
    log_spectral_distance,
    method_scores,
    room_response,
)
from stable_audio_lite.audio.io import write_audio
from stable_audio_lite.audio.spectrogram import Spectrogram
from stable_audio_lite.bundle import save_bundle
from stable_audio_lite.data.manifest import read_items
from stable_audio_lite.restoration.restorer import Restorer, RestoreSettings
from stable_audio_lite.systems import ComplexSTFTConfig, load_system

CONFIG = load_system(Path(__file__).parents[1] / "configs" / "complex_stft" / "tiny.yaml")
SHAPE = CONFIG.spectrogram
SPECTROGRAM = Spectrogram(SHAPE)
RATE, SAMPLES = SHAPE.sample_rate, 2 * SHAPE.samples


def tone(hertz: float = 1000.0) -> Tensor:
    return 0.3 * torch.sin(2 * math.pi * hertz * torch.arange(SAMPLES) / RATE + 1)[None]


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tones that are long enough, one that is not, and silence."""
    folder = tmp_path_factory.mktemp("sounds")
    for number in range(3):
        audio = tone(500.0 * (number + 1)) + 0.001 * torch.randn(1, SAMPLES)
        write_audio(folder / f"{number}.wav", audio, RATE)
    write_audio(folder / "1short.wav", tone()[:, :500], RATE)
    write_audio(folder / "1silent.wav", np.zeros((1, SAMPLES)), RATE)
    return folder


def test_a_gap_is_silent_and_a_steady_tone_is_interpolated() -> None:
    clean = tone()
    sound = degrade(clean, DegradationSettings(task="inpaint", gap=0.01), SPECTROGRAM, 0)
    changed = (sound.degraded != clean)[0].nonzero()[:, 0]
    assert not sound.degraded[0, changed].any() and 78 <= changed[-1] - changed[0] + 1 <= 82
    assert sound.cells.sum() in (8, 9)  # frames of 64 samples, 16 apart, that see one of 80
    errors = {
        name: float((answer - clean)[0, changed].square().mean() / clean.square().mean())
        for name, answer in sound.classical.items()
    }
    assert errors["magnitudes"] < 1e-3
    line, (first, last) = sound.classical["line"][0], changed[[0, -1]]
    torch.testing.assert_close(line[first - 1 : last + 2].diff(n=2), torch.zeros(len(changed)), rtol=0, atol=1e-5)
    assert torch.equal(line[:first], clean[0, :first]) and torch.equal(line[last + 1 :], clean[0, last + 1 :])


def test_magnitudes_are_interpolated_on_a_line() -> None:
    x = torch.zeros(1, 2, 3, 6)
    x[0, 0, :, :2], x[0, 0, :, 5] = 1.0, 4.0
    filled = interpolate_frames(x, torch.tensor([False, False, True, True, True, False]))
    expected = torch.tensor([1, 1, 1.75, 2.5, 3.25, 4]).expand(3, 6)
    torch.testing.assert_close(filled.square().sum(1).sqrt()[0], expected)


def test_frequencies_noise_and_rooms_are_as_asked_for() -> None:
    clean = 0.1 * torch.randn(1, SAMPLES, generator=torch.Generator().manual_seed(1))
    cut = degrade(clean, DegradationSettings(task="bandwidth", cutoff=2000.0), SPECTROGRAM, 0)
    spectrum = torch.fft.rfft(cut.degraded[0]).abs()
    above = torch.arange(len(spectrum)) * RATE / SAMPLES > 2001
    assert spectrum[above].max() < 1e-3 * spectrum.max()
    rows = (torch.arange(SHAPE.bins) + 1) * RATE / SHAPE.window
    assert torch.equal(cut.cells[:, 0], rows > 2000 - 2 * RATE / SHAPE.window)
    assert log_spectral_distance(SPECTROGRAM, cut.classical["octave"], clean, cut.cells) < log_spectral_distance(
        SPECTROGRAM, cut.degraded, clean, cut.cells
    )
    noisy = degrade(clean, DegradationSettings(task="denoise", snr=10.0), SPECTROGRAM, 0)
    ratio = clean.square().sum() / (noisy.degraded - clean).square().sum()
    assert abs(10 * ratio.log10() - 10) < 0.3
    response = room_response(0.5, RATE, torch.Generator().manual_seed(0))
    late = response[1:].square()
    assert response[0] == 1 and abs(10 * late.sum().log10() + 3) < 0.01 and not late[:38].any()
    left = 10 * (late.flip(0).cumsum(0).flip(0) / late.sum()).log10()
    assert abs(int((left > -30).sum()) / RATE - 0.25) < 0.05  # half of 60 dB


def test_a_wiener_filter_helps_a_tone() -> None:
    clean = tone()
    noisy = degrade(clean, DegradationSettings(task="denoise", snr=5.0), SPECTROGRAM, 0)
    errors = [(answer - clean).square().sum() for answer in (noisy.classical["wiener"], noisy.degraded)]
    assert errors[0] < 0.3 * errors[1]


def test_the_distance_is_in_decibels_of_the_cells_that_count() -> None:
    clean = 0.1 * torch.randn(1, SAMPLES, generator=torch.Generator().manual_seed(1))
    everything = torch.ones(1, 1, dtype=torch.bool)
    assert log_spectral_distance(SPECTROGRAM, clean, clean, everything) == 0
    assert abs(log_spectral_distance(SPECTROGRAM, 2 * clean, clean, everything) - 6.0206) < 1e-3
    late = (torch.arange(SAMPLES // SHAPE.hop) > 40)[None]
    spoiled = clean.clone()
    spoiled[:, : 30 * SHAPE.hop] = 0
    assert log_spectral_distance(SPECTROGRAM, spoiled, clean, late) < 1e-3
    assert log_spectral_distance(SPECTROGRAM, spoiled, clean, ~late) > 20


def test_gains_are_paired() -> None:
    sounds = np.random.default_rng(0).normal(0, 20, 40)
    rows = {"nothing": [(v, v) for v in sounds], "restoration": [(v + 1, v - 2) for v in sounds]}
    nothing, restored, distance, _ = method_scores(rows)
    assert abs(nothing.gain - 1) < 1e-9 and nothing.gain_high - nothing.gain_low < 1e-9
    assert nothing.high - nothing.low > 5 and restored.gain == 0 and abs(distance.gain + 2) < 1e-9


@pytest.mark.parametrize("task", restoration.TASKS)
def test_every_answer_is_measured_on_the_same_sounds(task: str, sounds: Path) -> None:
    frame = torch.ones(1, 1, SHAPE.bins, 1)
    restorer = Restorer(lambda x, s: x * frame / (frame + s.reshape(-1, 1, 1, 1) ** 2), CONFIG)
    how = DegradationSettings(task=task, gap=0.01, cutoff=2000.0, rt60=0.05, seconds=0.01)
    found = restoration.measure_methods(restorer, read_items(sounds), 3, how, RestoreSettings(steps=3))
    classical = {"inpaint": ["line", "magnitudes"], "bandwidth": ["octave"], "denoise": ["wiener"], "dereverb": ["wpe"]}
    assert [row.method for row in found] == 2 * ["nothing", *classical[task], "restoration"]
    assert all(math.isfinite(v) for row in found for v in (row.mean, row.low, row.gain_high))
    assert all(row.low <= row.mean <= row.high for row in found)
    assert "3 sounds" in restoration.restoration_table(found, 3, how)


def test_the_command_prints_figures_or_one_line(sounds: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    assert isinstance(CONFIG, ComplexSTFTConfig)
    save_bundle(tmp_path / "model", CONFIG, {CONFIG.part: CONFIG.network().state_dict()})

    def run(*arguments: object) -> int:
        own = [
            "restoration",
            tmp_path / "model",
            sounds,
            "--task",
            "denoise",
            "--steps",
            2,
            "--device",
            "cpu",
            "--seconds",
            0.01,
        ]
        monkeypatch.setattr(sys, "argv", [str(a) for a in (*own, *arguments)])
        return restoration.main()

    run("--items", 2, "--json")
    made = json.loads(capsys.readouterr().out)
    assert made["items"] == 2 and len(made["scores"]) == 6 and made["degradation"]["task"] == "denoise"
    for arguments, message in (
        (("--items", 4), "3 of the 5 sounds"),
        (("--items", 1), "--items must be at least 2"),
        (("--seconds", 3), "0 of the 5 sounds have 3.0 s"),
        (("--rt60", 0), "must be above 0"),
        (("--cutoff", "nan"), "must be above 0"),
    ):
        assert run(*arguments) == 2
        lines = [line for line in capsys.readouterr().err.split("\n") if line.startswith("error: ")]
        assert len(lines) == 1 and message in lines[0]
