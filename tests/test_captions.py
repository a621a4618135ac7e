"""Captions in every form that people have them, and what is odd about each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import unicodedata
from pathlib import Path

import mutagen
import numpy as np
import pytest
import soundfile
import torch
from mutagen.id3 import TBPM, TCON, TIT2, TKEY, TPE1
from safetensors.torch import save_file

from stable_audio_lite import cli
from stable_audio_lite.audio.io import read_audio
from stable_audio_lite.data.captions import CaptionTemplate, read_tags
from stable_audio_lite.data.manifest import read_items
from stable_audio_lite.errors import UserError
from stable_audio_lite.weights import read_safetensors


def sound(path: Path) -> Path:
    """A tenth of a second of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(4410), 44100)
    return path


def captions(folder: Path) -> dict[str, tuple[str, ...]]:
    return {Path(str(item.path)).name: item.captions for item in read_items(folder)}


@pytest.mark.parametrize(
    ("name", "contents", "wanted"),
    [
        ("a.txt", b"slow piano", ("slow piano",)),
        ("a.txt", b"\xef\xbb\xbfslow piano\r\n", ("slow piano",)),
        ("a.txt", b"  slow,\r\n\r\n\tsad piano \n", ("slow, sad piano",)),
        ("a.txt", b"a \"loud\" piano, 'so'", ("a \"loud\" piano, 'so'",)),
        ("a.txt", "Füße, 日本, 🎹".encode(), ("Füße, 日本, 🎹",)),
        ("a.TXT", b"slow piano", ("slow piano",)),
        ("a.txt", b"", ()),
        ("a.txt", b" \r\n", ()),
        ("b.txt", b"of another file", ()),
        ("a.json", b'{"text": "slow piano"}', ("slow piano",)),
        ("a.json", b'{"prompt": "slow piano", "seconds_start": 0}', ("slow piano",)),
        ("a.json", b'{"caption": "slow piano"}', ("slow piano",)),
        ("a.json", b'{"description": "slow piano"}', ("slow piano",)),
        ("a.json", b'{"captions": ["slow piano", "piano, slow"], "text": "x"}', ("slow piano", "piano, slow")),
        ("a.json", b'\xef\xbb\xbf{\r\n"prompt": "a \\"loud\\" piano"\r\n}', ('a "loud" piano',)),
        ("a.json", b'{"text": null, "prompt": "slow piano"}', ("slow piano",)),
        ("a.json", b'{"text": "", "prompt": "slow piano"}', ("slow piano",)),
        ("a.json", b'{"text": null}', ()),
        ("a.json", b'{"captions": []}', ()),
        ("a.json", b"{}", ()),
    ],
)
def test_a_text_beside_a_file_is_its_caption(
    tmp_path: Path, name: str, contents: bytes, wanted: tuple[str, ...]
) -> None:
    sound(tmp_path / "a.wav")
    (tmp_path / name).write_bytes(contents)
    assert captions(tmp_path) == {"a.wav": wanted}


@pytest.mark.parametrize(
    ("name", "contents", "words"),
    [
        ("a.txt", "Füße".encode("latin-1"), "a.txt: can't be read as UTF-8"),
        ("a.json", b"{", "a.json: is no JSON"),
        ("a.json", b"", "a.json: is no JSON"),
        ("a.json", 100_000 * b"[", "a.json: is no JSON"),
        ("a.json", b'["slow piano"]', "a.json: is no JSON object"),
        ("a.json", b"null", "a.json: is no JSON object"),
        ("a.json", b'{"prompt": 5}', "a.json: 'text' should be a text"),
        ("a.json", b'{"captions": "slow"}', "a.json: 'text' should be a text and 'captions' a list"),
        ("a.json", b'{"prompt": "\\ud800"}', "a.json: a text is not valid Unicode"),
    ],
)
def test_a_malformed_caption_is_named(tmp_path: Path, name: str, contents: bytes, words: str) -> None:
    sound(tmp_path / "a.wav")
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(UserError, match=words) as caught:
        read_items(tmp_path)
    assert len(str(caught.value)) < 400


def test_json_counts_before_txt_and_keeps_its_other_facts(tmp_path: Path) -> None:
    sound(tmp_path / "a.wav")
    (tmp_path / "a.txt").write_text("from text")
    (tmp_path / "a.json").write_text('{"prompt": "from json", "bpm": 90}')
    assert captions(tmp_path) == {"a.wav": ("from json",)}
    assert read_items(tmp_path)[0].metadata["bpm"] == 90
    (tmp_path / "a.json").write_text('{"bpm": 90}')
    assert captions(tmp_path) == {"a.wav": ("from text",)}
    assert read_items(tmp_path)[0].metadata["bpm"] == 90


