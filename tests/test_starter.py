"""The shipped starter: it loads alone, makes sound of the asked length, and fits in a small download."""

from __future__ import annotations

import pytest
import torch

from stable_audio_lite.bundle import SHIPPED
from stable_audio_lite.pipeline import StableAudio

MEGABYTE = 2**20


@pytest.fixture(scope="module")
def starter() -> StableAudio:
    return StableAudio.from_pretrained("starter")


def test_generates_sound_of_the_asked_length(starter: StableAudio) -> None:
    result = starter.generate("solo piano", seconds=3, seed=1, steps=8)
    assert result.audio.shape == (1, 2, 3 * 44100)
    assert result.audio.isfinite().all()
    assert 0.003 < float(result.audio.square().mean().sqrt()) < 0.5
    assert not torch.equal(result.audio[0, 0], result.audio[0, 1])  # stereo


def test_same_alone_and_in_a_batch(starter: StableAudio) -> None:
    starter.to(torch.device("cpu"), torch.float32)
    prompts = ["solo piano", "drums and bass, fast"]
    both = starter.generate(prompts, seconds=1, seed=5, steps=4)
    alone = starter.generate(prompts[1], seconds=1, seed=6, steps=4)
    torch.testing.assert_close(both.audio[1], alone.audio[0], atol=1e-3, rtol=0)


def test_is_small_and_has_a_card() -> None:
    assert sum(file.stat().st_size for file in SHIPPED["starter"].iterdir()) < 70 * MEGABYTE
    assert "\n# Starter" in (SHIPPED["starter"] / "README.md").read_text()
