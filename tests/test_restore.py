"""Restoring sound: what is kept, what is repaired, and how mistakes are told."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from stable_audio_lite import cli
from stable_audio_lite.audio.io import audio_info, read_metadata, write_audio
from stable_audio_lite.audio.spectrogram import Spectrogram
from stable_audio_lite.bundle import save_bundle
from stable_audio_lite.errors import UserError
from stable_audio_lite.restoration.degradations import (
    Bandwidth,
    Degradation,
    Denoise,
    Dereverb,
    Inpaint,
    estimate_noise_std,
    noise_std,
)
from stable_audio_lite.restoration.restorer import Restorer, RestoreSettings
from stable_audio_lite.restoration.room import convolve
from stable_audio_lite.systems import ComplexSTFTConfig, load_system

CONFIGS = Path(__file__).parents[1] / "configs"
CONFIG = load_system(CONFIGS / "complex_stft" / "tiny.yaml")
RATE, SHAPE = CONFIG.spectrogram.sample_rate, CONFIG.spectrogram
SETTINGS = RestoreSettings(steps=20, eta_b=1.0, seed=3)


def tones(seconds: float, seed: int = 0) -> Tensor:
    """(1, T) of three steady tones."""
    time = torch.arange(round(seconds * RATE)) / RATE
    return sum(0.2 * torch.sin(2 * math.pi * f * time + seed) for f in (500.0, 1250.0, 2125.0))[None]  # type: ignore


def power_of(audio: Tensor) -> Tensor:
    """(1, 1, F, 1), what a spectrogram of `audio` holds in each row."""
    whole = audio[:, : audio.shape[1] // SHAPE.hop * SHAPE.hop]
    return Spectrogram(SHAPE).encode(whole).square().mean((0, 1, 3), keepdim=True)


def gaussian(power: Tensor) -> Restorer:
    """A model that knows what Gaussian spectrograms with a power in each row are like, and no more."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        assert x.shape[1:] == SHAPE.shape  # as a network would want it
        return x * power / (power + sigma.reshape(-1, 1, 1, 1) ** 2)

    return Restorer(denoise, CONFIG)


