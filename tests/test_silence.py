"""Silence is not trained on as music: around a piece, within it, and where there is nothing else."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stable_audio_lite.audio.io import write_audio
from stable_audio_lite.data.latents import CachedLatent, LatentCache, LatentMetadata, read_cache
from stable_audio_lite.errors import UserError
from stable_audio_lite.representation import load_latents
from stable_audio_lite.systems import load_model_config
from training import pre_encode
from training.examples import LatentWindows
from training.pre_encode import PreEncodeConfig, silent_stretches, sounding_frames

HOP = 1024


@pytest.mark.parametrize("peak", [1.0, 1e-2])
def test_what_is_60_db_below_the_peak_is_silence(peak: float) -> None:
    """Whatever the file's level; of full scale, nothing below -80 dB sounds."""
    levels = torch.tensor([0.0, 1.0, 1.1e-3, 0.9e-3, 1e-5])
    frames = sounding_frames(peak * levels.repeat_interleave(HOP).expand(2, -1)[:, :-1], HOP)
    assert frames.tolist() == [False, True, peak == 1.0, False, False]
    assert not sounding_frames(torch.full((2, 10), 0.9e-4), HOP).any()
    one_side = torch.zeros(2, 2 * HOP)
    one_side[1, HOP] = -0.5
    assert sounding_frames(one_side, HOP).tolist() == [False, True]


def test_long_silences_are_found_wherever_they_are() -> None:
    sounding = torch.tensor([int(c) for c in "0001001110000011"]).bool()
    assert silent_stretches(sounding, 3) == ((0, 3), (9, 14))
    assert silent_stretches(sounding, 2) == ((0, 3), (4, 6), (9, 14))
    assert silent_stretches(torch.zeros(5).bool(), 3) == ((0, 5),) and silent_stretches(torch.ones(5).bool(), 1) == ()


def data_set(folder: Path, **sounds: np.ndarray) -> Path:
    rows = [{"file_name": f"{name}.wav", "text": name} for name in sounds]
    for name, audio in sounds.items():
        write_audio(folder / f"{name}.wav", audio, 44100)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def noise(frames: int) -> np.ndarray:
    return 0.3 * np.random.default_rng(frames).uniform(-1, 1, (2, frames * HOP))


def quiet(frames: int) -> np.ndarray:
    return np.zeros((2, frames * HOP))


def test_a_piece_begins_and_ends_where_it_sounds(tmp_path: Path, tiny_bundle: Path) -> None:
    """Its latent and timing are those of the music alone; long silence within it is noted, a rest is not."""
    music = np.concatenate((noise(20), quiet(20), noise(21), quiet(100), noise(22)), 1)
    padded = np.concatenate((quiet(50), music, quiet(70)), 1)
    folder = data_set(tmp_path / "data", music=music, padded=padded)
    pre_encode.run(PreEncodeConfig(vae=str(tiny_bundle), data=str(folder), output=str(tmp_path / "latents")))
    latents = load_latents(tiny_bundle, load_model_config(tiny_bundle))
    plain, trimmed = read_cache(tmp_path / "latents", latents.hash)[1]
    assert trimmed.about.seconds_start == plain.about.seconds_start == 0
    assert trimmed.about.seconds == plain.about.seconds == pytest.approx(183 * HOP / 44100)
    assert trimmed.about.silences == plain.about.silences == ((61, 161),)
    torch.testing.assert_close(trimmed.latent, plain.latent, rtol=0, atol=2e-3)  # of float16


def test_silent_files_are_left_out_and_listed(tmp_path: Path, tiny_bundle: Path) -> None:
    folder = data_set(tmp_path / "data", music=noise(20), nothing=quiet(20))
    config = PreEncodeConfig(
        vae=str(tiny_bundle), data=str(folder), output=str(tmp_path / "latents"), max_unreadable=0.5
    )
    pre_encode.run(config)
    latents = load_latents(tiny_bundle, load_model_config(tiny_bundle))
    assert [entry.about.name for entry in read_cache(tmp_path / "latents", latents.hash)[1]] == ["music.wav"]
    (row,) = map(json.loads, (tmp_path / "latents/unreadable.jsonl").read_text().splitlines())
    assert row["file"].endswith("nothing.wav") and "silent" in row["error"]
    with pytest.raises(UserError, match=r"nothing.wav: is silent.*1 of 2 files"):
        pre_encode.run(PreEncodeConfig(vae=str(tiny_bundle), data=str(folder), output=str(tmp_path / "strict")))


def windows_of(folder: Path, frames: int, silences: tuple[tuple[int, int], ...]) -> LatentWindows:
    """Windows of 16 frames of a latent that counts its frames."""
    about = LatentMetadata(
        name="a", captions=("a",), metadata={}, seconds_start=0.0, seconds=frames / 10, silences=silences
    )
    cache = LatentCache(folder, "a hash", 1)
    cache.write(0, [CachedLatent(0, torch.arange(float(frames)).expand(2, -1), about)])
    cache.finish()
    latents = SimpleNamespace(
        hash="a hash", shape=(2, 16), hop=4410, sample_rate=44100, normalise=lambda z: z, silence=torch.zeros(2, 16)
    )
    return LatentWindows([folder], latents)  # type: ignore[arg-type]


def test_no_window_is_mostly_silence_where_there_are_others(tmp_path: Path) -> None:
    silences = ((30, 60), (80, 84))
    windows = windows_of(tmp_path, 100, silences)
    silent = {frame for begin, end in silences for frame in range(begin, end)}
    begins = set()
    for index in range(300):
        window = windows.windows([0], [random.Random(index)])
        begin = round(10 * float(window["seconds_start"]))
        assert window["x0"][0, 0].tolist() == list(range(begin, begin + 16))
        assert len(silent & set(range(begin, begin + 16))) <= 4
        begins.add(begin)
    assert {0, 18, 56, 84} <= begins and not begins & set(range(19, 56))


def test_of_a_sparse_piece_the_fullest_windows_are_drawn(tmp_path: Path) -> None:
    windows = windows_of(tmp_path, 60, ((2, 30), (32, 60)))
    for index in range(50):
        begin = round(10 * float(windows.windows([0], [random.Random(index)])["seconds_start"]))
        assert begin in (0, *range(16, 31))


def test_caches_of_before_have_no_silences(tmp_path: Path) -> None:
    windows = windows_of(tmp_path, 100, ())
    assert windows.entries[0].about.silences == ()
    drawn = windows.windows([0] * 900, map(random.Random, range(900)))
    assert set((10 * drawn["seconds_start"]).round().int().tolist()) == set(range(85))
