"""Adherence: what captions say, which answers are right, and that real, wrong and silent sounds are told apart."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from evaluation import adherence, sweep, tagger
from stable_audio_lite.audio.io import read_audio, write_audio
from stable_audio_lite.corpus.captions import captions, facts_told
from stable_audio_lite.corpus.compose import compose
from stable_audio_lite.data.manifest import read_items
from stable_audio_lite.errors import UserError
from stable_audio_lite.pipeline import StableAudio

RATE = 22050
PARTIALS = {"pipe": [1, 0, 0.5, 0, 0.3, 0, 0.2], "reed": [0.5, 1, 0.8, 1, 0.7, 0.8, 0.6, 0.7]}
FAMILIES = {"pipe": "winds", "reed": "brass"}


def note(name: str, pitch: float, seconds: float) -> torch.Tensor:
    time = torch.arange(round(seconds * RATE)) / RATE
    return 0.1 * sum(level * torch.sin(2 * math.pi * pitch * n * time) for n, level in enumerate(PARTIALS[name], 1))


def piece(names: tuple[str, ...], drums: bool, detune: float, seconds: float = 3.5) -> torch.Tensor:
    """Arpeggios of C major at 120 bpm with a beat of noise, panned a little."""
    mono = torch.zeros(round(seconds * RATE))
    for name in names:
        tune = torch.cat([note(name, detune * 261.63 * 2 ** (d / 12), 0.5) for d in (0, 4, 7, 12, 7, 4, 0)])
        mono += tune[: len(mono)]
    if drums:
        burst = 0.3 * torch.randn(1500, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 0, 1500)
        for beat in range(int(2 * seconds)):
            start = round(beat * RATE / 2)
            mono[start : start + 1500] += burst[: len(mono) - start]
    return torch.stack((mono, 0.7 * mono))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    kinds = [(names, drums) for names in (("pipe",), ("reed",), ("pipe", "reed")) for drums in (False, True)]
    for split, tunings in (("train", (0.97, 1.0, 1.03)), ("held_out", (0.99,))):
        rows = []
        for index, (names, drums) in enumerate(kinds * len(tunings)):
            file = f"{index}.wav"
            write_audio(folder / split / file, piece(names, drums, tunings[index // len(kinds)]), RATE)
            words = f"{' and '.join(names)}, pop, 120 bpm, C major, {'with' if drums else 'no'} drums"
            truth = {"instruments": list(names), "families": [FAMILIES[n] for n in names], "drums": drums}
            truth |= {"style": "pop", "key": "C", "mode": "major", "bpm": 120, "seconds": 3.5}
            rows.append({"file_name": file, "text": words} | truth)
        (folder / split / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def trained(corpus: Path) -> tagger.Tagger:
    return tagger.train_on_corpus(corpus, steps=60)


def test_the_tagger_hears_several_instruments_and_drums(corpus: Path, trained: tagger.Tagger) -> None:
    result = tagger.accuracy(trained, read_items(corpus / "held_out"))
    assert result.pieces == 6 and result.instruments >= 0.8 and result.families >= 0.8 and result.drums >= 0.8


def test_a_tagger_learns_from_all_corpora(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(tagger, "train", lambda examples, config, **_: taken.append(len(examples)))
    tagger.train_on_corpus(corpus)
    tagger.train_on_corpus(corpus, corpus)
    assert taken == [18, 36]


def test_a_saved_tagger_hears_the_same(corpus: Path, trained: tagger.Tagger, tmp_path: Path) -> None:
    tagger.save_tagger(trained, tmp_path)
    audio = read_audio(corpus / "held_out/4.wav", RATE)
    assert tagger.load_tagger(tmp_path).hear(audio, RATE) == trained.hear(audio, RATE)
    with pytest.raises(UserError, match="train it again"):
        (tmp_path / "tagger.safetensors").write_bytes(b"nothing")
        tagger.load_tagger(tmp_path)


def test_a_folder_that_is_no_corpus_is_refused(data: Path) -> None:
    with pytest.raises(UserError, match="say nothing of drums, families, instruments, style"):
        tagger.config_for(read_items(data))


def test_shares_count_the_clearest() -> None:
    heard = {"a": 0.9, "b": 0.5, "c": 0.1}
    assert tagger.share_heard(heard, ["a"]) == 1 and tagger.share_heard(heard, ["c"]) == 0
    assert tagger.share_heard(heard, ["a", "c"]) == 0.5 and tagger.share_heard(heard, ["b", "a", "b"]) == 1


@pytest.mark.parametrize(
    ("caption", "told"),
    [
        ("harp in a minor key", {"mode"}),
        ("harp in A minor, 96 bpm", {"key", "mode", "tempo"}),
        ("sad harp with drums, bebop", {"mode", "drums", "style"}),
        ("harp, 196 bpm", set()),
    ],
)
def test_what_captions_say(caption: str, told: set[str]) -> None:
    from stable_audio_lite.corpus.styles import STYLES

    caption = caption.replace("bebop", STYLES["jazz"].words[-1])
    assert facts_told(caption, {"key": "A", "mode": "minor", "bpm": 96, "style": "jazz"}) == told


def test_no_caption_of_the_corpus_says_what_is_not_so() -> None:
    """Facts of one piece are rarely found in the words for another: those that are read are really said."""
    pieces = [compose(0, "train", index, 4.0, 14.0) for index in range(60)]
    truths = [{"key": p.key, "mode": p.mode, "bpm": p.bpm, "style": p.style} for p in pieces]
    own = sum(len(facts_told(c, t) - {"drums"}) for p, t in zip(pieces, truths, strict=True) for c in captions(p))
    other = [t | {"key": "C" if t["key"] != "C" else "D", "bpm": t["bpm"] + 1} for t in truths]
    wrong = sum(
        len(facts_told(c, t) & {"key", "tempo"}) for p, t in zip(pieces, other, strict=True) for c in captions(p)
    )
    assert own > 400 and wrong == 0


HEARD = adherence.Heard(
    tags=tagger.Tags(
        instruments={"pipe": 0.9, "reed": 0.2}, families={"winds": 0.9, "brass": 0.2}, drums=0.1, style="pop"
    ),
    tempo=61.0,
    tonic="C",
    mode="major",
    end=4.2,
    width=-20.0,
)
TRUTH = {
    "instruments": ["pipe"],
    "families": ["winds"],
    "drums": False,
    "style": "pop",
    "key": "C",
    "mode": "major",
    "bpm": 120,
}


def test_scores_of_known_answers() -> None:
    """Half the tempo is no right tempo; what the prompt doesn't say isn't asked; silence has nothing right."""
    words = "pipe, pop, 120 bpm, C major, no drums"
    right = adherence.score(HEARD, TRUTH, words, 4.0, -24.0)
    assert right == dict.fromkeys(adherence.MEASURES, 1.0) | {"tempo": 0.0}
    assert set(adherence.score(HEARD, TRUTH, "a pipe", 4.0, -24.0)) == {"families", "instruments", "end", "width"}
    wrong = adherence.score(HEARD, TRUTH | {"instruments": ["reed"], "mode": "minor"}, words.replace("j", ""), 3.0, 0.0)
    assert (wrong["instruments"], wrong["end"], wrong["width"]) == (0, 0, 0)
    silent = replace(HEARD, tags=None, tempo=None, tonic=None, mode=None, end=0.0, width=-100.0)
    assert set(adherence.score(silent, TRUTH, words, 4.0, -24.0).values()) == {0.0}


def test_recordings_are_right_and_others_wrong(corpus: Path, trained: tagger.Tagger) -> None:
    """The pieces' own recordings score as the ceiling does and above the floor; white noise does not."""
    asked = adherence.requests_of(corpus, 6, 5.0, seed=1)
    asked = [replace(request, seconds=3.5) for request in asked]
    sounds = [read_audio(request.item.path, RATE) for request in asked]
    rows = {row.name: row for row in adherence.measure(trained, asked, sounds, RATE)}
    assert set(rows) == set(adherence.MEASURES)
    for name, row in rows.items():
        assert row.value == row.ceiling and row.low <= row.value <= row.high and row.n == 6, name
    assert rows["instruments"].value > rows["instruments"].floor
    assert rows["key"].value == rows["end"].value == rows["width"].value == 1
    noise = [torch.randn(sound.shape, generator=torch.Generator().manual_seed(0)) for sound in sounds]
    noisy = {row.name: row.value for row in adherence.measure(trained, asked, noise, RATE)}
    assert noisy["instruments"] < rows["instruments"].value and noisy["width"] == 0
    assert "instruments" in adherence.as_text(list(rows.values()), None)


