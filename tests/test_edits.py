"""Sound in, sound out: variations, inpainting, continuations, loops; both kinds of VAE, and spectrograms."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stable_audio_lite.audio.io import write_audio
from stable_audio_lite.bundle import save_bundle
from stable_audio_lite.edits import CROSSFADE_SECONDS, Inpainting, Loop, Sound, Variation, plan_windows
from stable_audio_lite.errors import UserError
from stable_audio_lite.models.spectrogram_vae import SpectrogramVAEConfig
from stable_audio_lite.pipeline import StableAudio
from stable_audio_lite.systems import build_vae, load_model_config, load_system

RATE = 44100
FADE = int(CROSSFADE_SECONDS * RATE)
CONFIGS = Path(__file__).parents[1] / "configs"


def source(seconds: float = 1.2, rate: int = RATE, channels: int = 2) -> Sound:
    """A chord that swells."""
    time = torch.arange(round(seconds * rate)) / rate
    tones = torch.stack([(2 * math.pi * pitch * time).sin() for pitch in (220, 277, 330)][: channels + 1])
    audio = 0.1 * (tones[:-1] + tones[1:]) * (0.5 + time / seconds)
    return Sound(audio, rate, "chord.wav")


@pytest.fixture(scope="module", params=["waveform", "spectrogram"])
def model(request: pytest.FixtureRequest, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> StableAudio:
    """A tiny model with random weights, which samples short sounds in short windows."""
    folder = tiny_bundle
    if request.param == "spectrogram":
        torch.manual_seed(0)
        vae = SpectrogramVAEConfig(kind="spectrogram", width=32, encoder_blocks=1, decoder_blocks=1, iterations=4)
        config = replace(load_model_config(tiny_bundle), vae=vae)
        parts = {p: load_file(tiny_bundle / f"{p}.safetensors") for p in ("text_encoder", "conditioner", "unet")}
        folder = tmp_path_factory.mktemp("bundles") / "spectral"
        parts["vae"] = build_vae(vae).state_dict()
        save_bundle(folder, config, parts, tokenizer_json=(tiny_bundle / "tokenizer.json").read_text())
    return StableAudio.from_pretrained(folder, device="cpu", dtype="float32").with_defaults(windows=(16, 32, 48))


def assert_same(found: torch.Tensor, expected: torch.Tensor, within: float) -> None:
    """Rounding that differs between batches grows where phases are found by iterating."""
    assert found.shape == expected.shape and float((found - expected).norm() / expected.norm()) < within


def spectrum(audio: torch.Tensor) -> torch.Tensor:
    """Magnitudes of (C, T) sound, which are what is heard where phases differ."""
    return torch.stft(audio, 2048, 512, window=torch.hann_window(2048), return_complex=True).abs()


def around_vae(model: StableAudio, sound: Sound) -> torch.Tensor:
    """A sound that passes through the model's representation."""
    audio = sound.fitted(model.representation)
    frames = math.ceil(audio.shape[1] / model.representation.hop) + 8
    padded = torch.nn.functional.pad(audio, (0, frames * model.representation.hop - audio.shape[1]))
    with torch.no_grad():
        return model.representation.decode(model.representation.encode(padded[None]), audio.shape[1])[0]


def test_strength_0_is_the_round_trip_and_1_ignores_the_sound(model: StableAudio) -> None:
    sound = source()
    kept = model.generate("piano", seed=1, steps=4, edit=Variation(sound, 0.0)).audio[0]
    torch.testing.assert_close(kept, around_vae(model, sound), atol=1e-5, rtol=0)
    free = model.generate("piano", seed=1, steps=4, edit=Variation(sound, 1.0)).audio
    torch.testing.assert_close(free, model.generate("piano", seed=1, steps=4, seconds=sound.seconds).audio)


def test_distance_to_the_sound_grows_with_strength(model: StableAudio) -> None:
    sound = source()
    hop, known = model.representation.hop, around_vae(model, sound)

    def distance(strength: float) -> float:
        made = model.generate("piano", seed=1, steps=8, count=4, edit=Variation(sound, strength)).audio
        spectra = [
            torch.stft(x.flatten(0, -2), 1024, 256, window=torch.hann_window(1024), return_complex=True).abs()
            for x in (made, known.expand(4, 2, -1))
        ]
        return float((spectra[0] - spectra[1]).norm())

    assert hop and distance(0.0) < distance(0.25) < distance(0.6) < distance(0.95)