def sdr(found: Tensor, wanted: Tensor) -> float:
    return 10 * math.log10(float(wanted.square().sum() / (found - wanted).square().sum()))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of configs/complex_stft/tiny.yaml with random weights."""
    assert isinstance(CONFIG, ComplexSTFTConfig)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bundles") / "spectral"
    save_bundle(folder, CONFIG, {CONFIG.part: CONFIG.network().state_dict()})
    return folder


def test_noise_is_removed_as_far_as_a_wiener_filter_can() -> None:
    clean = tones(3 * SHAPE.seconds)
    noise = 0.05 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    restorer, noisy = gaussian(power_of(clean)), clean + noise
    told = restorer.restore(noisy, Denoise(20 * math.log10(0.05)), SETTINGS)
    guessed = restorer.restore(noisy, Denoise(), SETTINGS)
    assert sdr(told, clean) > sdr(noisy, clean) + 3 and sdr(guessed, clean) > sdr(noisy, clean) + 3


def test_the_level_of_noise_is_that_of_its_spectrogram() -> None:
    noise = 0.01 * torch.randn(1, 64 * SHAPE.hop * 8, generator=torch.Generator().manual_seed(1))
    y = Spectrogram(SHAPE).encode(noise)
    expected = noise_std(SHAPE, -40)
    assert abs(float(y[:, :, :-1, 4:-4].std()) / expected - 1) < 0.03
    assert abs(estimate_noise_std(y) / expected - 1) < 0.1


def test_a_known_room_is_undone() -> None:
    torch.manual_seed(2)
    dry = torch.randn(1, 3 * SHAPE.samples) * 0.1
    # A window of 64 samples holds little of a response; this one is short.
    response = torch.cat((torch.tensor([1.0]), 0.4 * torch.randn(200) * torch.logspace(0, -2, 200)))
    wet = convolve(dry[0], response)[None]
    restored = gaussian(power_of(dry)).restore(wet, Dereverb(room=3 * response), SETTINGS)
    assert sdr(restored, dry) > sdr(wet, dry) + 3


def test_an_unknown_room_is_estimated_and_refined() -> None:
    torch.manual_seed(2)
    dry = torch.randn(1, 4 * SHAPE.samples) * 0.1
    dry *= (torch.rand(dry.shape[1] // 128) < 0.3).float().repeat_interleave(128)
    response = torch.cat((torch.tensor([1.0]), 0.3 * torch.randn(800) * torch.logspace(0, -2, 800)))
    wet = convolve(dry[0], response)[None]
    restorer = gaussian(power_of(dry))
    seen = Dereverb(taps=20, ridge=1.0).observe(restorer.spectrogram, wet[0], SHAPE.frames)
    assert seen.refine is not None
    estimate = restorer.spectrogram.encode(dry[:, : dry.shape[1] // SHAPE.hop * SHAPE.hop])
    estimate = torch.nn.functional.pad(estimate, (0, seen.y.shape[3] - estimate.shape[3]))
    for _ in range(3):
        better = seen.refine(estimate)
    # Told what is dry, it learns the room: it then predicts the wet sound.
    errors = [float((o.forward(estimate) - seen.y).square().sum()) for o in (seen.operator, better)]
    assert errors[1] < 0.9 * errors[0]
    norms = [o.singular.square().sum(1) for o in (seen.operator, better)]
    torch.testing.assert_close(*norms)
    assert torch.isfinite(restorer.restore(wet, Dereverb(taps=20), SETTINGS)).all()


def test_a_gap_is_filled_and_nothing_else_changes() -> None:
    clean = tones(20 * SHAPE.seconds)
    spoiled = clean.clone()
    start, stop = 10 * SHAPE.samples, 10 * SHAPE.samples + 400
    spoiled[:, start:stop] = 0
    restored = gaussian(power_of(clean)).restore(spoiled, Inpaint(((start / RATE, stop / RATE),)), SETTINGS)
    assert torch.equal(restored[:, : start - SHAPE.hop], clean[:, : start - SHAPE.hop])
    assert torch.equal(restored[:, stop + SHAPE.hop :], clean[:, stop + SHAPE.hop :])
    # As loud as its surroundings, though no model of independent cells could tell the phase.
    level = restored[:, start:stop].square().mean() / clean.square().mean()
    assert 0.05 < level < 5
    bend = restored[0].diff(n=2).abs()
    assert bend[start - 40 : stop + 40].max() < 3 * bend[: start - 40].max()


def test_only_what_is_near_gaps_is_worked_on() -> None:
    degradation = Inpaint(((10.0, 10.5), (12.0, 12.5), (100.0, 101.0), (0.5, 1.0)))
    segments = degradation.segments(seconds=101.5, window=3.0)
    assert [(a, b) for a, b, _ in segments] == [(0.0, 2.5), (8.5, 14.0), (98.5, 101.5)]
    assert [p.gaps for _, _, p in segments] == [((0.5, 1.0),), ((1.5, 2.0), (3.5, 4.0)), ((1.5, 2.5),)]


def test_frequencies_below_the_cutoff_are_kept() -> None:
    full = tones(2 * SHAPE.seconds)
    power = power_of(full) + 1e-3
    cut = 1500.0
    restored = gaussian(power).restore(full, Bandwidth(cut), SETTINGS)
    before, after = (torch.fft.rfft(x[0]) for x in (full, restored))
    hertz = torch.arange(len(before)) * RATE / full.shape[1]
    low = hertz < 1000
    assert (before - after)[low].abs().square().sum() < 0.01 * before[low].abs().square().sum()
    high = hertz > 2000
    assert 0.1 < after[high].abs().square().sum() / before[high].abs().square().sum() < 10


def test_windows_leave_no_seams() -> None:
    # A tone whose frames are all alike, which every other window hears a tenth louder: a seam would be a jump of 10 %.
    time = torch.arange(3 * SHAPE.samples - 100) / RATE
    tone = 0.3 * torch.sin(2 * math.pi * 1000 * time)[None]
    frame = Spectrogram(SHAPE).encode(torch.sin(2 * math.pi * 1000 * torch.arange(SHAPE.samples) / RATE)[None] * 0.3)
    frame = frame[..., SHAPE.frames // 2, None]
    windows: list[int] = []

    def uneven(x: Tensor, sigma: Tensor) -> Tensor:
        windows.append(len(x))
        return (1 + 0.1 * (torch.arange(len(x)) % 2)).reshape(-1, 1, 1, 1) * frame.expand_as(x)

    settings = RestoreSettings(steps=3, seed=1, batch=8)
    restored = Restorer(uneven, CONFIG).restore(tone, Denoise(-20), settings)
    assert windows == [4, 4, 4]
    level = restored[0].square().unfold(0, SHAPE.hop, SHAPE.hop).mean(1).sqrt()[3:-3]
    assert level.max() / level.min() > 1.05
    assert level.log().diff().abs().max() < 0.02


@pytest.mark.parametrize("degradation", [Inpaint(((0.01, 0.02),)), Bandwidth(1500), Denoise(), Dereverb()])
@pytest.mark.parametrize("samples", [300, SHAPE.samples, 3 * SHAPE.samples + 7])
def test_every_degradation_takes_every_length(degradation: Degradation, samples: int) -> None:
    audio = tones(samples / RATE)
    seen: list[tuple[int, int]] = []
    settings = RestoreSettings(steps=2, seed=1)
    restored = gaussian(power_of(tones(1))).restore(audio, degradation, settings, lambda *done: seen.append(done))
    assert restored.shape == audio.shape and torch.isfinite(restored).all()
    assert seen == [(1, 2), (2, 2)]


def test_channels_that_are_alike_stay_alike() -> None:
    audio = tones(SHAPE.seconds).repeat(2, 1)
    restored = gaussian(power_of(audio[:1])).restore(audio, Denoise(-20), SETTINGS)
    assert torch.equal(restored[0], restored[1]) and not torch.equal(restored, audio)


@pytest.mark.parametrize("degradation", [Bandwidth(1500), Denoise(), Denoise(-30), Dereverb(torch.ones(1)), Dereverb()])
def test_silence_stays_silent(degradation: Degradation) -> None:
    """The whole sound, one of its channels, and a stretch of it."""
    restorer, settings = gaussian(power_of(tones(1))), RestoreSettings(steps=2, seed=1)
    assert not restorer.restore(torch.zeros(2, 3000), degradation, settings).any()
    sound = torch.cat((tones(1), torch.zeros_like(tones(1))))
    sound[0, 3000:5000] = 0
    found = restorer.restore(sound, degradation, settings)
    assert not found[1].any() and not found[0, 3000 + 2 * SHAPE.window : 5000 - 2 * SHAPE.window].any()
    assert not torch.equal(found[0, :2000], sound[0, :2000])


def test_level_stays_level() -> None:
    """However quiet a sound is: noise goes, the rest is as loud as it was, and half the sound gives half the result."""
    clean = tones(2 * SHAPE.seconds)
    noisy = clean + 0.02 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    restorer = gaussian(power_of(clean))
    for degradation in (Denoise(), Bandwidth(2500.0)):
        found = {a: restorer.restore(a * noisy, degradation, SETTINGS) for a in (1e-4, 1e-5, 1.0, 30.0)}
        for factor, sound in found.items():
            assert abs(20 * math.log10(float(sound.norm() / (factor * clean).norm()))) < 1.5, (degradation, factor)
        torch.testing.assert_close(found[1e-4], 10 * found[1e-5], atol=1e-8, rtol=1e-2)
    quiet = restorer.restore(1e-4 * noisy, Denoise(20 * math.log10(0.02) - 80), SETTINGS)
    assert sdr(quiet, 1e-4 * clean) > sdr(noisy, clean)


def test_noise_that_is_louder_than_the_sound_is_refused() -> None:
    with pytest.raises(UserError, match="noise_db: the sound has -12.2 dB"):
        gaussian(power_of(tones(1))).restore(tones(1), Denoise(0.0), SETTINGS)


@pytest.mark.parametrize("degradation", [Denoise(-30), Bandwidth(2500), Dereverb(torch.tensor([1.0, 0.0, 0.3]))])
def test_what_lies_above_the_model_stays_as_it_is(degradation: Degradation, tmp_path: Path) -> None:
    rate = 44100
    time = np.arange(rate) / rate
    sound = 0.2 * np.sin(2 * np.pi * 500 * time) + 0.1 * np.sin(2 * np.pi * 9000 * time)
    sound += 0.03 * np.random.default_rng(0).standard_normal(len(time))
    write_audio(tmp_path / "in.wav", sound[None], rate)
    gaussian(power_of(tones(1))).restore_file(tmp_path / "in.wav", tmp_path / "out.wav", degradation, SETTINGS)
    before, after = (np.fft.rfft(soundfile.read(tmp_path / name)[0]) for name in ("in.wav", "out.wav"))
    high = np.fft.rfftfreq(rate, 1 / rate) > RATE / 2 * 1.05
    assert np.abs(after - before)[high].max() < 1e-3 * np.abs(before)[high].max()
    assert np.abs(after - before)[~high].max() > 1e-3 * np.abs(before)[~high].max()


def test_the_time_it_takes_is_that_of_denoising_all_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []  # the clock

    def slow(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(len(x))
        return x

    monkeypatch.setattr("stable_audio_lite.restoration.restorer.time.perf_counter", lambda: float(sum(calls)))

    restorer, settings = Restorer(slow, CONFIG), RestoreSettings(steps=3, seed=1, batch=2)
    for degradation in (Denoise(-30), Inpaint(((0.1, 0.11), (2.0, 2.02)))):
        sound = tones(2.5).repeat(2, 1)
        estimate = restorer.estimate_seconds(sound.shape[1], 2, degradation, settings)
        calls.clear()
        restorer.restore(sound, degradation, settings)
        assert estimate == pytest.approx(sum(calls))
    with pytest.raises(UserError, match="too short"):
        restorer.estimate_seconds(0, 1, Denoise(), settings)


@pytest.mark.parametrize("rate", [4000, RATE, 16000, 96000])
@pytest.mark.parametrize(
    "degradation", [Inpaint(((0.0, 1e-5),)), Bandwidth(1500), Denoise(), Dereverb(torch.ones(1)), Dereverb()]
)
def test_one_sample_is_restored_or_refused_in_one_line(degradation: Degradation, rate: int, tmp_path: Path) -> None:
    write_audio(tmp_path / "in.wav", np.full((1, 1), 0.5), rate)
    restorer, settings = gaussian(power_of(tones(1))), RestoreSettings(steps=1, seed=1)
    try:
        restorer.restore_file(tmp_path / "in.wav", tmp_path / "out.wav", degradation, settings)
    except UserError as error:
        assert "\n" not in str(error) and not (tmp_path / "out.wav").exists()
    else:
        made = audio_info(tmp_path / "out.wav")
        assert made.frames == max(1, made.sample_rate // rate)


def test_wrong_types_are_told(tmp_path: Path) -> None:
    restorer = gaussian(power_of(tones(1)))
    for sound in (np.zeros((1, 100)), torch.zeros(100), torch.zeros(1, 100, dtype=torch.int16)):
        with pytest.raises(UserError, match="must be a tensor"):
            restorer.restore(sound, Denoise(), SETTINGS)  # type: ignore[arg-type]
    for wrong in ({"steps": "5"}, {"batch": 1.5}, {"eta": "x"}, {"seed": "x"}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))} must be"):
            RestoreSettings(**wrong)  # type: ignore[arg-type]


@pytest.fixture
def restore(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run `restore` in an empty folder with stereo `in.wav` of 1 s at 11025 Hz, mono `old.wav` at 4000 Hz."""
    monkeypatch.chdir(tmp_path)
    time = np.arange(11025) / 11025
    stereo = 0.3 * np.stack((np.sin(2000 * time), np.sin(3000 * time)))
    write_audio("in.wav", stereo, 11025)
    write_audio("old.wav", stereo[:1, ::3], 4000)
    fixed = ["--model", str(model), "--device", "cpu", "--dtype", "float32", "--steps", "2"]
    return lambda *args: cli.main(["restore", *map(str, args), *fixed])


