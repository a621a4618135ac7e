"""The probe tells timbres apart through a codec-like filter; the end of a sound is found to a level meter's window."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from evaluation import obedience, probe
from evaluation.hearing import HearingConfig
from stable_audio_lite.audio.io import write_audio
from stable_audio_lite.errors import UserError

RATE = 22050


def tone(pitch: float, partials: list[float], seconds: float = 4.0, rate: int = RATE) -> torch.Tensor:
    """A steady harmonic tone, (2, T)."""
    t = torch.arange(round(seconds * rate)) / rate
    wave = sum(level * torch.sin(2 * math.pi * pitch * n * t) for n, level in enumerate(partials, 1))
    return 0.2 * wave.expand(2, -1).contiguous()


HOLLOW = [1, 0, 0.5, 0, 0.3, 0, 0.2]
FULL = [0.5, 1, 0.8, 1, 0.7, 0.8, 0.6, 0.7]
PITCHES = [196.0, 220.0, 261.6, 293.7, 329.6, 392.0]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for split, detune in (("train", 1.0), ("held_out", 1.04)):
        rows = []
        for name, family, partials in (("pipe", "winds", HOLLOW), ("reed", "brass", FULL)):
            for i, pitch in enumerate(PITCHES):
                file = f"{name}{i}.wav"
                write_audio(folder / split / file, tone(pitch * detune, partials), RATE)
                rows.append({"file_name": file, "instruments": [name], "families": [family], "drums": False})
        rows.append({"file_name": "pipe0.wav", "instruments": ["pipe", "reed"], "families": ["winds", "brass"]})
        (folder / split / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def trained(corpus):
    return probe.train_on_corpus(corpus, steps=20)


def test_only_pieces_for_one_instrument_are_learnt_from(corpus):
    assert len(probe.solo_items(corpus / "train")) == 2 * len(PITCHES)


def test_probe_separates_timbres_that_it_has_not_heard_at_these_pitches(corpus, trained):
    examples = probe.load_examples(probe.solo_items(corpus / "held_out"), trained.config)
    result = probe.accuracy(trained, examples)
    assert result.family >= 0.9 and result.instrument >= 0.9
    assert set(result.by_family) == {"winds", "brass"}


def test_answer_does_not_depend_on_level_or_rate_and_survives_noise(trained):
    sound = tone(277.2, FULL, rate=44100)
    noisy = sound + 0.003 * torch.randn(sound.shape, generator=torch.Generator().manual_seed(0))
    for version in (sound, 0.01 * sound, noisy):
        assert trained.classify(version, 44100).family == "brass"


def test_saved_probe_answers_the_same(trained, tmp_path):
    probe.save_probe(trained, tmp_path)
    sound = tone(250.0, HOLLOW)
    assert probe.load_probe(tmp_path).classify(sound, RATE) == trained.classify(sound, RATE)


def test_silence_and_folders_without_solos_are_refused(trained, tmp_path):
    with pytest.raises(UserError, match="silent"):
        trained.classify(torch.zeros(2, RATE), RATE)
    write_audio(tmp_path / "a.wav", torch.zeros(2, 100), RATE)
    with pytest.raises(UserError, match="no solo pieces"):
        probe.solo_items(tmp_path)


def test_family_probability_is_the_sum_over_its_instruments():
    config = HearingConfig(instruments=("a", "b", "c"), families=("x", "y", "x"))
    logs = torch.tensor([[0.2, 0.5, 0.3]]).log()
    families = probe.Probe(config).family_log_probabilities(logs).exp()
    torch.testing.assert_close(families, torch.tensor([[0.5, 0.5]]))


@pytest.mark.parametrize("end", [0.7, 3.0, 4.0])
def test_sound_end_is_exact_to_a_window_whatever_the_level(end):
    audio = torch.zeros(2, 6 * 44100)
    audio[:, : round(end * 44100)] = tone(440, [1], end, 44100)
    for gain in (1.0, 1e-3):
        assert obedience.sound_end(gain * audio, 44100) == pytest.approx(end, abs=obedience.WINDOW)


def test_noise_below_the_floor_is_not_sound_and_a_quiet_note_above_it_is():
    noise = torch.randn(2, 6 * RATE, generator=torch.Generator().manual_seed(0))
    audio = 10 ** (-50 / 20) * 0.1 * noise
    audio[:, : 3 * RATE] += tone(440, [1], 3.0)
    assert obedience.sound_end(audio, RATE) == pytest.approx(3.0, abs=obedience.WINDOW)
    audio[:, 5 * RATE :] += 10 ** (-30 / 20) * tone(440, [1], 1.0)
    assert obedience.sound_end(audio, RATE) == pytest.approx(6.0, abs=obedience.WINDOW)


def test_sound_end_of_silence_and_of_very_short_audio():
    assert obedience.sound_end(torch.zeros(2, RATE), RATE) == 0
    assert obedience.sound_end(torch.ones(2, 10), RATE) == pytest.approx(10 / RATE)


class FakeModel:
    """Plays a hollow tone of the asked-for length in a window of 6 s, whatever the prompt."""

    def generate(self, prompts, *, seconds=None, seconds_total=None, seed, count):
        audio = torch.zeros(2, 6 * RATE)
        length = round((seconds_total or seconds or 6) * RATE)
        audio[:, :length] = tone(220, HOLLOW, length / RATE)
        items = len(prompts) * count

        class Result:
            sample_rate = RATE
            seeds = list(range(seed, seed + items))

        Result.audio = audio.expand(items, -1, -1)
        return Result


def test_a_silent_sound_is_heard_as_silence(trained, monkeypatch):
    monkeypatch.setattr(obedience, "PROMPTS", (("a pipe", "pipe"),))
    made = FakeModel().generate(["a pipe"], seed=0, count=1)
    made.audio = 0 * made.audio
    silent = SimpleNamespace(generate=lambda *_, **__: made)
    (row,) = obedience.listen(silent, trained, seed=0)
    assert (row.heard_family, row.heard_instrument, row.right) == ("silence", "silence", False)


def test_obedience_counts_right_families_and_endings(trained, monkeypatch):
    monkeypatch.setattr(obedience, "PROMPTS", (("a pipe", "pipe"), ("a reed", "reed")))
    heard = obedience.listen(FakeModel(), trained, seed=3, count=2)
    assert [row.right for row in heard] == [True, True, False, False]
    assert [row.seed for row in heard] == [3, 4, 5, 6]
    ended = obedience.time_endings(FakeModel(), seed=0)
    assert all(row.right for row in ended)
    values = obedience.as_json(heard, ended, None)
    assert values["instruments_right"] == 2 and values["endings_right"] == 2
    assert "right family: 2 of 4" in obedience.as_text(heard, ended, None)


def test_prompts_name_eight_instruments_of_eight_families_that_the_corpus_has():
    from stable_audio_lite.corpus.instruments import INSTRUMENTS

    names = [name for _, name in obedience.PROMPTS]
    assert len({INSTRUMENTS[name].family for name in names}) == len(names) == 8
    assert all(name in prompt.lower() for prompt, name in obedience.PROMPTS)


def test_a_probe_that_lacks_an_instrument_is_refused(trained):
    with pytest.raises(UserError, match="never heard piano"):
        obedience.listen(FakeModel(), trained, seed=0)
