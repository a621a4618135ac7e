"""Audio files: what is read, written and refused."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from stable_audio_lite.audio.io import (
    audio_info,
    check_writable,
    read_audio,
    read_metadata,
    write_audio,
)
from stable_audio_lite.audio.plot import plot_spectrogram, spectrogram_db, spectrogram_webp
from stable_audio_lite.errors import UserError


def tone(rate: int, seconds: float = 2.0, hertz: float = 440.0, channels: int = 2) -> np.ndarray:
    """(channels, T) float32 sine at half scale, each channel quieter than the one before."""
    t = np.arange(round(rate * seconds)) / rate
    return np.stack([0.5 / (c + 1) * np.sin(2 * np.pi * hertz * t) for c in range(channels)]).astype(np.float32)


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_written_audio_reads_back_within_24_bits(tmp_path: Path, suffix: str) -> None:
    samples = tone(44100)
    assert write_audio(tmp_path / f"a{suffix}", torch.from_numpy(samples), 44100) == 1.0
    assert np.abs(read_audio(tmp_path / f"a{suffix}").numpy() - samples).max() < 2**-22


@pytest.mark.parametrize("rate", [8000, 22050, 48000, 192000])
def test_any_rate_becomes_the_wanted_one_at_the_same_pitch_and_level(tmp_path: Path, rate: int) -> None:
    write_audio(tmp_path / "a.wav", tone(rate), rate)
    audio = read_audio(tmp_path / "a.wav", 44100)
    assert audio.shape == (2, 88200)
    middle = audio[:, 4410:-4410].numpy()
    assert np.abs(middle - tone(44100)[:, 4410:-4410]).max() < 2e-3


def test_mono_is_duplicated_and_six_channels_are_mixed(tmp_path: Path) -> None:
    """Left, right, centre, LFE, and surrounds on either side, by the weights of ITU-R BS.775."""
    write_audio(tmp_path / "mono.wav", tone(44100, channels=1), 44100)
    mono = read_audio(tmp_path / "mono.wav")
    assert mono.shape[0] == 2 and torch.equal(mono[0], mono[1])
    write_audio(tmp_path / "six.wav", tone(44100, channels=6), 44100)
    six = read_audio(tmp_path / "six.wav")
    level = 1 / (1 + np.arange(6))
    weights = [level[0] + 0.5**0.5 * (level[2] + level[4]), level[1] + 0.5**0.5 * (level[2] + level[5])]
    assert np.abs(six.numpy() - np.outer(weights, tone(44100, channels=1)[0])).max() < 1e-6


@pytest.mark.parametrize("rate", [44100, 48000])
@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_a_crop_equals_that_stretch_of_the_whole(tmp_path: Path, rate: int, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    write_audio(path, np.random.default_rng(0).uniform(-0.5, 0.5, (2, 3 * rate)), rate)
    whole, crop = read_audio(path), read_audio(path, start_seconds=1.25, seconds=0.5)
    assert crop.shape == (2, 22050)
    assert torch.allclose(crop, whole[:, 55125 : 55125 + 22050], atol=1e-4)


def test_a_crop_beyond_the_end_is_shorter_and_one_after_it_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    write_audio(path, tone(44100), 44100)
    assert read_audio(path, start_seconds=1.5, seconds=5).shape == (2, 22050)
    with pytest.raises(UserError, match=r"a\.wav: has 2\.00 s"):
        read_audio(path, start_seconds=2.0)


def test_only_what_would_clip_is_attenuated(tmp_path: Path) -> None:
    loud = tone(44100) * 4
    assert write_audio(tmp_path / "a.wav", loud, 44100) == pytest.approx(0.5)
    audio = read_audio(tmp_path / "a.wav").numpy()
    assert np.abs(audio - loud / 2).max() < 1e-6
    assert write_audio(tmp_path / "b.wav", tone(44100) * 2, 44100) == 1.0


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_metadata_of_any_length_and_script_comes_back(tmp_path: Path, suffix: str) -> None:
    stored = {"prompt": "piano é 漢字 🎹 " * 500, "seed": 7, "cfg": 6.5, "negative": None}
    write_audio(tmp_path / f"a{suffix}", tone(44100), 44100, stored)
    metadata = read_metadata(tmp_path / f"a{suffix}")
    assert metadata.settings == stored
    assert metadata.title == stored["prompt"]
    assert audio_info(tmp_path / f"a{suffix}").frames == 88200


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_foreign_files_have_no_settings(tmp_path: Path, suffix: str) -> None:
    soundfile.write(tmp_path / f"a{suffix}", tone(44100).T, 44100)
    assert read_metadata(tmp_path / f"a{suffix}").settings == {}


@pytest.mark.parametrize("kind", ["wav", "wavex", "rf64", "w64", "aiff", "flac", "ogg", "mp3"])
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    suffix = ".wav" if kind in ("wavex", "rf64") else f".{kind}"
    path = tmp_path / f"cut{suffix}"
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (88200, 2))
    soundfile.write(path, noise, 44100, format=kind.upper())
    assert abs(audio_info(path).frames - 88200) < 3000
    read_audio(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(UserError, match=f"cut{suffix}.*truncated"):
        read_audio(path)


def test_unreadable_files_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("no audio")
    (tmp_path / "empty.flac").touch()
    soundfile.write(tmp_path / "none.wav", np.zeros((0, 2)), 44100)
    (tmp_path / "samples.raw").write_bytes(bytes(1000))
    for name in ("text.wav", "empty.flac", "none.wav", "missing.wav", "samples.raw"):
        with pytest.raises(UserError, match=name):
            read_audio(tmp_path / name)
        with pytest.raises(UserError, match=name):
            audio_info(tmp_path / name)


def test_nan_samples_are_neither_read_nor_written(tmp_path: Path) -> None:
    samples = tone(44100)
    samples[0, 100] = math.nan
    soundfile.write(tmp_path / "nan.wav", samples.T, 44100, subtype="FLOAT")
    with pytest.raises(UserError, match=r"nan\.wav: holds NaN"):
        read_audio(tmp_path / "nan.wav")
    with pytest.raises(UserError, match="NaN"):
        write_audio(tmp_path / "out.wav", samples, 44100)
    assert [p.name for p in tmp_path.iterdir()] == ["nan.wav"]


def test_silence_and_single_frames_are_sound_too(tmp_path: Path) -> None:
    write_audio(tmp_path / "a.wav", np.zeros((2, 4410)), 44100)
    assert read_audio(tmp_path / "a.wav").shape == (2, 4410) and not read_audio(tmp_path / "a.wav").any()
    for rate in (44100, 22050):
        for channels in (1, 2):
            write_audio(tmp_path / "b.wav", np.full((channels, 1), 0.5), rate)
            assert read_audio(tmp_path / "b.wav").shape == (2, 44100 // rate)


def test_unwritable_places_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "a.mp3", tmp_path / "a", tmp_path / "file" / "a.wav", tmp_path):
        with pytest.raises(UserError, match=str(path)):
            check_writable(path)
        with pytest.raises(UserError, match=str(path)):
            write_audio(path, tone(44100), 44100)
    check_writable(tmp_path / "new" / "deep" / "a.wav")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_spectrogram_reads_level_and_frequency_of_a_tone() -> None:
    decibels, frequencies = spectrogram_db(tone(44100, hertz=1000), 44100, columns=50)
    middle = decibels[:, :, 25]
    assert abs(frequencies[middle[0].argmax()] - 1000) < 20
    assert middle[0].max() == pytest.approx(-6.0, abs=1.5)
    assert middle[0].max() - middle[1].max() == pytest.approx(6.0, abs=0.1)


def test_plot_is_a_picture_and_other_suffixes_are_refused(tmp_path: Path) -> None:
    plot_spectrogram(tmp_path / "a.png", tone(44100), 44100, "a $title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"a\.jpg"):
        plot_spectrogram(tmp_path / "a.jpg", tone(44100), 44100)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(("rate", "hertz"), [(44100, 1000), (8000, 100), (96000, 10000)])
def test_small_pictures_show_a_tone_where_they_say_that_it_lies(rate: int, hertz: int) -> None:
    """Also where it is in the right channel alone; frequencies beyond the picture have no place in it."""
    from matplotlib.image import imread

    audio = np.stack((0 * tone(rate, hertz=hertz)[0], tone(rate, hertz=hertz)[0]))
    picture, heights = spectrogram_webp(audio, rate, columns=40)
    pixels = imread(io.BytesIO(picture), format="webp")[:, :, :3].astype(float).mean((1, 2))
    assert pixels.argmax() / len(pixels) == pytest.approx(1 - heights[hertz], abs=0.02)
    assert set(heights) == {f for f in (100, 1000, 10000) if f < min(rate, 48000) / 2}