def test_the_command_keeps_rate_channels_and_samples(restore, tmp_path: Path, capsys) -> None:
    assert restore("in.wav", "-o", "out.flac", "--task", "inpaint", "--gap", "0.2-0.3", "0.6-0.61", "--seed", 5) == 0
    before, after = (soundfile.read(tmp_path / name)[0] for name in ("in.wav", "out.flac"))
    assert before.shape == after.shape and audio_info(tmp_path / "out.flac").sample_rate == 11025
    changed = (np.abs(before - after) > 2e-7).any(1)
    fade = round(SHAPE.hop * 11025 / RATE)
    places = np.flatnonzero(changed)
    assert changed[2300:3200].mean() > 0.9
    assert places.min() >= 0.2 * 11025 - fade - 1 and places.max() <= 0.61 * 11025 + fade + 1
    assert not changed[3500:6500].any()
    stored = read_metadata(tmp_path / "out.flac").settings
    assert (stored["task"], stored["seed"], stored["gaps"]) == ("inpaint", 5, [[0.2, 0.3], [0.6, 0.61]])
    assert "seed 5" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_bytes(restore, tmp_path: Path) -> None:
    for name in ("a.wav", "b.wav"):
        assert restore("in.wav", "-o", name, "--task", "denoise", "--noise-db", -30, "--seed", 1) == 0
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()


