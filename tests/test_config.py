"""YAML with a base: what differs takes the base's place, and mistakes name the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from stable_audio_lite.cli import main
from stable_audio_lite.config import read_yaml
from stable_audio_lite.errors import UserError


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.mark.parametrize("name", ["complex_stft/tiny", "complex_stft/tiny.yaml", "configs/complex_stft/tiny.yaml"])
def test_shipped_configs_are_found_by_name_from_any_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """A file of that name comes first; what is nowhere is told."""
    monkeypatch.chdir(tmp_path)
    assert read_yaml(name)["kind"] == "complex_stft" and main(["info", name]) == 0
    assert "complex_stft" in capsys.readouterr().out
    own = tmp_path / name
    own.parent.mkdir(parents=True)
    own.write_text("mine: 1")
    assert read_yaml(name) == {"mine": 1}
    with pytest.raises(UserError, match="complex_stft/none: can't be read"):
        read_yaml("complex_stft/none")


def test_mappings_are_merged_and_values_replaced(tmp_path: Path) -> None:
    base = "a: 1\nlist: [1, 2]\nrun: {steps: 5, seed: 1}\nvae: {kind: one, width: 3}\n"
    write(tmp_path, base=base, child="base: base.yaml\nlist: [3]\nrun: {steps: 9}\nvae: {width: 4}\n")
    expected = {"a": 1, "list": [3], "run": {"steps": 9, "seed": 1}, "vae": {"kind": "one", "width": 4}}
    assert read_yaml(tmp_path / "child.yaml") == expected


def test_another_kind_takes_nothing_over(tmp_path: Path) -> None:
    write(tmp_path, base="vae: {kind: one, width: 3}", child="base: base.yaml\nvae: {kind: two, depth: 1}")
    assert read_yaml(tmp_path / "child.yaml") == {"vae": {"kind": "two", "depth": 1}}


def test_bases_are_found_beside_their_file_and_have_bases(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, first="a: 1\nb: 1\nc: 1", second="base: first.yaml\nb: 2\nc: 2")
    write(tmp_path / "sub", third="base: ../second.yaml\nc: null")
    assert read_yaml(tmp_path / "sub/third.yaml") == {"a": 1, "b": 2, "c": None}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: none.yaml", "none.yaml: can't be read"),
        ("base: 3", "child.yaml: key 'base' must be the name of a YAML file, got 3"),
        ("lr: .nan", "child.yaml: key 'lr' must be a finite number, got nan"),
        ("a: [1, {b: -.inf}]", r"child.yaml: key 'a\.1\.b' must be a finite number, got -inf"),
        ("a: &a [*a, .inf]", "child.yaml: key 'a.1' must be a finite number, got inf"),
        ("base: child.yaml", "child.yaml: key 'base' goes round in a circle"),
    ],
)
def test_mistakes_name_the_file(tmp_path: Path, text: str, words: str) -> None:
    write(tmp_path, child=text)
    with pytest.raises(UserError, match=words):
        read_yaml(tmp_path / "child.yaml")
