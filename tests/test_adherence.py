"""Adherence: which facts captions state, which are right, and that real, wrong and silent sounds are told apart."""

from __future__ import annotations

import functools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from evaluation import adherence, prompt_facts, tagger
from stable_audio_lite.audio.io import read_audio, resample, write_audio
from stable_audio_lite.corpus.captions import captions, facts_told
from stable_audio_lite.corpus.compose import CorpusConfig, compose
from stable_audio_lite.data.manifest import Item, read_items
from stable_audio_lite.errors import UserError
from stable_audio_lite.representation import load_latents
from stable_audio_lite.systems import load_model_config

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


def test_tags_depend_neither_on_level_nor_on_rate_and_survive_noise(trained: tagger.Tagger) -> None:
    """A reed at a pitch that no piece of the corpus has."""
    sound = note("reed", 277.2, 3.0).expand(2, -1)
    faster = torch.from_numpy(resample(sound.numpy(), RATE, 44100))
    noisy = sound + 0.002 * torch.randn(sound.shape, generator=torch.Generator().manual_seed(0))
    for version, rate in ((sound, RATE), (0.01 * sound, RATE), (faster, 44100), (noisy, RATE)):
        tags = trained.tag(version, rate)
        assert tagger.r_precision(tags.instruments, ["reed"]) == tagger.r_precision(tags.families, ["brass"]) == 1
    with pytest.raises(UserError, match="silent"):
        trained.tag(0 * sound, RATE)


