"""What is heard in sounds whose answers are known, and what a set of them amounts to."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from evaluation.metrics.bootstrap import interval
from evaluation.metrics.description import STRETCHES, describe_sound, novelty
from evaluation.metrics.levels import METER_WINDOW, loudness, sound_end
from evaluation.metrics.similarity import diversity, nearest_sounds, vendi_score
from evaluation.metrics.summary import summarise
from evaluation.result import MetricValue, Neighbour, SoundRecord

RATE = 22050
STRUCTURE = ("intro", "development", "outro")


def tone(hertz: float, seconds: float, level: float = 0.2) -> torch.Tensor:
    time = torch.arange(round(seconds * RATE)) / RATE
    return (level * torch.sin(2 * math.pi * hertz * time)).expand(2, -1)


def noise(seconds: float, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(2, round(seconds * RATE), generator=torch.Generator().manual_seed(seed))


def test_loudness_is_that_of_the_standard() -> None:
    """EBU Tech 3341: a stereo sine of 1 kHz at -23 dBFS reads -23 LUFS, however loud; one channel 3 dB less."""
    for level in (-23.0, -6.0, 6.0):
        sine = tone(1000, 2, 10 ** (level / 20))
        assert loudness(sine, RATE) == pytest.approx(level, abs=0.1)
        one = torch.stack((sine[0], 0 * sine[1]))
        assert loudness(one, RATE) == pytest.approx(level - 3.01, abs=0.1)
    assert loudness(tone(1000, 0.3), RATE) == -math.inf


@pytest.mark.parametrize("end", [0.7, 3.0, 4.0])
def test_sound_end_is_exact_to_a_window_whatever_the_level(end: float) -> None:
    audio = torch.zeros(2, 6 * RATE)
    audio[:, : round(end * RATE)] = tone(440, end)
    for gain in (1.0, 1e-3):
        assert sound_end(gain * audio, RATE) == pytest.approx(end, abs=METER_WINDOW)


def test_noise_below_the_floor_is_not_sound_and_a_quiet_note_above_it_is() -> None:
    audio = 10 ** (-50 / 20) * noise(6)
    audio[:, : 3 * RATE] += tone(440, 3)
    assert sound_end(audio, RATE) == pytest.approx(3.0, abs=METER_WINDOW)
    audio[:, 5 * RATE :] += 10 ** (-30 / 20) * tone(440, 1)
    assert sound_end(audio, RATE) == pytest.approx(6.0, abs=METER_WINDOW)


def test_sound_end_of_silence_and_of_very_short_audio() -> None:
    assert sound_end(torch.zeros(2, RATE), RATE) == 0
    assert sound_end(torch.ones(2, 10), RATE) == pytest.approx(10 / RATE)


def test_silent_and_short_sounds_lack_what_they_lack() -> None:
    assert describe_sound(torch.zeros(2, RATE), RATE) == {"end": 0.0}
    assert set(describe_sound(noise(0.2), RATE)) == {"end", "width"}
    assert set(describe_sound(noise(1), RATE)) == {"end", "width", "level"}
    assert set(describe_sound(noise(4), RATE)) == {"end", "width", "level", *STRUCTURE}


def test_silence_at_the_end_is_no_outro() -> None:
    """What is heard belongs to the sound, wherever its file ends."""
    sound = torch.cat((noise(4), 0.4 * noise(2, 1)), 1)
    padded = torch.cat((sound, torch.zeros(2, 5 * RATE)), 1)
    plain, longer = describe_sound(sound, RATE), describe_sound(padded, RATE)
    assert longer["end"] == pytest.approx(plain["end"], abs=0.06)
    assert longer == pytest.approx(plain, abs=0.3)


@pytest.mark.parametrize("rate", [RATE, 48000])
def test_novelty_peaks_where_the_sound_changes_and_nowhere_else(rate: int) -> None:
    """At a change of 12 dB in every band, less what noise itself changes; steady noise has none."""
    parts = [torch.randn(2, seconds * rate, generator=torch.Generator().manual_seed(0)) for seconds in (3, 5)]
    curve = novelty(torch.cat((parts[0], 10 ** (-12 / 20) * parts[1]), 1), rate)
    peak = int(curve.nan_to_num(0.0).argmax())
    assert abs(peak - STRETCHES * 3 / 8) <= 1
    assert 9.5 < float(curve[peak]) < 12
    assert float(curve[STRETCHES * 6 // 8 :].nan_to_num(0.0).abs().max()) < 0.3
    assert float(novelty(0.01 * parts[1], rate).nan_to_num(0.0).abs().max()) < 0.3


@pytest.mark.parametrize(("part", "at"), [("intro", 1.6), ("development", 4.0), ("outro", 6.8)])
def test_a_change_is_found_in_its_part_of_the_sound(part: str, at: float) -> None:
    heard = describe_sound(torch.cat((tone(440, at), tone(1300, 8 - at)), 1), RATE)
    assert heard[part] > 5 and max(heard[name] for name in STRUCTURE if name != part) < heard[part] / 2


def sound(
    end: float, requested: float | None = None, *, width: float = -10.0, prompt: str = "", path: str = "a.wav"
) -> SoundRecord:
    heard = {"end": end, "width": width, "level": -20.0}
    return SoundRecord(
        path=path, seconds=10.0, sample_rate=RATE, channels=2, prompt=prompt, requested=requested, measurements=heard
    )


def by_name(figures: list[MetricValue]) -> dict[str, MetricValue]:
    return {figure.name: figure for figure in figures}


def test_timing_counts_ends_within_half_a_second() -> None:
    """Two of four are right; recordings end with their files; with each other's lengths none is right."""
    made = [sound(2.3, 2.0), sound(4.6, 4.0), sound(6.0, 6.0), sound(9.0, 8.0)]
    figures, tables = summarise(made, [sound(9.9), sound(9.0)])
    found = by_name(figures)
    assert found["on_time"].value == 0.5 and found["on_time"].n == 4
    assert found["on_time"].baselines == {"real": 0.5, "shuffled lengths": 0.0}
    assert found["timing_error"].value == pytest.approx((0.3 + 0.6 + 0 + 1) / 4)
    assert found["timing_error"].low <= found["timing_error"].value <= found["timing_error"].high
    assert [row["on_time"] for row in tables["timing"]] == [1, 0, 1, 0]
    assert [(row["requested_from"], row["requested_to"]) for row in tables["timing"]] == [
        (2, 3),
        (4, 5),
        (6, 7),
        (8, 9),
    ]
    cells = {(row["requested_from"], row["measured_from"]): row["n"] for row in tables["timing_histogram"]}
    assert cells == {(2, 2): 1, (4, 4): 1, (6, 6): 1, (8, 9): 1}