def test_lists_count_before_what_lies_beside(tmp_path: Path) -> None:
    sound(tmp_path / "a.wav")
    (tmp_path / "a.txt").write_text("beside")
    (tmp_path / "metadata.csv").write_text('\ufefffile_name,caption\r\na.wav,"a ""loud"" piano, slow"\r\n')
    assert captions(tmp_path) == {"a.wav": ('a "loud" piano, slow',)}
    (tmp_path / "metadata.jsonl").write_bytes('\ufeff{"file_name": "a.wav", "prompt": "first"}\r\n\r\n'.encode())
    assert captions(tmp_path) == {"a.wav": ("first",)}


def test_files_of_one_name_share_a_caption_and_folders_do_not(tmp_path: Path) -> None:
    for name in ("x/a.wav", "x/a.flac", "y/a.wav"):
        sound(tmp_path / name)
    (tmp_path / "x/a.txt").write_text("in x")
    found = {str(item.path.relative_to(tmp_path)): item.captions for item in read_items(tmp_path)}
    assert found == {"x/a.wav": ("in x",), "x/a.flac": ("in x",), "y/a.wav": ()}


def test_accents_may_be_spelled_in_either_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    composed, decomposed = (unicodedata.normalize(form, "Füße é.wav") for form in ("NFC", "NFD"))
    path = sound(tmp_path / decomposed)
    (tmp_path / composed).with_suffix(".txt").write_text("slow")
    assert read_items(tmp_path)[0].captions == ("slow",)
    assert "left out" not in capsys.readouterr().err
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": composed, "text": "listed"}))
    (item,) = read_items(tmp_path)
    assert item.captions == ("listed",) and item.path == path


TAGS = {"title": "Night Ride", "artist": "Ann Bo", "genre": "Jazz", "bpm": "119.6", "key": "Am"}
READ = {"title": "Night Ride", "artist": "Ann Bo", "genre": "Jazz", "bpm": "120", "key": "A minor"}


def tag_id3(path: Path) -> None:
    file = mutagen.File(path)
    if file.tags is None:
        file.add_tags()
    for frame, name in ((TIT2, "title"), (TPE1, "artist"), (TBPM, "bpm"), (TKEY, "key")):
        file.tags.add(frame(encoding=3, text=TAGS[name]))
    file.tags.add(TCON(encoding=3, text="(8)"))  # Jazz, by its number
    file.save()


def tag_comments(path: Path) -> None:
    file = mutagen.File(path)
    for name, text in TAGS.items():
        file[{"key": "INITIALKEY"}.get(name, name)] = text
    file.save()


def tag_mp4(path: Path) -> None:
    file = mutagen.File(path)
    names = {"title": "\xa9nam", "artist": "\xa9ART", "genre": "\xa9gen"}
    for name, tag in names.items():
        file[tag] = TAGS[name]
    file["tmpo"] = [120]
    file["----:com.apple.iTunes:initialkey"] = [b"Am"]
    file.save()


@pytest.mark.parametrize(
    ("suffix", "tag"),
    [
        *[(suffix, tag_id3) for suffix in (".mp3", ".wav", ".aiff")],
        *[(suffix, tag_comments) for suffix in (".flac", ".ogg")],
        (".m4a", tag_mp4),
    ],
)
def test_tags_of_every_kind_of_file(tmp_path: Path, suffix: str, tag: object) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".m4a":
        if not shutil.which("ffmpeg"):
            pytest.skip("ffmpeg is not installed")
        command = ["ffmpeg", "-v", "error", "-i", str(sound(tmp_path / "a.wav")), "-c:a", "aac", str(path)]
        subprocess.run(command, check=True)
    else:
        sound(path)
    assert read_tags(path) == {}
    tag(path)  # type: ignore[operator]
    assert read_tags(path) == READ


def test_odd_tags(tmp_path: Path) -> None:
    """Several values, blanks, placeholders, control characters, a tempo that is none, and a file that is no audio."""
    path = sound(tmp_path / "a.flac")
    file = mutagen.File(path)
    odd = {"title": "Track 01", "artist": "Unknown Artist", "album": " \r\n", "bpm": "fast", "key": "8A"}
    file.update({name: [text] for name, text in odd.items()} | {"genre": ["Dub", "", "Dub", "Ska\r\nPunk"]})
    file.save()
    assert read_tags(path) == {"genre": "Dub, Ska Punk", "key": "8A"}
    for name, key in (("F#m", "F# minor"), ("Bb", "Bb major"), ("d minor", "D minor"), ("Cmaj", "C major")):
        file["key"] = name
        file.save()
        assert read_tags(path)["key"] == key
    (tmp_path / "b.mp3").write_bytes(b"no audio at all" * 100)
    assert read_tags(tmp_path / "b.mp3") == {} and read_tags(tmp_path / "missing.mp3") == {}