def test_outside_an_inpainted_stretch_no_sample_differs_beyond_the_fade(model: StableAudio) -> None:
    sound, gaps = source(), [(0.9, 1.0), (0.3, 0.55)]
    made = model.generate("piano", seed=1, steps=6, count=2, edit=Inpainting(sound, gaps)).audio
    assert made.shape == (2, 2, round(1.2 * RATE)) and torch.isfinite(made).all()
    outside = torch.ones(made.shape[-1], dtype=torch.bool)
    for first, last in gaps:
        outside[round(first * RATE) - FADE : round(last * RATE) + FADE] = False
        inside = slice(round(first * RATE), round(last * RATE))
        for one in made:
            assert (one - sound.audio)[:, inside].abs().mean() > 1e-3
    for one in made:
        assert torch.equal(one[:, outside], sound.audio[:, outside])
    assert not torch.allclose(made[0], made[1], atol=1e-3)


def test_stretches_that_overlap_or_touch_are_one(model: StableAudio) -> None:
    several = Inpainting(source(), [(0.6, 0.7), (0.3, 0.5), (0.4, 0.6), (0.45, 0.5), (0.9, 1.0)])
    one = Inpainting(source(), [(0.3, 0.7), (0.9, 1.0)])
    made = [model.generate("piano", seed=1, steps=4, edit=edit) for edit in (several, one)]
    assert torch.equal(made[0].audio, made[1].audio)
    assert made[0].settings[0]["inpaint"] == "0.3-0.7 0.9-1"


