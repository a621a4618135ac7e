"""Retrieval from the command line, and what can't be asked."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from evaluation import retrieval


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["retrieval", *arguments])
    return retrieval.main()


def test_figures_of_a_few_pieces(
    bundles: dict[str, Path], data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Recall at 10 of fewer than 10 pieces is certain; the same is printed as text."""
    run(monkeypatch, str(bundles["clap"]), str(data), "--json", "--items", "5")
    figures = json.loads(capsys.readouterr().out)
    assert figures["items"] == 5 and figures["text_to_audio/R@10"] == figures["audio_to_text/R@10"] == 100
    assert -1 <= figures["texts/cosine"] <= 1 and figures["text_to_audio/R@1"] <= 100
    run(monkeypatch, str(bundles["clap"]), str(data), "--items", "5")
    assert f"{figures['text_to_audio/R@1']:.1f} %" in capsys.readouterr().out


def test_what_can_not_be_asked(
    bundles: dict[str, Path], data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, str(bundles["vae"]), str(data)) == 2
    assert "no text_encoder" in capsys.readouterr().err
    for items in ("1", "-1"):
        assert run(monkeypatch, str(bundles["clap"]), str(data), "--items", items) == 2
        assert "two are needed" in capsys.readouterr().err