def test_a_template_leaves_out_what_is_unknown_or_said_already() -> None:
    template = CaptionTemplate("{genre} music , {folder}, by {artist}, {bpm} bpm, {title}")
    assert template.caption({"genre": "Jazz", "bpm": "90"}) == "Jazz music, 90 bpm"
    assert template.caption({"folder": "Live", "title": "live", "artist": "{genre} %s"}) == "Live, by {genre} %s"
    assert template.caption({}) == template.caption({"genre": ""}) == ""
    assert CaptionTemplate("music, {genre}").caption({"genre": "dub"}) == "music, dub"
    assert CaptionTemplate("music, {genre}").caption({}) == ""


@pytest.mark.parametrize(
    "text", ["", "slow piano", "{", "{}", "{0}", "{mood}", "{bpm:d}", "{title.real}", "{title[0]}", "{title!x}"]
)
def test_a_wrong_template_is_one_line_with_the_fields(text: str) -> None:
    with pytest.raises(UserError, match="template: .*title, artist, album, genre, bpm, key, folder, name"):
        CaptionTemplate(text)


def music(folder: Path) -> Path:
    """A folder with tags, names, a caption beside a file, and a file with none of these."""
    tag_comments(sound(folder / "Slow_Songs/x/01 - one.flac"))
    sound(folder / "02_deep-end.wav")
    sound(folder / "three.wav")
    (folder / "three.txt").write_text("by hand")
    return folder


def test_the_command_shows_then_writes_what_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = music(tmp_path / "My Music")
    wanted = {
        "01 - one.flac": "Jazz, Slow Songs, x, Night Ride, 120 bpm, A minor",
        "02_deep-end.wav": "My Music, deep end",
        "three.wav": "by hand",
    }
    assert cli.main(["caption", str(folder), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{name}: {text}\n" in shown for name, text in wanted.items()) and "nothing is written" in shown
    assert not (folder / "metadata.jsonl").exists()
    assert cli.main(["caption", str(folder)]) == 0
    assert captions(folder) == {name: (text,) for name, text in wanted.items()}
    before = (folder / "metadata.jsonl").read_bytes()
    assert cli.main(["caption", str(folder), "--template", "{name}"]) == 2
    assert "metadata.jsonl: is there already" in capsys.readouterr().err
    assert (folder / "metadata.jsonl").read_bytes() == before
    assert cli.main(["caption", str(folder), "--template", "{name}", "--overwrite"]) == 0
    assert captions(folder) == {"01 - one.flac": ("one",), "02_deep-end.wav": ("deep end",), "three.wav": ("by hand",)}


def test_a_list_elsewhere_leaves_the_folder_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = music(tmp_path / "music")
    before = sorted(folder.rglob("*"))
    assert cli.main(["caption", str(folder), "-o", str(tmp_path / "lists/all.jsonl")]) == 0
    items = read_items(tmp_path / "lists/all.jsonl")
    assert all(item.captions and Path(str(item.path)).is_file() for item in items) and len(items) == 3
    assert sorted(folder.rglob("*")) == before
    (folder / "metadata.csv").write_text("file_name,text\nthree.wav,mine\n")
    assert cli.main(["caption", str(folder)]) == 2
    assert "metadata.csv: is there already" in capsys.readouterr().err


def test_names_that_are_no_utf8_and_pipes_stop_nothing(tmp_path: Path) -> None:
    folder, odd = music(tmp_path / "My Music"), "caf\udce9\n100% {title}.wav"
    try:
        shutil.copy(folder / "three.wav", folder / odd)
    except OSError:
        pytest.skip("this system has no such names")
    os.mkfifo(folder / "pipe.wav")
    assert cli.main(["caption", str(folder)]) == 0
    items = {item.path.name: item for item in read_items(folder)}
    assert len(items) == 5 and items["pipe.wav"].captions == ("My Music, pipe",)
    assert read_audio(items[odd].path).any() and "100% {title}" in items[odd].captions[0]
    save_file({"a": torch.zeros(1)}, tmp_path / "caf\udce9.safetensors")
    with pytest.raises(UserError, match="its name is not valid UTF-8; rename it"):
        read_safetensors(tmp_path / "caf\udce9.safetensors")


def test_many_files_show_ten_and_those_without_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(12):
        path = sound(tmp_path / f"{number:02d}.flac")
        if number:
            tag_comments(path)
    assert cli.main(["caption", str(tmp_path), "--dry-run", "--template", "{genre}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "00.flac: (no caption)" and lines[9] == "09.flac: Jazz"
    assert lines[10:] == [
        "1 of 12 files get no caption, such as 00.flac",
        "12 files; nothing is written yet (leave out --dry-run)",
    ]
    assert cli.main(["caption", str(tmp_path), "--template", "{album}"]) == 2
    assert "no file has a tag for '{album}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["nowhere"], "no such folder"), (["."], "holds no audio"), ([".", "-o", "a.csv"], "must end in .jsonl")],
)
def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["caption", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
