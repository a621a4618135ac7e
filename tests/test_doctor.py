"""The doctor: what it calls bad, what it only notes, and text encoders that tell no captions apart."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path

import pytest
import torch

from stable_audio_lite import cli, doctor
from stable_audio_lite.bundle import part_path, read_part
from stable_audio_lite.files import save_tensors


def test_mean_cosine_is_between_different_rows() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    assert doctor.mean_pairwise_cosine(rows) == pytest.approx((0 + 2 * 0.5**0.5) / 3)


def test_an_encoder_that_hears_no_words_is_bad(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every token gets the same embedding: captions then differ by their lengths alone."""
    broken = shutil.copytree(tiny_bundle, tmp_path / "broken")
    state = read_part(broken, "text_encoder")
    state["tower.tokens.weight"][:] = state["tower.tokens.weight"][:1]
    save_tensors(part_path(broken, "text_encoder"), state, {})
    assert [finding.state for finding in doctor.text_encoder(tiny_bundle)] == ["ok"]
    assert cli.main(["doctor", str(broken)]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "text features" in line]
    assert line.startswith("bad") and "choose another checkpoint" in line


def test_the_whole_clap_is_asked_where_it_is_there(bundles: dict[str, Path]) -> None:
    assert [f.subject for f in doctor.text_encoder(bundles["clap"])] == ["text features", "text embeddings"]


def test_a_package_outside_its_range_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: ["torch<2.12", "tqdm", "scipy; extra == 'train'"])
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"torch": "2.15.0", "tqdm": "4.70"}[name])
    torch_, tqdm = doctor.packages()
    assert (torch_.state, torch_.found, torch_.advice) == ("bad", "2.15.0", "pip install 'torch<2.12'")
    assert tqdm.state == "ok"


def test_missing_programs_are_noted_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    findings = {finding.subject: finding for finding in doctor.programs()}
    assert findings["fluidsynth"].state == findings["ffmpeg"].state == "note"
    assert "apt-get install fluidsynth" in findings["fluidsynth"].advice


def test_what_is_no_model_is_refused_in_a_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    assert cli.main(["doctor", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
