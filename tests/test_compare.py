"""Results as files, and side by side: what differs, what may be chance, what can't be compared."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evaluation.compare import best, comparison_table, differ
from evaluation.result import MetricValue, Neighbour, Result, SoundRecord, load_result, result_table, save_result
from stable_audio_lite.errors import UserError

ROOT = Path(__file__).parents[1]


def figure(
    value: float, spread: float = 0.1, name: str = "fd_clap", better: bool | None = False, n: int = 50
) -> MetricValue:
    return MetricValue(name=name, value=value, low=value - spread, high=value + spread, n=n, higher_is_better=better)


def result(*metrics: MetricValue, model: str = "a", **settings: object) -> Result:
    return Result(
        model=model, settings={"resampler": "soxr HQ", "weights": {"clap": "12ab"}} | settings, metrics=metrics
    )


def compare(*paths: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "evaluation.compare", *map(str, paths)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")


def test_figures_differ_beyond_the_joint_error() -> None:
    """As often as the level says: of pairs that are the same, 5 % differ."""
    assert differ(figure(1.0), figure(1.15)) and not differ(figure(1.0), figure(1.14))
    assert differ(figure(1.15), figure(1.0)) and differ(figure(1, 0), figure(1.01, 0))
    rng = np.random.default_rng(0)
    pairs = rng.standard_normal((4000, 2))
    wrong = [differ(figure(a, 1.96), figure(b, 1.96)) for a, b in pairs]
    assert np.mean(wrong) == pytest.approx(0.05, abs=0.01)
    unknown = MetricValue(name="x", value=1, low=float("nan"), high=float("nan"), n=1)
    assert not differ(unknown, figure(9))


def test_the_best_is_bold_and_what_may_be_chance_is_marked() -> None:
    results = [
        result(
            figure(2.0),
            figure(0.5, name="clap_score", better=True),
            replace(figure(-9, name="width", better=None), unit="windows"),
        ),
        result(figure(1.0), figure(0.45, name="clap_score", better=True, n=20), figure(-7, name="width", better=None)),
        result(figure(1.1), figure(0.2, name="on_time", better=True), model="b|`<script>`"),
    ]
    lines = comparison_table(results, [Path("x.json"), Path("y.json"), Path("z.json")]).splitlines()
    assert lines[0] == r"| metric | a (x.json) | a (y.json) | b\|\`&lt;script&gt;\` |"
    assert lines[2] == r"| fd\_clap ↓ (n = 50) | 2 [1.9, 2.1] | **1** [0.9, 1.1] | 1.1 [1, 1.2] ≈ |"
    assert lines[3].startswith(
        r"| clap\_score ↑ | **0.5** [0.4, 0.6], n = 50 | 0.45 [0.35, 0.55], n = 20 ≈ | not measured"
    )
    assert lines[4].startswith("| width (n = 50 windows) | -9 [-9.1, -8.9] | -7 [-7.1, -6.9] | not measured |")
    tied = comparison_table([result(figure(1.0)), result(figure(1.0))], [Path("x.json"), Path("y.json")])
    assert "| **1** [0.9, 1.1] | **1** [0.9, 1.1] ≈ |" in tied
    assert "**" not in lines[4] and best([results[0].metric("width")]) is None
    assert "not significantly different" in lines[-1]


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json", tmp_path / "c.json"]
    save_result(result(figure(1.0)), paths[0])
    save_result(result(figure(2.0), model="b"), paths[1])
    save_result(result(figure(1.0), resampler="sinc", weights={"clap": "34cd"}, extra=1), paths[2])
    done = compare(*paths[:2])
    assert done.returncode == 0 and "| metric | a | b |" in done.stdout and "**1**" in done.stdout
    done = compare(*paths)
    assert done.returncode != 0 and done.stdout == "" and done.stderr.count("\n") == 1
    for words in ("resampler (soxr HQ, sinc)", "weights.clap (12ab, 34cd)", "extra (not there, 1)", "c.json"):
        assert words in done.stderr
    assert compare(paths[0]).stderr == "error: give at least two results to compare\n"


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    """Names that are no UTF-8 and nested settings included."""
    sound = SoundRecord(
        path="bad\udcff.wav", seconds=1.5, sample_rate=8000, channels=1, treatment=("mono",), prompt="é <b>",
        requested=2.0, measurements={"end": 1.0}, nearest=(Neighbour("t.wav", 0.5),),
    )  # fmt: skip
    stored = Result(
        model="m",
        settings={"a": {"b": [1, 2]}},
        metrics=(figure(1.0),),
        missing={"fd_openl3": "fetch it"},
        generated=(sound,),
        left_out={"bad\udcfe.wav": "no audio"},
        origin={"device": "cpu"},
        tables={"timing": ({"n": 1},)},
    )
    save_result(stored, tmp_path / "r.json")
    assert load_result(tmp_path / "r.json") == stored


def test_a_single_sound_has_no_interval(tmp_path: Path) -> None:
    """It comes back from JSON, which has no NaN, and nothing is said to differ from it."""
    lone = replace(figure(1.0, n=1), low=math.nan, high=math.nan)
    table = {"calibration": ({"value": math.inf, "n": 1},)}
    save_result(replace(result(lone), tables=table), tmp_path / "r.json")
    strict = json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)
    assert strict["metrics"][0]["low"] is None and strict["tables"]["calibration"] == [{"value": None, "n": 1}]
    (found,) = load_result(tmp_path / "r.json").metrics
    assert found.value == 1 and math.isnan(found.low) and math.isnan(found.high) and not found.has_interval
    line = comparison_table([result(found), result(figure(9.0, n=1))], [Path("x.json"), Path("y.json")]).splitlines()[2]
    assert line == r"| fd\_clap ↓ (n = 1) | **1** | 9 [8.9, 9.1] ≈ |"
    assert "nan" not in result_table(result(found))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data.pop("metrics"), "missing key 'metrics'"),
        (lambda data: data.update(format=9), "another version"),
        (lambda data: data["metrics"][0].update(value="high"), "value' must be float, got 'high'"),
        (lambda data: data["metrics"][0].pop("n"), r"missing key 'metrics\[0\].n'"),
        (lambda data: data.update(metrics=[3]), "must be a mapping"),
        (lambda data: data.update(generated=[{"path": "a"}]), r"missing key 'generated\[0\].seconds'"),
        (lambda data: data.update(missing={"a": 1}), "'missing.a' must be str"),
        (lambda data: data.update(origin={"a": 1}), "'origin.a' must be str"),
        (lambda data: data.update(tables={"t": [1]}), r"'tables.t\[0\]' must be a mapping"),
        (lambda data: data.update(tables=[]), "'tables' must be a mapping"),
        (lambda data: data.update(settings=3), "'settings' must be a mapping"),
        (lambda data: data.update(surprise=3), "surprise"),
    ],
)
def test_damaged_results_are_named(change: object, words: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    save_result(result(figure(1.0)), path)
    data = json.loads(path.read_text())
    change(data)  # type: ignore[operator]
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=words) as caught:
        load_result(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_no_results_end_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text("no JSON")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    for name in ("text.json", "list.json", "bytes.json", "none.json", "."):
        with pytest.raises(UserError, match="evaluation.run"):
            load_result(tmp_path / name)
    done = compare(tmp_path / "none.json", tmp_path / "text.json")
    assert done.returncode == 2 and done.stderr.count("error: ") == 2 and "2 of 2 failed" in done.stderr
    for name in ("a", "b"):
        save_result(result(figure(1.0), model=name), tmp_path / f"{name}.json")
    done = compare(tmp_path / "a.json", tmp_path / "text.json", tmp_path / "b.json")
    assert done.returncode == 2 and "| metric | a | b |" in done.stdout and "1 of 3 failed" in done.stderr