def test_a_narrow_file_becomes_as_wide_as_the_model(restore, tmp_path: Path) -> None:
    assert restore("old.wav", "-o", "new.wav", "--task", "bandwidth") == 0
    made = audio_info(tmp_path / "new.wav")
    assert (made.sample_rate, made.channels) == (RATE, 1)
    assert abs(made.seconds - audio_info(tmp_path / "old.wav").seconds) < 1e-3


def test_reverberation_by_the_command(restore, tmp_path: Path) -> None:
    write_audio("room.wav", np.array([[1.0, 0.0, 0.3, 0.0, 0.1]]), 11025)
    assert restore("in.wav", "-o", "a.wav", "--task", "dereverb", "--room", "room.wav") == 0
    assert read_metadata(tmp_path / "a.wav").settings["room"] == "known"


MISTAKES = {
    "no such audio file": ("none.wav", "--task", "denoise"),
    "--gap: belongs to --task inpaint": ("in.wav", "--task", "denoise", "--gap", "1-2"),
    "--noise-db: belongs to --task denoise": ("in.wav", "--task", "bandwidth", "--noise-db", -3, "--cutoff", 100),
    "is not START-END": ("in.wav", "--task", "inpaint", "--gap", "1:2"),
    "must end after it starts": ("in.wav", "--task", "inpaint", "--gap", "0.5-0.4"),
    "say what is missing": ("in.wav", "--task", "inpaint"),
    "which ends at 1.0 s": ("in.wav", "--task", "inpaint", "--gap", "0.5-1.4"),
    "gaps: cover the whole sound": ("in.wav", "--task", "inpaint", "--gap", "0.4-1", "0-0.5"),
    "give --cutoff": ("in.wav", "--task", "bandwidth"),
    "cutoff must lie from": ("in.wav", "--task", "bandwidth", "--cutoff", 20),
    "cutoff must be above 0 Hz": ("in.wav", "--task", "bandwidth", "--cutoff", "nan"),
    "noise_db must be finite": ("in.wav", "--task", "denoise", "--noise-db", "inf"),
    "the sound is too short": ("click.wav", "--task", "denoise"),
    "give --room FILE": ("in.wav", "--task", "dereverb"),
    "taken.wav: is there already": ("in.wav", "--task", "denoise", "-o", "taken.wav"),
    "in.wav: is the file that is read": ("in.wav", "--task", "denoise", "-o", "in.wav", "--overwrite"),
    "taken.wav: is the file that is read": (
        *("in.wav", "--task", "dereverb", "--room", "taken.wav"),
        *("-o", "taken.wav", "--overwrite"),
    ),
    "'-' names no file": ("in.wav", "--task", "denoise", "--room", "-"),
    "room.wav: no such audio file": ("in.wav", "--task", "dereverb", "--room", "room.wav"),
    "the room's impulse response is silent": ("in.wav", "--task", "dereverb", "--room", "silence.wav"),
    "eta and eta_b must lie in 0..1": ("in.wav", "--task", "denoise", "--eta", 2),
    "steps and batch must be at least 1": ("in.wav", "--task", "denoise", "--batch", 0),
    "steps must be at most 10000": ("in.wav", "--task", "denoise", "--steps", 10**9, "--model", "the latent system"),
    "no such bundle": ("in.wav", "--task", "denoise", "--model", "nowhere at all"),
    "makes sound from text": ("in.wav", "--task", "denoise", "--model", "the latent system"),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_each_mistake_is_one_line(restore, tmp_path: Path, message: str, capsys, tiny_bundle: Path) -> None:
    write_audio("silence.wav", np.zeros((1, 100)), 8000)
    write_audio("click.wav", np.ones((1, 1)), 96000)
    write_audio("taken.wav", np.ones((1, 10)), RATE)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    arguments = [tiny_bundle if part == "the latent system" else part for part in MISTAKES[message]]
    arguments += [] if "-o" in arguments else ["-o", "out.wav"]
    try:
        status = cli.main(["restore", *map(str, arguments)]) if "--model" in arguments else restore(*arguments)
    except SystemExit as error:
        status = error.code
    captured = capsys.readouterr()
    assert status == 2 and captured.out == "" and message in captured.err
    assert captured.err.count("\n") == 1 and captured.err.startswith("error: ")
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_the_time_is_said_before_it_starts(restore, capsys) -> None:
    assert restore("in.wav", "-o", "out.wav", "--task", "denoise", "--noise-db", -40) == 0
    first, second = capsys.readouterr().err.replace("\r", "\n").split("\n")[:2]
    assert first.startswith("about ") and "for 1.0 s of sound on cpu" in first
    assert second == f"the model works on up to {RATE // 2} Hz; above, the file stays as it is"


def test_an_estimated_room_needs_some_sound() -> None:
    with pytest.raises(UserError, match="room: can't be estimated from less than"):
        gaussian(power_of(tones(1))).restore(tones(10 / RATE), Dereverb(), SETTINGS)


def test_a_folder_can_not_be_written_over(restore, tmp_path: Path, capsys) -> None:
    assert restore("in.wav", "-o", ".", "--task", "denoise") == 2
    assert capsys.readouterr().err.startswith("error: ")
