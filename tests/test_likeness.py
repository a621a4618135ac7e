"""Likeness to recordings: known cosines, and a model beside itself."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from evaluation import likeness as command
from evaluation.likeness import likeness, likeness_table


def test_likeness_is_the_mean_cosine_to_recordings() -> None:
    recordings = torch.tensor([[3.0, 0.0], [0.0, 0.5]])
    sounds = torch.tensor([[1.0, 0.0], [2.0, 2.0], [-1.0, 0.0]])
    torch.testing.assert_close(likeness(sounds, recordings), torch.tensor([0.5, 0.5**0.5, -0.5]).double())
    torch.testing.assert_close(likeness(recordings, recordings, same=True), torch.zeros(2).double())
    torch.testing.assert_close(
        likeness(sounds[:1].expand(3, -1), sounds[:1].expand(3, -1), same=True).mean().item(), 1.0
    )
    for wrong in (sounds[0], torch.zeros(0, 2)):
        with pytest.raises(ValueError, match="expected"):
            likeness(sounds, wrong)
    with pytest.raises(ValueError, match="expected"):
        likeness(sounds[:1], sounds[:1], same=True)


def test_the_table_has_an_interval_for_each_line() -> None:
    text = likeness_table({"mine": [0.6, 0.8], "starter": [0.1, 0.3]}, [0.5, 0.5])
    lines = text.splitlines()
    assert lines[1].split()[-5:] == ["2", "0.700", "(0.600", "to", "0.800)"]
    assert lines[3].startswith("trained above untrained") and "0.500 (0.500 to 0.500)" in lines[3]


def test_a_model_is_as_like_as_itself(
    tiny_bundle: Path,
    bundles: dict[str, Path],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("one", "other"):
        shutil.copytree(tiny_bundle, tmp_path / name)
        shutil.copy(bundles["clap"] / "audio_encoder.safetensors", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    options = [
        "one",
        str(data),
        "--untrained",
        "other",
        "--items",
        "3",
        "--seconds",
        "0.2",
        "--device",
        "cpu",
        "--json",
    ]
    monkeypatch.setattr(sys, "argv", ["likeness", *options])
    assert command.main() == 0
    found = json.loads(capsys.readouterr().out)
    assert found["one"] == found["other"] and len(set(found["one"])) == 3
    assert len(found["recordings to each other"]) == 6
    monkeypatch.setattr(sys, "argv", ["likeness", *options, "--items", "1"])
    assert command.main() == 2 and "--items must be at least 2" in capsys.readouterr().err