def test_shuffled_lengths_are_those_of_all_others() -> None:
    """Also where sounds come in rounds, so that half the list further the same length is asked for again."""
    made = [sound(2.0, 2.0), sound(4.0, 4.0)] * 2
    found = by_name(summarise(made, [])[0])
    assert found["on_time"].value == 1 and found["on_time"].baselines == {"shuffled lengths": 0.0}
    assert found["timing_error"].baselines == {"shuffled lengths": 2.0}


def test_shuffled_widths_are_those_of_other_recordings() -> None:
    """Also where each recording's prompt has several sounds; of a single recording there are no others."""
    real = [sound(1, width=-5, prompt="a", path="x/1.wav"), sound(1, width=-30, prompt="b", path="x/2.wav")]
    made = [sound(1, width=-5, prompt="a"), sound(1, width=-30, prompt="b")] * 2
    found = by_name(summarise(made, real)[0])["width_right"]
    assert found.value == 1 and found.baselines == {"shuffled": 0.0}
    assert by_name(summarise(made[:1], real[:1])[0])["width_right"].baselines == {}


def test_the_histogram_counts_every_sound_once() -> None:
    rng = np.random.default_rng(0)
    for longest in (3, 12, 95, 5000):
        made = [sound(float(e), float(r)) for e, r in zip(*rng.uniform(0, longest, (2, 50)), strict=True)]
        tables = summarise(made, [])[1]
        assert sum(row["n"] for row in tables["timing_histogram"]) == 50
        assert len({row["requested_from"] for row in tables["timing_histogram"]}) <= 10
        for row in tables["timing_histogram"]:
            assert row["requested_to"] - row["requested_from"] == row["measured_to"] - row["measured_from"]


def test_width_is_right_beside_the_recording_of_the_same_prompt() -> None:
    """Within 6 dB of its partner, the first of its prompt, or of its name without one; mono counts as -40 dB."""
    real = [sound(1, width=-5, prompt="a", path="x/1.wav"), sound(1, width=-30, prompt="b", path="x/2.wav")]
    real.append(sound(1, width=-100, prompt="a", path="x/3.wav"))
    made = [
        sound(1, width=-8, prompt="a", path="y/2.wav"),
        sound(1, width=-8, prompt="b", path="y/1.wav"),
        sound(1, width=-100, prompt="c", path="y/1.wav"),
        sound(1, width=-35, path="y/2.wav"),
    ]
    found = by_name(summarise(made, real)[0])
    assert found["width_right"].value == pytest.approx(2 / 3) and found["width_right"].n == 3
    assert found["width"].value == pytest.approx(-(8 + 8 + 40 + 35) / 4)
    assert found["width"].baselines == {"real": -25}