def test_a_continuation_is_in_windows_that_go_on_from_one_another(
    model: StableAudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any length, to the sample; the same taken in pieces or whole; each window is told where it is."""
    told: list[tuple[float, float]] = []
    frames: list[float] = []  # before the window, by which the network counts
    assert model.conditioner is not None
    network: Any = model.network
    context = network.context
    counted = lambda cond, scale, start: frames.append(float(start[0])) or context(cond, scale, start)  # noqa: E731
    monkeypatch.setattr(network, "context", counted)
    hook = model.conditioner.register_forward_pre_hook(
        lambda _, given: told.append((float(given[1][0]), float(given[2][0])))
    )
    sound = source(0.7)
    for seconds in (0.2, 3.0):
        told.clear()
        frames.clear()
        extension = model.extend("piano", after=sound, seconds=seconds, seed=1, steps=4)
        pieces = list(extension.pieces)
        whole = torch.cat(pieces, 1)
        assert whole.shape == (2, round(seconds * RATE)) and torch.isfinite(whole).all()
        windows = plan_windows(round(seconds * RATE), 1024, 64, int(0.7 * RATE) // 1024)
        assert [piece.shape[1] for piece in pieces] == [made for _, made in windows]
        assert [total for _, total in told] == pytest.approx([0.7 + seconds] * len(windows))
        assert frames == pytest.approx([RATE * start / 1024 for start, _ in told], abs=1e-3)
        done = 0
        for (start, _), (known, made) in zip(told, windows, strict=True):
            assert start == pytest.approx(0.7 + (done - known * 1024) / RATE, abs=1e-5)
            done += made
        again = torch.cat(list(model.extend("piano", after=sound, seconds=seconds, seed=1, steps=4).pieces), 1)
        assert torch.equal(whole, again)
        joined = torch.cat((sound.audio, whole), 1)
        step = (joined[:, round(0.7 * RATE)] - joined[:, round(0.7 * RATE) - 1]).abs().max()
        assert step <= 1.01 * joined.diff(dim=1).abs().max()
        prompted = frames[: len(windows)]
        frames.clear()
        list(model.extend(after=sound, seconds=seconds, seed=1, steps=4).pieces)
        assert frames == prompted  # without a prompt, too
    hook.remove()


def test_a_continuation_that_does_not_end_the_piece_is_sampled_in_the_whole_window(model: StableAudio) -> None:
    """Short windows were trained with pieces that end in them."""
    seen: list[int] = []
    hook = model.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
    for total, whole in ((None, False), (15.0, True)):
        list(model.extend("piano", after=source(0.3), seconds=0.1, seconds_total=total, seed=1, steps=1).pieces)
        assert {frames == 64 for frames in seen} == {whole}, seen
        seen.clear()
    hook.remove()


def test_long_sounds_are_the_pieces_that_extend_yields(model: StableAudio) -> None:
    """In batches too, but for rounding, which grows where phases are found by iterating."""
    seen: list[tuple[int, int]] = []
    together = model.generate(
        "piano", seconds=3.2, seed=3, steps=4, count=2, batch=2, progress=lambda *at: seen.append(at)
    )
    assert together.audio.shape == (2, 2, round(3.2 * RATE))
    assert seen == [(i + 1, seen[0][1]) for i in range(seen[0][1])]
    whole = model.generate("piano", seconds=3.2, seed=3, steps=4, count=2, batch=1)
    for index in range(2):
        one = model.extend("piano", seconds=3.2, seed=3 + index, steps=4)
        pieces = list(one.pieces)
        assert_same(torch.cat(pieces, 1), whole.audio[index], 1e-5)
        if model.config.vae.kind == "waveform":  # type: ignore[union-attr]
            assert_same(torch.cat(pieces, 1), together.audio[index], 0.03)
        assert one.settings == whole.settings[index] == together.settings[index]


@pytest.mark.parametrize("bpm", [170.0, 177.0, 340.0])
def test_a_loop_lasts_its_bars_and_meets_itself(model: StableAudio, bpm: float) -> None:
    edit = Loop(bars=1, bpm=bpm, beats=2)
    made = model.generate("piano", seed=1, steps=6, edit=edit).audio[0]
    assert made.shape[1] == round(60 * edit.beats / bpm * RATE)
    twice = torch.cat((made, made), 1)
    steps = twice.diff(dim=1).abs().amax(0)
    assert steps[made.shape[1] - 1] <= steps.max()
    across = torch.stft(twice, 512, 128, window=torch.hann_window(512), return_complex=True, center=False).abs()
    change = across.diff(dim=2).norm(dim=(0, 1))
    seam = (made.shape[1] - 256) // 128
    assert change[seam - 2 : seam + 3].max() <= change.max()


@pytest.mark.parametrize(
    "edit",
    [Variation(source(), 0.5), Inpainting(source(), [(0.4, 0.6)]), Loop()],
    ids=["variation", "inpainting", "loop"],
)
def test_an_item_is_the_same_alone_and_in_a_batch_and_its_settings_are_told(model: StableAudio, edit) -> None:  # type: ignore[no-untyped-def]
    seen: list[tuple[int, int]] = []
    several = model.generate(["piano", "drums"], seed=3, steps=4, edit=edit, progress=lambda *at: seen.append(at))
    alone = model.generate("drums", seed=4, steps=4, edit=edit)
    assert_same(spectrum(several.audio[1]), spectrum(alone.audio[0]), 0.01)
    assert seen == [(i + 1, seen[0][1]) for i in range(seen[0][1])]
    assert edit.settings.items() <= alone.settings[0].items()


@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (48000, 2), (96000, 1)])
def test_a_sound_of_any_rate_and_number_of_channels(model: StableAudio, rate: int, channels: int) -> None:
    sound = source(1.0, rate, channels)
    made = model.generate("piano", seed=1, steps=2, edit=Inpainting(sound, [(0.5, 0.6)])).audio[0]
    assert made.shape == (2, RATE)
    assert torch.equal(made[:, :20000], sound.fitted(model.representation)[:, :20000])


def test_a_sounds_own_prompt_is_used_where_none_is_given(model: StableAudio, tmp_path: Path) -> None:
    first = model.generate("warm piano", seconds=0.5, seed=1, steps=2)
    first.save(tmp_path / "a.wav")
    sound = Sound.read(tmp_path / "a.wav")
    assert model.generate(seed=2, steps=2, edit=Variation(sound, 0.5)).settings[0]["prompt"] == "warm piano"
    assert model.extend(after=sound, seconds=0.2, steps=2).settings["prompt"] == "warm piano"
    assert model.generate("drums", seed=2, steps=2, edit=Variation(sound, 0.5)).settings[0]["prompt"] == "drums"


def test_the_end_of_a_long_file_is_enough_to_go_on_from(tmp_path: Path, model: StableAudio) -> None:
    sound = source(4.0)
    write_audio(tmp_path / "a.wav", sound.audio, RATE)
    whole, end = Sound.read(tmp_path / "a.wav"), Sound.read(tmp_path / "a.wav", last_seconds=model.window_seconds)
    assert end.seconds == pytest.approx(model.window_seconds, abs=1e-4) and end.begins + end.seconds == pytest.approx(4)
    made = [torch.cat(list(model.extend("x", after=s, seconds=0.3, seed=1, steps=2).pieces), 1) for s in (whole, end)]
    torch.testing.assert_close(made[0], made[1], atol=1e-5, rtol=0)


def test_spectrogram_models_take_sound_in(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = load_system(CONFIGS / "complex_stft" / "tiny.yaml")
    save_bundle(tmp_path / "bundle", config, {config.part: config.network().state_dict()})
    model = StableAudio.from_pretrained(tmp_path / "bundle", device="cpu", dtype="float32")
    sound = source(0.06, 8000, 1)
    kept = model.generate(seed=1, edit=Variation(sound, 0.0)).audio[0]
    assert_same(kept, sound.audio, 0.2)
    made = model.generate(seed=1, edit=Inpainting(sound, [(0.03, 0.036)])).audio[0]
    assert torch.equal(made[:, :80], sound.audio[:, :80])
    longer = torch.cat(list(model.extend(after=sound, seconds=0.2, seed=1).pieces), 1)
    assert longer.shape == (1, 1600) and torch.isfinite(longer).all()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Variation(source(), 1.1), "strength must lie in 0..1"),
        (lambda: Variation(Sound(torch.zeros(2, 9000), RATE, "quiet.wav"), 0.5), "quiet.wav: is silent"),
        (lambda: Variation(source(3.0), 0.5), "chord.wav: lasts 3.000 s, longer than the window"),
        (lambda: Inpainting(source(), [(0.5, 1.3)]), "can't inpaint 0.5-1.3; stretches lie in order within 0-1.200 s"),
        (lambda: Inpainting(source(), [(0.5, 0.5)]), "can't inpaint 0.5-0.5"),
        (lambda: Inpainting(source(), [(-1, 0.5)]), "can't inpaint -1-0.5"),
        (lambda: Inpainting(source(), []), "say which stretch"),
        (lambda: Inpainting(source(), [(0, 1.2)]), "nothing of it would stay"),
        (lambda: Inpainting(source(1.0), [(0.4, 1.0), (0, 0.5)]), "nothing of it would stay"),
        (lambda: Loop(bars=0, bpm=100), "bars must be at least 1"),
        (lambda: Loop(bars=4), "needs a tempo"),
        (lambda: Loop(bars=4, bpm=1000), "bpm must lie in 20..400"),
        (lambda: Loop(bars=4, bpm=120), r"lasts at most 0.743 s, not 8; give 324 bpm or more"),
        (lambda: Loop(bars=40, bpm=400), "give at most 1 bars"),
    ],
)
def test_what_is_not_possible_is_said_in_one_line(model: StableAudio, make, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=says) as refused:
        model.generate("piano", seed=1, steps=2, edit=make())
    assert "\n" not in str(refused.value)


def test_a_length_that_is_no_number_of_bars_is_refused_with_those_that_are(model: StableAudio) -> None:
    with pytest.raises(UserError, match=r"no whole number of bars of 0.5 s at 240 bpm; give seconds as 0.5 or 1"):
        model.generate("x", seconds=0.7, edit=Loop(bpm=240, beats=2))
    assert model.generate("x", seconds=0.5, steps=2, edit=Loop(bpm=240, beats=2)).audio.shape[-1] == RATE // 2
    with pytest.raises(UserError, match="lasts 1.200 s; give at most that"):
        model.generate("x", seconds=1.3, edit=Variation(source(), 0.5))


def test_windows_cover_all_and_overlap() -> None:
    for samples, window in itertools.product((1, 1024, 70 * 1024, 200 * 1024 + 5), (8, 64)):
        for known in (0, 3, 40):
            windows = plan_windows(samples, 1024, window, known)
            assert sum(made for _, made in windows) == samples
            assert all(made % 1024 == 0 for _, made in windows[:-1])
            assert all(kept * 1024 + made <= window * 1024 for kept, made in windows)
            assert all(kept == window // 2 for kept, _ in windows[1:])
