"""Properties of the corpus: what is composed, what captions claim, what is rendered, and how building resumes."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stable_audio_lite.corpus import render as rendering
from stable_audio_lite.corpus.build import build_corpus
from stable_audio_lite.corpus.captions import MOODS, NO_DRUMS, SHARPS_AS_FLATS, SPEEDS, captions, speed_of
from stable_audio_lite.corpus.compose import TAIL, CorpusConfig, compose
from stable_audio_lite.corpus.harmony import KEYS
from stable_audio_lite.corpus.instruments import GENERIC, INSTRUMENTS, caption_names
from stable_audio_lite.corpus.piece import DRUMS, Piece
from stable_audio_lite.corpus.styles import STYLES, Style
from stable_audio_lite.errors import UserError

needs_synth = pytest.mark.skipif(shutil.which("fluidsynth") is None, reason="fluidsynth is not installed")


def piece_of(index: int, seed: int = 7, split: str = "train", **settings: Any) -> Piece:
    return compose(CorpusConfig(items=1, held_out=0, seed=seed, **settings), split, index)


@pytest.fixture(scope="module")
def pieces() -> list[Piece]:
    return [piece_of(index) for index in range(600)]


def masked(caption: str) -> tuple[str, set[str]]:
    """The caption with instrument words as <I>, and those words (longest match first)."""
    words = sorted({w for name in INSTRUMENTS for w in caption_names(name)}, key=len, reverse=True)
    found: set[str] = set()

    def swap(match: re.Match[str]) -> str:
        found.add(match.group(0).lower())
        return "<I>"

    return re.sub(rf"\b({'|'.join(map(re.escape, words))})\b", swap, caption, flags=re.IGNORECASE), found


def says(text: str, phrase: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(phrase)}(?![\w-])", text, flags=re.IGNORECASE) is not None


def test_same_seed_same_piece_other_index_another() -> None:
    piece = piece_of(5, seed=3)
    assert piece_of(5, seed=3) == piece and captions(piece_of(5, seed=3)) == captions(piece)
    others = [piece_of(5, seed=4), piece_of(5, seed=3, split="held_out"), piece_of(6, seed=3)]
    assert all(other.notes != piece.notes for other in others)


def test_item_does_not_depend_on_the_number_of_items() -> None:
    few, many = CorpusConfig(items=10, held_out=0, seed=1), CorpusConfig(items=9999, held_out=7, seed=1)
    assert all(compose(few, "train", i) == compose(many, "train", i) for i in range(10))


def test_variety(pieces: list[Piece]) -> None:
    assert len(INSTRUMENTS) >= 24 and len(STYLES) >= 10
    assert {name for piece in pieces for name in piece.instruments} == set(INSTRUMENTS)
    assert {p.instruments[0] for p in pieces if len(p.parts) == 1} == set(INSTRUMENTS)
    assert {p.style for p in pieces} == set(STYLES)
    assert {(p.key, p.mode) for p in pieces} == {(key, mode) for key in KEYS for mode in ("major", "minor")}
    assert {len(p.parts) for p in pieces} == {1, 2, 3, 4}
    assert 0.33 < sum(len(p.parts) == 1 for p in pieces) / len(pieces) < 0.47
    assert 60 <= min(p.bpm for p in pieces) < 70 and 170 < max(p.bpm for p in pieces) <= 180
    assert any(abs(part.pan) > 0.4 for p in pieces for part in p.parts)


def test_short_pieces_are_beginnings() -> None:
    """All is over before the end, and what is said to play does."""
    config = CorpusConfig(items=200, held_out=0, seed=7, min_seconds=2, max_seconds=3.9)
    short = [compose(config, "train", index) for index in range(200)]
    assert {len(piece.parts) for piece in short} == {1, 2, 3, 4}
    for piece in short:
        assert 2 <= piece.seconds <= 3.9
        assert max(note.start + note.duration for note in piece.notes) <= piece.seconds - TAIL + 1e-6
        assert max(span.start + span.duration for span in piece.chords) <= piece.seconds - TAIL + 1e-6
        assert min(note.duration for note in piece.notes) > 0
        heard = {note.part for note in piece.notes}
        assert heard - {DRUMS} == set(range(len(piece.parts))) and (DRUMS in heard) == piece.drums


def test_solos_on_request() -> None:
    """Nothing but solos, of every instrument; where up to four may play, the piece is that of the default."""
    solos = [piece_of(index, max_parts=1) for index in range(300)]
    assert {len(piece.parts) for piece in solos} == {1}
    assert {piece.instruments[0] for piece in solos} == set(INSTRUMENTS)
    assert piece_of(5, max_parts=4) == piece_of(5)


def test_a_corpus_of_one_instrument_has_that_alone() -> None:
    pieces = [piece_of(index, max_parts=1, instruments=("piano",), drums=False) for index in range(100)]
    assert {tuple(piece.instruments) for piece in pieces} == {("piano",)} and not any(p.drums for p in pieces)
    assert len({piece.style for piece in pieces}) > 3


def test_tempos_in_steps() -> None:
    """Multiples of ten alone, in every style, and still many of them; a style that has none plays its fastest."""
    pieces = [piece_of(index, tempo_step=10) for index in range(300)]
    assert {piece.bpm % 10 for piece in pieces} == {0} and len({piece.bpm for piece in pieces}) > 8
    assert {piece.style for piece in pieces} == set(STYLES)
    for step, tempo in ((25, 125), (27, STYLES["house"].tempo[1])):
        house = [piece_of(index, tempo_step=step, styles=("house",), min_seconds=8) for index in range(9)]
        assert {piece.bpm for piece in house} == {tempo}


def test_a_smaller_world_has_what_was_chosen_alone() -> None:
    """All chosen instruments and styles are heard, and no more parts than there are instruments for the roles."""
    instruments, styles = ("flute", "piano", "electric bass"), ("jazz", "waltz")
    settings = {"min_seconds": 2, "max_seconds": 12, "max_parts": 3, "instruments": instruments, "styles": styles}
    pieces = [piece_of(index, **settings) for index in range(300)]
    assert {name for piece in pieces for name in piece.instruments} == set(instruments)
    assert {piece.style for piece in pieces} == set(styles)
    assert {len(piece.parts) for piece in pieces} == {1, 2, 3} and {piece.drums for piece in pieces} == {True, False}
    for piece in pieces:
        assert len(set(piece.instruments)) == len(piece.parts)
        assert all(part.role in ("solo", *INSTRUMENTS[part.instrument].roles) for part in piece.parts)
    lines = [piece_of(index, max_seconds=12, instruments=("flute", "violin")) for index in range(100)]
    assert {len(piece.parts) for piece in lines} == {1}  # no two of these can share a line-up's roles


def test_styles_are_well_formed() -> None:
    def patterns(style: Style) -> list[str]:
        return [*style.melody, *style.comp, *style.bassline, *(s for d in style.drums for s in d.values())]

    for style in STYLES.values():
        assert {len(pattern) for pattern in patterns(style)} == {style.beats * 4}, style.name
        assert {*style.lead, *style.chords, *style.bass} <= set(INSTRUMENTS), style.name
        assert 60 <= style.tempo[0] < style.tempo[1] <= 180
    everything = [(s.melody, s.comp, s.bassline) for s in STYLES.values()]
    assert len(set(everything)) == len(everything)


def test_notes_fit_instrument_and_length(pieces: list[Piece]) -> None:
    for piece in pieces:
        for note in piece.notes:
            assert note.start >= 0 and note.duration > 0 and 1 <= note.velocity <= 127
            assert note.start + note.duration <= piece.seconds - TAIL + 1e-3
            if note.part != DRUMS:
                instrument = INSTRUMENTS[piece.parts[note.part].instrument]
                assert instrument.low <= note.pitch <= instrument.high, instrument.name
        assert {n.part for n in piece.notes} == {*range(len(piece.parts)), *([DRUMS] if piece.drums else [])}


@pytest.mark.parametrize("seconds", [4.0, 4.7, 60.0])
def test_every_length_can_be_filled(seconds: float) -> None:
    for index in range(40):
        piece = piece_of(index, seed=0, min_seconds=seconds, max_seconds=seconds)
        assert piece.seconds == seconds
        assert 0.9 < piece.chords[-1].duration < 4
        assert piece.notes[0].start < 3


def test_ends_on_a_held_tonic_after_a_chord_that_leads_there(pieces: list[Piece]) -> None:
    for piece in pieces:
        last, tonic = piece.chords[-1], KEYS.index(piece.key)
        assert last.tones[0] == tonic and piece.chords[-2].tones[0] != tonic
        closing = [n for n in piece.notes if n.start > last.start - 0.025 and n.part != DRUMS]
        held = [n for n in closing if n.start < last.start + 0.5]
        assert {n.part for n in held} == set(range(len(piece.parts))), (piece.index, piece.instruments)
        assert {n.pitch % 12 for n in closing if n.start > last.start + 0.025} <= set(last.tones)


def test_a_pitch_never_overlaps_itself(pieces: list[Piece]) -> None:
    for piece in pieces[:100]:
        free: dict[tuple[int, int], float] = {}
        for note in piece.notes:
            assert note.start >= free.get((note.part, note.pitch), 0.0) - 1e-6
            free[note.part, note.pitch] = note.start + note.duration


def test_timing_and_velocity_breathe_round_the_beat(pieces: list[Piece]) -> None:
    piece = next(p for p in pieces if p.style == "house" and p.drums and p.seconds > 15)
    kicks = [n for n in piece.notes if n.part == DRUMS and n.pitch == 36]
    beat = 60 / piece.bpm
    off = [(n.start - 0.03) / beat - round((n.start - 0.03) / beat) for n in kicks if n.start < piece.seconds * 0.7]
    assert max(abs(o) * beat for o in off) < 0.025 and len({round(o, 4) for o in off}) > 3
    assert len({n.velocity for n in kicks}) > 3


def test_captions_say_nothing_false(pieces: list[Piece]) -> None:
    moods, speeds = {m: set(w) for m, w in MOODS.items()}, {s: set(w) for s, w in SPEEDS.items()}
    for piece in pieces:
        own = {word for name in piece.instruments for word in caption_names(name)}
        for caption in captions(piece):
            text, words = masked(caption)
            assert words <= own, (caption, piece.instruments)
            assert {int(n) for n in re.findall(r"(?<![\w/-])(\d+)(?![\d/])", text)} <= {piece.bpm}, caption
            names = {piece.key, SHARPS_AS_FLATS.get(piece.key, piece.key)}
            assert {k for k, _ in re.findall(r"\b([A-G][#b]?) (major|minor)", text)} <= names, caption
            assert not says(text, "minor" if piece.mode == "major" else "major"), caption
            assert not any(says(text, w) for m, ws in moods.items() if m != piece.mode for w in ws), caption
            assert not any(says(text, w) for s, ws in speeds.items() if s != speed_of(piece.bpm) for w in ws), caption
            denied = any(says(text, phrase) for phrase in NO_DRUMS)
            claimed = re.search(r"drums|drum kit|drum beat|percussion", text) is not None and not denied
            assert not (denied and piece.drums) and not (claimed and not piece.drums), caption
            assert not (says(text, "solo") and len(piece.parts) > 1), caption
            for name, style in STYLES.items():
                assert name == piece.style or not any(says(text, w) for w in style.words), caption


def test_captions_name_the_instruments_lead_first(pieces: list[Piece]) -> None:
    named = 0
    for piece in pieces:
        texts = captions(piece)
        assert len(set(texts)) == 6
        text, words = masked(texts[0])
        assert text.count("<I>") == len(piece.parts), texts[0]
        lead = max((w for w in words if texts[0].lower().startswith(w, text.index("<I>"))), key=len)
        assert lead in caption_names(piece.instruments[0])
        named += sum("<I>" in masked(text)[0] for text in texts[1:])
    assert named / (5 * len(pieces)) > 0.85


def test_captions_have_hundreds_of_phrasings(pieces: list[Piece]) -> None:
    style_words = sorted({w for style in STYLES.values() for w in style.words}, key=len, reverse=True)
    phrasings = set()
    for piece in pieces[:300]:
        for caption in captions(piece):
            text = masked(caption)[0].lower()
            text = re.sub(r"\d+", "<n>", re.sub(r"\b[a-g][#b]? (major|minor)", "<key>", text))
            phrasings.add(re.sub(rf"\b({'|'.join(map(re.escape, style_words))})\b", "<style>", text))
    assert len(phrasings) >= 300


def test_generic_words_have_owners() -> None:
    assert all(owner in INSTRUMENTS for owners in GENERIC.values() for owner in owners)


def test_composing_needs_neither_torch_nor_a_synthesizer() -> None:
    code = "import sys, stable_audio_lite.corpus.build; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_midi_holds_every_note(pieces: list[Piece]) -> None:
    mido = pytest.importorskip("mido")
    for piece in pieces[:5]:
        file = mido.MidiFile(file=io.BytesIO(rendering.to_midi(piece)))
        ons = [m for m in file.tracks[0] if m.type == "note_on"]
        assert len(ons) == len(piece.notes) and abs(file.length - piece.seconds) < 0.002
        assert {m.program for m in file.tracks[0] if m.type == "program_change"} == {
            INSTRUMENTS[name].program for name in piece.instruments
        }


@needs_synth
def test_build_renders_exact_stereo_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np
    import soundfile

    settings: dict[str, Any] = {"held_out": 1, "seed": 5, "max_seconds": 5, "workers": 2, "progress": False}

    def build(folder: str, items: int) -> tuple[int, int]:
        report = build_corpus(tmp_path / folder, items=items, **settings)
        return report.rendered, report.kept

    assert build("one", 2) == (3, 0)
    rows = [json.loads(line) for line in (tmp_path / "one/train/metadata.jsonl").read_text().splitlines()]
    for row in rows:
        sound, rate = soundfile.read(tmp_path / "one/train" / row["file_name"])
        assert rate == 44100 and sound.shape == (round(row["seconds"] * 44100), 2)
        assert -24 < 20 * np.log10(np.sqrt(np.mean(sound**2))) < -18 and np.abs(sound).max() <= 0.9
        assert np.abs(sound[-100:]).max() < 0.002
        events = json.loads((tmp_path / "one/train" / row["notes"]).read_text())
        assert [part["instrument"] for part in events["parts"]] == row["instruments"] and events["notes"]
    assert (tmp_path / "one/held_out/metadata.jsonl").exists()

    # Lost files are made anew with the same bytes; finished ones and the earlier metadata stay as they are.
    first = (tmp_path / "one/train/000000.flac").read_bytes()
    (tmp_path / "one/train/000000.flac").unlink()
    assert build("one", 2) == (1, 2)
    assert (tmp_path / "one/train/000000.flac").read_bytes() == first
    monkeypatch.setattr("stable_audio_lite.corpus.build.render", lambda *_: pytest.fail("rendered again"))
    before = (tmp_path / "one/train/metadata.jsonl").read_bytes()
    assert build("one", 2) == (0, 3)
    assert (tmp_path / "one/train/metadata.jsonl").read_bytes() == before
    with pytest.raises(UserError, match="another seed"):
        build_corpus(tmp_path / "one", items=2, **settings | {"seed": 6})
    said = json.loads((tmp_path / "one/corpus.json").read_text())
    del said["tempo_step"]  # as a corpus from before there was one
    (tmp_path / "one/corpus.json").write_text(json.dumps(said))
    assert build("one", 2) == (0, 3)
    with pytest.raises(UserError, match="another tempo_step"):
        build_corpus(tmp_path / "one", items=2, tempo_step=10, **settings)
    with pytest.raises(UserError, match="another max_parts"):
        build_corpus(tmp_path / "one", items=2, max_parts=1, **settings)


def test_missing_synth_or_soundfont_gives_the_install_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "SOUNDFONTS", ())
    monkeypatch.delenv("SOUNDFONT", raising=False)
    with pytest.raises(UserError, match="apt-get install fluidsynth fluid-soundfont-gm"):
        rendering.find_soundfont()
    with pytest.raises(UserError, match="no/such.sf2"):
        rendering.find_soundfont("no/such.sf2")
    (tmp_path / "own.sf2").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert rendering.find_soundfont("~/own.sf2") == tmp_path / "own.sf2"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="apt-get install fluidsynth.*brew install fluid-synth"):
        build_corpus(tmp_path / "corpus", items=1, held_out=0)
    assert not (tmp_path / "corpus").exists()


@needs_synth
def test_a_broken_soundfont_is_named(tmp_path: Path) -> None:
    font = tmp_path / "broken.sf2"
    font.write_bytes(b"not a soundfont")
    with pytest.raises(UserError, match="broken.sf2"):
        build_corpus(tmp_path / "corpus", items=1, held_out=0, max_seconds=4, soundfont=str(font), progress=False)
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"items": 0}, "items"),
        ({"held_out": -1}, "held_out"),
        ({"min_seconds": 1.9}, "min_seconds"),
        ({"max_seconds": 61}, "max_seconds"),
        ({"max_seconds": float("nan")}, "max_seconds"),
        ({"min_seconds": 20, "max_seconds": 10}, "min_seconds"),
        ({"max_parts": 0}, "max_parts"),
        ({"instruments": ["piano", "kazoo"]}, "instruments: 'kazoo'"),
        ({"instruments": []}, "instruments"),
        ({"instruments": ["piano", "piano"]}, "instruments"),
        ({"styles": ["polka"]}, "styles: 'polka'"),
        ({"max_parts": 5}, "max_parts"),
        ({"tempo_step": 0}, "tempo_step"),
        ({"workers": 0}, "workers"),
        ({"audio_format": "mp3"}, "mp3"),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, change: dict[str, object], names: str) -> None:
    with pytest.raises(UserError, match=names):
        build_corpus(tmp_path / "corpus", **{"items": 1, "held_out": 0, "max_seconds": 5} | change)  # type: ignore[arg-type]


@needs_synth
def test_a_folder_of_other_files_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "music" / "train" / "metadata.jsonl"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(UserError, match="music: holds other files"):
        build_corpus(tmp_path / "music", items=1, held_out=0)
    assert [path.name for path in (tmp_path / "music").iterdir()] == ["train"] and mine.read_text() == "mine"


@needs_synth
def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="file"):
        build_corpus(tmp_path / "file", items=1, held_out=0)