def test_nothing_is_said_of_what_was_not_measured() -> None:
    figures, tables = summarise([replace(sound(1.0), measurements={"end": 1.0})], [])
    assert figures == [] and tables == {} and summarise([], []) == ([], {})


def test_nearest_cosines_stand_beside_those_of_recordings() -> None:
    made = [
        replace(sound(1), nearest=(Neighbour("t.wav", 0.9), Neighbour("u.wav", 0.1))),
        replace(sound(1), nearest=(Neighbour("t.wav", 0.7),)),
    ]
    found = by_name(summarise(made, [replace(sound(1), nearest=(Neighbour("t.wav", 0.5),))])[0])
    assert found["nearest_training"].value == pytest.approx(0.8)
    assert found["nearest_training"].baselines == {"real": 0.5}


def test_bootstrap_interval_of_a_mean_is_the_known_one() -> None:
    values = np.random.default_rng(1).standard_normal(400)
    low, high = interval(values)
    error = values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.15 * error)
    assert interval(values) == (low, high) and interval([3.0, 3.0]) == (3.0, 3.0)
    assert all(math.isnan(end) for end in interval([3.0]))  # one sound says nothing of others


def test_nearest_agrees_with_every_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    """In any blocks; a copy of a training sound at another level is found with cosine 1."""
    generator = torch.Generator().manual_seed(0)
    training, generated = torch.randn(50, 8, generator=generator), torch.randn(7, 8, generator=generator)
    generated[3] = 5 * training[41]
    paths = [f"{i}.wav" for i in range(50)]
    cosines = torch.nn.functional.cosine_similarity(generated[:, None], training[None], dim=2)
    expected = [[paths[i] for i in row.argsort(descending=True)[:3]] for row in cosines]
    for queries in (256, 2, 1):
        monkeypatch.setattr("evaluation.metrics.similarity._QUERIES", queries)
        found = nearest_sounds(generated, training, paths)
        assert [[near.path for near in row] for row in found] == expected
        assert found[3][0] == Neighbour("41.wav", pytest.approx(1, abs=1e-6))
        torch.testing.assert_close(
            torch.tensor([[near.cosine for near in row] for row in found]),
            cosines.sort(dim=1, descending=True).values[:, :3],
        )
    assert [len(row) for row in nearest_sounds(generated, training[:2], paths[:2])] == [2] * 7
    with pytest.raises(ValueError, match="a path for each of 50"):
        nearest_sounds(generated, training, paths[:3])
    with pytest.raises(ValueError, match=r"\(N, D\) and \(M, D\)"):
        nearest_sounds(generated[:, :3], training, paths)


def test_vendi_score_has_closed_forms() -> None:
    """1 of copies, N of sounds with nothing in common, 2 of two kinds, and that of two at an angle."""
    eye = torch.eye(6)
    assert vendi_score(eye[:1].repeat(9, 1)) == pytest.approx(1)
    assert vendi_score(3 * eye) == pytest.approx(6)
    assert vendi_score(eye[[0, 0, 0, 1, 1, 1]]) == pytest.approx(2)
    cosine = 0.6
    entropy = sum(-v * math.log(v) for v in ((1 + cosine) / 2, (1 - cosine) / 2))
    assert vendi_score(torch.tensor([[1.0, 0.0], [cosine, 0.8]])) == pytest.approx(math.exp(entropy), rel=1e-6)
    rows = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.eigvalsh(_gram(rows))
    assert vendi_score(rows) == pytest.approx(float(torch.special.entr(values.clamp_min(0)).sum().exp()))
    assert vendi_score(rows, torch.tensor([0.5, 0.5] + [0.0] * 10)) == pytest.approx(vendi_score(rows[:2]))
    with pytest.raises(ValueError, match="not zero"):
        vendi_score(torch.zeros(2, 3))


def _gram(rows: torch.Tensor) -> torch.Tensor:
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    return unit @ unit.T / len(rows)


def test_diversity_stands_beside_as_many_recordings() -> None:
    """A set that has collapsed is less diverse, whatever the numbers of sounds; the interval holds the value."""
    rows = torch.randn(60, 16, generator=torch.Generator().manual_seed(0))
    collapsed = rows[:1] + 0.1 * rows
    figure = diversity(collapsed, rows[:40])
    assert figure.n == 40 and figure.high < figure.baselines["real"] / 2
    same = diversity(rows[:40], rows[:40])
    assert same.value == same.baselines["real"] and same.low < same.value < same.high