def test_lengths_are_asked_for_from_two_seconds_to_the_window(corpus: Path) -> None:
    asked = adherence.requests_of(corpus, 6, 5.0, seed=1)
    assert all(2 <= request.seconds <= 5 for request in asked) and len({request.seconds for request in asked}) > 3
    with pytest.raises(UserError, match="holds 6 pieces, --items asks for 7"):
        adherence.requests_of(corpus, 7, 5.0, seed=1)


def test_distances_tell_noise_from_recordings(corpus: Path) -> None:
    """With an embedder that hears the spectrum's coarse shape."""

    def embed(audio: torch.Tensor, sample_rate: int) -> torch.Tensor:
        return torch.fft.rfft(audio.mean(1), 4096).abs()[:, :2048].unflatten(1, (8, 256)).mean(2).log()

    asked = adherence.requests_of(corpus, 6, 5.0, seed=1)
    clap = SimpleNamespace(embed_audio=embed)
    recordings = [read_audio(request.item.path, RATE) for request in asked]
    same = adherence.distances(clap, asked, recordings, RATE)
    noise = adherence.distances(clap, asked, [torch.randn(2, 5 * RATE) for _ in asked], RATE)
    assert same.n == 3 and noise.real == same.real and noise.generated > 5 * same.generated


def test_sweeps_change_the_settings_alone(tiny_bundle: Path) -> None:
    """Every combination once; a variant sounds as the model does with those settings; wrong values are refused."""
    chosen = {"cfg": [1.0, 2.0], "steps": [2, 3]}
    assert [tuple(c.values()) for c in sweep.combinations(chosen)] == [(1.0, 2), (1.0, 3), (2.0, 2), (2.0, 3)]
    model = StableAudio.from_pretrained(tiny_bundle, "cpu", "float32")
    variant = sweep.with_settings(model, {"cfg": 2.0, "steps": 2})
    sounds = [
        variant.generate("tone", seconds=0.2, seed=1),
        model.generate("tone", seconds=0.2, seed=1, cfg=2.0, steps=2),
    ]
    assert torch.equal(sounds[0].audio, sounds[1].audio) and model.config.generation.steps != 2
    with pytest.raises(UserError, match="sigma"):
        sweep.with_settings(model, {"sigma_min": -1.0})
    assert len(sweep.line(chosen, [], None, 1.0)) == len(sweep.heading(chosen))