def test_a_tagger_learns_from_all_corpora(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(tagger, "train", lambda examples, config, **_: taken.append(len(examples)))
    tagger.train_on_corpus(corpus)
    tagger.train_on_corpus(corpus, corpus)
    assert taken == [18, 36]


def test_a_saved_tagger_hears_the_same(corpus: Path, trained: tagger.Tagger, tmp_path: Path) -> None:
    tagger.save_tagger(trained, tmp_path)
    audio = read_audio(corpus / "held_out/4.wav", RATE)
    assert tagger.load_tagger(tmp_path).tag(audio, RATE) == trained.tag(audio, RATE)
    with pytest.raises(UserError, match="train it again"):
        (tmp_path / "tagger.safetensors").write_bytes(b"nothing")
        tagger.load_tagger(tmp_path)


def test_a_folder_that_is_no_corpus_is_refused(data: Path) -> None:
    with pytest.raises(UserError, match="say nothing of drums, families, instruments, style"):
        tagger.config_for(read_items(data))


def test_r_precision_counts_the_most_probable() -> None:
    found = {"a": 0.9, "b": 0.5, "c": 0.1}
    assert tagger.r_precision(found, ["a"]) == 1 and tagger.r_precision(found, ["c"]) == 0
    assert tagger.r_precision(found, ["a", "c"]) == 0.5 and tagger.r_precision(found, ["b", "a", "b"]) == 1


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
    config = CorpusConfig(items=60, held_out=0, max_seconds=14.0)
    pieces = [compose(config, "train", index) for index in range(60)]
    truths = [{"key": p.key, "mode": p.mode, "bpm": p.bpm, "style": p.style} for p in pieces]
    own = sum(len(facts_told(c, t) - {"drums"}) for p, t in zip(pieces, truths, strict=True) for c in captions(p))
    other = [t | {"key": "C" if t["key"] != "C" else "D", "bpm": t["bpm"] + 1} for t in truths]
    wrong = sum(
        len(facts_told(c, t) & {"key", "tempo"}) for p, t in zip(pieces, other, strict=True) for c in captions(p)
    )
    assert own > 400 and wrong == 0


FOUND = prompt_facts.Analysis(
    seconds=4.0,
    tags=tagger.Tags(
        instruments={"pipe": 0.9, "reed": 0.2}, families={"winds": 0.9, "brass": 0.2}, drums=0.1, style="pop"
    ),
    tempo=61.0,
    tonic="C",
    mode="major",
    end=4.2,
    width=-20.0,
    valley=-40.0,
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


def asked(words: str, **changes: object) -> prompt_facts.HeldOutPrompt:
    return prompt_facts.HeldOutPrompt(item=Item(path="a.wav", metadata=TRUTH | changes), text=words, seconds=4.0)


def test_scores_of_known_answers() -> None:
    """Half the tempo is no right tempo; what the prompt doesn't say isn't asked; silence has nothing right."""
    words = "pipe, pop, 120 bpm, C major, no drums"
    right = prompt_facts.right_facts(FOUND, asked(words), 4.0, -24.0)
    assert right == dict.fromkeys(prompt_facts.FACTS, 1.0) | {"tempo": 0.0}
    few = prompt_facts.right_facts(FOUND, asked("a pipe"), 4.0, -24.0)
    assert set(few) == {"families", "instruments", "end", "width"}
    other = asked(words.replace("j", ""), instruments=["reed"], mode="minor")
    wrong = prompt_facts.right_facts(FOUND, other, 3.0, 0.0)
    assert (wrong["instruments"], wrong["end"], wrong["width"]) == (0, 0, 0)
    silent = replace(FOUND, tags=None, tempo=None, tonic=None, mode=None, end=0.0, width=-100.0)
    assert set(prompt_facts.right_facts(silent, asked(words), 4.0, -24.0).values()) == {0.0}


def coarse_spectrum(audio: torch.Tensor, sample_rate: int) -> torch.Tensor:
    """Stands for a CLAP's embedding of (1, C, T) audio."""
    return torch.fft.rfft(audio.mean(1), 4096).abs()[:, :2048].unflatten(1, (8, 256)).mean(2).log()


@pytest.fixture(scope="module")
def find(trained: tagger.Tagger) -> adherence.Analyser:
    clap = SimpleNamespace(embed_audio=coarse_spectrum)
    return functools.partial(prompt_facts.analyse, sample_rate=RATE, tagger=trained, clap=clap)


@pytest.fixture(scope="module")
def prompts(corpus: Path) -> list[prompt_facts.HeldOutPrompt]:
    return adherence.held_out_prompts(corpus, 6, 5.0)


@pytest.fixture(scope="module")
def recordings(find: adherence.Analyser, prompts: list[prompt_facts.HeldOutPrompt]) -> list[prompt_facts.Analysis]:
    return adherence.analyse_recordings(find, prompts, RATE)[0]


@pytest.fixture(scope="module")
def noise(find: adherence.Analyser, prompts: list[prompt_facts.HeldOutPrompt]) -> list[prompt_facts.Analysis]:
    generator = torch.Generator().manual_seed(0)
    return [find(torch.randn(2, round(r.seconds * RATE), generator=generator), seconds=r.seconds) for r in prompts]


def test_recordings_are_right_and_others_wrong(prompts, recordings, noise) -> None:
    """The pieces' own recordings score as the ceiling does and above the floor; white noise does not."""
    rows = {row.name: row for row in prompt_facts.shares_right(prompts, recordings, recordings)}
    assert set(rows) == set(prompt_facts.FACTS)
    for name, row in rows.items():
        assert row.value == row.ceiling and row.low <= row.value <= row.high and row.n == 6, name
    assert rows["instruments"].value > rows["instruments"].floor
    assert rows["key"].value == rows["end"].value == rows["width"].value == 1
    noisy = {row.name: row.value for row in prompt_facts.shares_right(prompts, recordings, noise)}
    assert noisy["instruments"] < rows["instruments"].value and noisy["width"] == 0


def test_a_sound_is_asked_to_be_as_long_as_its_piece_or_the_window(corpus: Path) -> None:
    assert [prompt.seconds for prompt in adherence.held_out_prompts(corpus, 6, 5.0)] == [3.5] * 6
    assert [prompt.seconds for prompt in adherence.held_out_prompts(corpus, 6, 2.0)] == [2.0] * 6
    with pytest.raises(UserError, match="holds 6 pieces, --items asks for 7"):
        adherence.held_out_prompts(corpus, 7, 5.0)


def test_distances_tell_noise_from_recordings(recordings, noise) -> None:
    """With an embedder of the spectrum's coarse shape; the VAE's distance is that of what it puts out."""
    same = prompt_facts.clap_distances(recordings, recordings, noise)
    assert same.n == 3 and same.generated == same.real and same.vae > 5 * same.real
    assert prompt_facts.clap_distances(recordings, noise, []).generated == same.vae
    assert prompt_facts.clap_distances([replace(r, embedding=None) for r in recordings], noise, []) is None


def sustained(prompts: list[prompt_facts.HeldOutPrompt]) -> list[prompt_facts.HeldOutPrompt]:
    """The same prompts for a flute, a flute with drums, a piano and two flutes, and for the rest nothing known."""
    kinds = [(["flute"], False), (["flute"], True), (["piano"], False), (["flute", "violin"], False)]
    kinds += [(["pipe"], False)] * (len(prompts) - len(kinds))
    return [
        replace(prompt, item=replace(prompt.item, metadata={"instruments": names, "drums": drums}))
        for prompt, (names, drums) in zip(prompts, kinds, strict=True)
    ]


def test_levels_between_partials_are_compared_over_sustained_solos(prompts, recordings, noise) -> None:
    """Noise fills the valleys of steady partials; a decaying instrument, drums and duets don't count."""
    solos = sustained(prompts)
    assert [prompt_facts.is_sustained_solo(prompt) for prompt in solos] == [True] + [False] * 5
    found = prompt_facts.valley_difference(solos, noise, recordings)
    assert found.n == 1 and found.median == pytest.approx(noise[0].valley - recordings[0].valley) and found.median > 20
    flutes = [solos[0]] * 6
    found = prompt_facts.valley_difference(flutes, noise, recordings)
    differences = sorted(a.valley - b.valley for a, b in zip(noise, recordings, strict=True))
    assert found.n == 6 and found.median == pytest.approx(sum(differences[2:4]) / 2)
    assert found.low <= found.median <= found.high
    silent = [replace(sound, valley=math.nan) for sound in noise]
    assert prompt_facts.valley_difference(flutes, silent, recordings) is None


def test_recordings_go_through_the_vae_of_the_bundle(prompts, recordings, tiny_bundle: Path) -> None:
    """They keep their lengths; a VAE that changes nothing scores as the ceiling does and keeps every width."""
    latents = load_latents(tiny_bundle, load_model_config(tiny_bundle))
    audio = read_audio(prompts[0].item.path, latents.sample_rate)
    passed = adherence.through_vae(latents, audio)
    with torch.no_grad():
        whole = latents.vae.decode(latents.vae.encode(audio[None]).mean)[0, :, : audio.shape[1]]
    assert passed.shape == audio.shape
    torch.testing.assert_close(passed, whole, atol=1e-4, rtol=1e-4)
    found = prompt_facts.score_adherence(prompts, recordings, vae=recordings)
    assert found.width_kept == 1 and found.frechet.vae == found.frechet.real and found.frechet.generated is None
    assert all(row.vae == row.ceiling and row.value is None for row in found.measures)
    wider = [replace(sound, width=sound.width + 4) for sound in recordings]
    other = prompt_facts.score_adherence(prompts, recordings, vae=wider)
    assert other.width_kept == 0 and {row.name: row.vae for row in other.measures}["width"] == 1


def test_tables_have_the_columns_of_what_was_measured(prompts, recordings, noise) -> None:
    both = prompt_facts.score_adherence(prompts, recordings, noise, recordings)
    lines = adherence.adherence_table(both).splitlines()
    assert lines[0].split() == ["n", "right", "95", "%", "real", "VAE", "VAE/real", "shuffled"]
    assert "width within 3 dB through the VAE: 100%" in lines
    assert [" times" in line for line in lines[-3:]] == [False, True, True] and "real to real" in lines[-3]
    alone = adherence.adherence_table(prompt_facts.score_adherence(prompts, recordings, vae=recordings))
    assert alone.splitlines()[0].split() == ["n", "real", "VAE", "VAE/real"] and "generated" not in alone
    made = adherence.adherence_table(prompt_facts.score_adherence(prompts, recordings, noise))
    assert made.splitlines()[0].split() == ["n", "right", "95", "%", "real", "shuffled"] and "VAE" not in made


def test_combinations_have_every_value_with_every_other(prompts, recordings) -> None:
    chosen = {"cfg": [1.0, 2.0], "steps": [2, 3]}
    assert [tuple(c.values()) for c in adherence.combinations(chosen)] == [(1.0, 2), (1.0, 3), (2.0, 2), (2.0, 3)]
    assert adherence.combinations({}) == [{}]
    found = prompt_facts.score_adherence(prompts, recordings, recordings)
    line = adherence.combination_line({"cfg": 1.0, "steps": 2}, found, 1.0)
    assert len(line) == len(adherence.combination_heading(chosen))


@pytest.fixture
def command(corpus: Path, trained: tagger.Tagger, tiny_bundle: Path, tmp_path: Path, monkeypatch, capsys):
    """The command on the tiny model with its arguments; returns its exit status, output and errors."""
    tagger.save_tagger(trained, tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        fixed = [str(tiny_bundle), "--corpus", str(corpus), "--tagger", str(tmp_path), "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["adherence", *fixed, *arguments])
        status = adherence.main()
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def test_the_command_measures_a_model_its_vae_alone_and_combinations(command) -> None:
    status, out, _ = command("--items", "4", "--steps", "2", "--json")
    found = json.loads(out)
    assert status == 0 and {row["name"] for row in found["measures"]} == set(prompt_facts.FACTS)
    assert all(0 <= row["value"] <= 1 and 0 <= row["vae"] <= 1 for row in found["measures"])
    status, out, _ = command("--items", "4", "--only-vae", "--json")
    alone = json.loads(out)
    assert status == 0 and [row["vae"] for row in alone["measures"]] == [row["vae"] for row in found["measures"]]
    assert all(row["value"] is None for row in alone["measures"]) and alone["width_kept"] == found["width_kept"]
    status, out, _ = command("--items", "4", "--steps", "2,3")
    assert status == 0 and [line.split()[0] for line in out.splitlines()] == ["steps", "2", "3"]


def test_mistakes_end_in_one_line(command) -> None:
    for arguments, words in (
        (("--items", "3"), "--items must be at least 4"),
        (("--items", "7"), "holds 6 pieces"),
        (("--only-vae", "--sigma-max", "80"), "leave out --sigma-max"),
        (("--cfg", "3,x"), "--cfg: '3,x' is no list"),
        (("--sampler", "magic"), "unknown magic"),
        (("--items", "4", "--steps", "0"), "steps must be at least 1"),
    ):
        status, out, err = command(*arguments)
        lines = [line for line in err.split("\n") if line.startswith("error: ")]
        assert status == 2 and out == "" and len(lines) == 1 and words in lines[0]
