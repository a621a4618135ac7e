"""Curves of runs: rows of restarts, slopes with known answers, mistakes in one line."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from stable_audio_lite.errors import UserError
from training.curves import draw, read_curves

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that was killed after step 63 and went on from step 32; its loss falls by 0.1 with every doubling."""
    steps = [*range(64), *range(32, 256)]
    rows = [{"step": s, "loss/v": 9.0 if i == 40 else 2 - 0.1 * math.log2(s + 1)} for i, s in enumerate(steps)]
    rows += [{"step": s, "held_out/v": 1.0 - s / 1000} for s in (49, 99)]
    (tmp_path / "losses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_later_rows_replace_earlier_ones(run: Path) -> None:
    (loss,) = read_curves(run, ["loss/v"])
    assert loss.steps.tolist() == list(range(1, 257))
    assert loss.values.max() == 2.0  # not 9: that step was done again
    assert loss.per_doubling() == pytest.approx(-0.1)
    assert loss.smooth()[128] == pytest.approx(loss.values[128 - 12 : 128 + 13].mean())


def test_held_out_figures_are_the_default(run: Path) -> None:
    (curve,) = read_curves(run)
    assert (curve.figure, curve.steps.tolist()) == ("held_out/v", [50, 100])


def test_mistakes_are_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no loss/x; it has held_out/v, loss/v"):
        read_curves(run, ["loss/v", "loss/x"])
    (run / "losses.jsonl").write_text('{"step": 1}\n[]\n')
    with pytest.raises(UserError, match="line 2"):
        read_curves(run)
    with pytest.raises(UserError, match=r"a\.jpg.*written as \.png"):
        draw(tmp_path / "a.jpg", [])
    with pytest.raises(UserError, match="none.*can't be read"):
        read_curves(tmp_path / "none")


def test_command_prints_and_draws(run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "training.curves", str(run), "-o", str(tmp_path / "a.png")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "held_out/v" in done.stdout and "0.951 at 50" in done.stdout
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
