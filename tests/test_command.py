"""Rules that all commands share: paths, what may be written over, one bad file among several, any terminal."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stable_audio_lite import cli
from stable_audio_lite.bundle import check_replaceable
from stable_audio_lite.command import Failures, check_outputs, file_path
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import append_line

ROOT = Path(__file__).parents[1]


def test_paths_know_the_home_folder_and_no_pipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert file_path("~/a.wav") == Path("/somewhere/a.wav") and file_path("a~b") == Path("a~b")
    for wrong in ("-", "", " ", "~nobody at all/a.wav"):
        with pytest.raises(argparse.ArgumentTypeError):
            file_path(wrong)


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "piano", "-o"],
        ["generate", "--prompts"],
        ["encode", "a.wav", "-o"],
        ["decode", "-o", "out"],
        ["restore", "in.wav", "--task", "denoise", "-o"],
        ["corpus"],
        ["evaluate", "made", "real", "-o"],
        ["evaluate", "made", "real", "--cache"],
        ["plan"],
        ["caption"],
        ["train", "music", "-o"],
    ],
    ids=" ".join,
)
def test_no_command_takes_a_dash_for_a_name(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, declared_commands: dict, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        cli.main([*command, "-"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "'-' names no file" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_every_file_that_is_named_is_taken_as_a_path(declared_commands: dict) -> None:
    """Of all subcommands: so that ~ is the home folder and - no name, also of commands that are yet to come."""
    (commands,) = (a.choices for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    named = re.compile("output|files?|prompts|init|room|lora|config|checkpoint|cache|folder|soundfont|keep")
    found = [(name, a) for name, parser in commands.items() for a in parser._actions if named.fullmatch(a.dest)]
    assert len(found) > 20
    for name, action in found:
        assert action.type is file_path or action.type is float, (name, action.dest)  # serve's --keep: seconds


def test_nothing_is_replaced_unasked_and_no_input_ever(tmp_path: Path) -> None:
    source, link, hard, free = (tmp_path / name for name in ("a.wav", "link.wav", "hard.wav", "new/b.wav"))
    source.write_text("original")
    link.symlink_to(source)
    hard.hardlink_to(source)
    check_outputs([free], [source], overwrite=False)
    with pytest.raises(UserError, match="a.wav: is there already"):
        check_outputs([free, source], overwrite=False)
    check_outputs([free, source], overwrite=True)
    for same in (source, link, hard, tmp_path / "new" / ".." / "a.wav"):
        with pytest.raises(UserError, match="is the file that is read"):
            check_outputs([free, same], [source], overwrite=True)
    with pytest.raises(UserError, match="b.wav: is to be written twice"):
        check_outputs([free, tmp_path / "new" / "." / "b.wav"], overwrite=True)
    with pytest.raises(UserError, match="is a folder"):
        check_outputs([tmp_path], overwrite=True)
    loop, nothing = (tmp_path / name for name in ("loop", "nothing"))
    loop.symlink_to(loop)
    nothing.symlink_to(tmp_path / "none")
    for link in (loop, nothing):
        with pytest.raises(UserError, match=f"{link}: is there already"):
            check_outputs([link], [loop], overwrite=False)
        for place in (link / "a.wav", link / "more" / "a.wav"):
            with pytest.raises(UserError, match=r"a\.wav: can't be written \("):
                check_outputs([place], [loop], overwrite=False)
        with pytest.raises(UserError, match=f"{link}: is a file, or a link to nothing"):
            check_replaceable(link)
    assert source.read_text() == "original" and not free.parent.exists()


def test_files_that_fail_are_told_one_by_one_and_in_all(capsys: pytest.CaptureFixture[str]) -> None:
    failures = Failures()
    with failures.of("a.wav"):
        raise UserError("a.wav: broken;\n  mend it")
    with failures.of("b.wav"):
        raise OSError(28, "No space left on device")
    with failures.of("c.wav"):
        pass
    assert failures.status(3) == 2
    lines = capsys.readouterr().err.split("\n")
    assert lines[0] == "error: a.wav: broken; mend it" and lines[1].startswith("error: b.wav: ")
    assert lines[2] == "2 of 3 failed: a.wav, b.wav"
    assert Failures().status(1) == 0 and capsys.readouterr().err == ""
    with pytest.raises(ZeroDivisionError), failures.of("a bug"):
        print(1 / 0)


@pytest.mark.parametrize("module", ["evaluation.run", "evaluation.compare", "evaluation.restoration"])
def test_help_is_printed_on_any_terminal(module: str) -> None:
    """Its text has letters that ASCII lacks."""
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no such device")
def test_a_full_disk_is_named_where_lines_are_added(tmp_path: Path) -> None:
    (tmp_path / "losses.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"losses\.jsonl: can't be written \(No space left"):
        append_line(tmp_path / "losses.jsonl", "{}")


@pytest.mark.parametrize("place", ["/dev/full", "a pipe that nobody reads"])
def test_output_that_goes_nowhere_is_told_by_the_status(place: str) -> None:
    """In one line, or without a word where the reader had enough; never by what the interpreter says at its end."""
    code = "import sys; from stable_audio_lite.command import guarded; sys.exit(guarded(lambda: print('a')))"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | {"PYTHONPATH": str(ROOT)}
    if place == "/dev/full":
        if not Path(place).exists():
            pytest.skip("there is no such device")
        output = os.open(place, os.O_WRONLY)
    else:
        reader, output = os.pipe()
        os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=output, stderr=subprocess.PIPE, text=True, env=environment
    )
    os.close(output)
    full = "error: standard output: can't be written (No space left on device)\n"
    assert (done.returncode, done.stderr) == ((2, full) if place == "/dev/full" else (1, ""))
