"""Generation: reproducible, of the asked length, and the same from a copy of the bundle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stable_audio_lite.audio.io import read_metadata
from stable_audio_lite.devices import choose_device, choose_dtype
from stable_audio_lite.diffusion.samplers import SAMPLERS, ItemNoise
from stable_audio_lite.errors import UserError
from stable_audio_lite.pipeline import StableAudio


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> StableAudio:
    return StableAudio.from_pretrained(tiny_bundle, device="cpu", dtype="float32")


def test_shapes_units_and_settings(model: StableAudio) -> None:
    result = model.generate(["piano", "drums"], seconds=0.5, seed=5, count=2)
    assert result.audio.shape == (4, 2, 22050) and result.audio.dtype == torch.float32
    assert result.seeds == [5, 6, 7, 8]
    assert [s["prompt"] for s in result.settings] == ["piano", "piano", "drums", "drums"]
    assert result.settings[0]["model"] == model.hash
    assert result.settings[0]["steps"] == model.config.generation.steps


@pytest.mark.parametrize("samples", [1, 1023, 1024, 1025, 44100, 65536])
def test_length_is_exact(model: StableAudio, samples: int) -> None:
    assert model.generate("piano", seconds=samples / 44100, seed=0, steps=2).audio.shape[-1] == samples


def test_default_length_is_the_window(model: StableAudio) -> None:
    assert model.generate("piano", seed=0, steps=2).audio.shape[-1] == model.config.window_samples


def test_same_seed_same_sound_and_another_seed_another(model: StableAudio) -> None:
    first, again, other = (model.generate("piano", seconds=0.3, seed=s).audio for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-3)


def test_sampling_leaves_the_global_random_state_alone(model: StableAudio) -> None:
    before = torch.get_rng_state()
    model.generate("piano", seconds=0.1)
    assert torch.equal(before, torch.get_rng_state())


def test_an_item_is_the_same_alone_and_in_any_batch(model: StableAudio) -> None:
    together = model.generate(["piano", "drums", "quartet"], seconds=0.3, seed=3, batch=3).audio
    apart = model.generate(["piano", "drums", "quartet"], seconds=0.3, seed=3, batch=1).audio
    alone = model.generate("drums", seconds=0.3, seed=4).audio
    assert torch.allclose(together, apart, atol=1e-4)
    assert torch.allclose(together[1:2], alone, atol=1e-4)


def test_a_network_that_knows_several_windows_samples_what_is_asked_for(model: StableAudio) -> None:
    """In the shortest window that holds it and its end. The noise begins alike."""
    seen: list[int] = []
    hook = model.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
    for windows, seconds in (((), 0.3), ((16, 32), 0.3), ((32, 21), 0.3), ((20,), 0.3), ((32,), 64 * 1024 / 44100)):
        varied = model.with_defaults(windows=windows)
        assert varied.generate("piano", seconds=seconds, seed=1, steps=1).audio.shape[-1] == round(seconds * 44100)
    hook.remove()
    assert seen == [64, 32, 21, 64, 64]
    whole, part = (ItemNoise([5], (3, 8), frames=frames) for frames in (None, 5))
    for _ in range(2):
        assert torch.equal(whole()[..., :5], part())


@pytest.mark.parametrize(
    ("start", "total", "window"),
    [(0.0, 0.4, 32), (0.0, 0.9, 64), (0.0, 15.0, 64), (14.7, 15.0, 32), (0.0, 0.1, 16)],
)
def test_a_short_window_holds_the_rest_of_the_described_piece(
    model: StableAudio, start: float, total: float, window: int
) -> None:
    """As in training, where pieces end in short windows: what is cut out of something longer doesn't fade."""
    seen: list[int] = []
    hook = model.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
    varied = model.with_defaults(windows=(16, 32))
    about = {"seconds_start": start, "seconds_total": total, "seed": 1, "steps": 1}
    assert varied.generate("piano", seconds=0.3, **about).audio.shape[-1] == round(0.3 * 44100)
    list(varied.extend("piano", seconds=0.3, **about).pieces)
    hook.remove()
    assert seen == [window, window]


@pytest.mark.parametrize("windows", [(), (32,)])
def test_silence_follows_the_end_of_the_described_piece(model: StableAudio, windows: tuple[int, ...]) -> None:
    """As the VAE decodes it, whether the frames there were sampled or not; before the end there is other sound."""
    representation = model.representation
    silence = representation.decode(representation.silence[None], 64 * 1024)[0]
    sound = model.with_defaults(windows=windows).generate("piano", seconds_total=20.5 * 1024 / 44100, seed=1).audio[0]
    after = (21 + 13) * 1024  # the decoder sees so far
    assert sound.shape == silence.shape
    assert torch.allclose(sound[:, after:], silence[:, after:], atol=1e-4)
    assert not torch.allclose(sound[:, : 20 * 1024], silence[:, : 20 * 1024], atol=1e-2)
    longer = model.generate("piano", seconds_total=2.0, seed=1).audio[0]
    assert not torch.allclose(longer[:, after:], silence[:, after:], atol=1e-2)


def test_decoding_only_what_is_wanted_changes_no_sample(model: StableAudio) -> None:
    data = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(0))
    whole = model.representation.decode(data, 64 * 1024)
    assert torch.allclose(model.representation.decode(data, 11025), whole[..., :11025], atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"cfg": 1.0},
        {"negative": "drums"},
        {"steps": 3},
        {"seconds_start": 3.0},
        {"seconds_total": 9.0},
        {"rescale": 1.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_setting_matters(model: StableAudio, change: dict) -> None:
    plain = model.generate("piano", seconds=0.3, seed=1).audio
    assert not torch.allclose(plain, model.generate("piano", seconds=0.3, seed=1, **change).audio, atol=1e-5)


def test_the_prompt_matters(model: StableAudio) -> None:
    piano, drums = (model.generate(p, seconds=0.3, seed=1).audio for p in ("piano", "drums"))
    assert not torch.allclose(piano, drums, atol=1e-5)


def test_every_sampler_runs_and_repeats(model: StableAudio) -> None:
    for name in SAMPLERS:
        first, again = (model.generate("piano", seconds=0.2, seed=1, steps=4, sampler=name).audio for _ in range(2))
        assert torch.isfinite(first).all() and torch.equal(first, again), name


def test_what_is_generated_can_be_worked_on(model: StableAudio) -> None:
    """In place, and with gradients."""
    audio = model.generate("piano", seconds=0.2, seed=1, steps=1).audio
    audio *= 0.5
    gain = torch.ones((), requires_grad=True)
    (audio * gain).square().sum().backward()
    assert gain.grad is not None


def test_progress_counts_every_step_of_every_batch(model: StableAudio) -> None:
    seen: list[tuple[int, int]] = []
    model.generate("piano", seconds=0.1, steps=3, count=5, batch=2, progress=lambda *at: seen.append(at))
    assert seen == [(i + 1, 9) for i in range(9)]


def test_a_copy_of_the_bundle_makes_the_same_sound(model: StableAudio, tmp_path: Path) -> None:
    copy = StableAudio.from_pretrained(model.save_pretrained(tmp_path / "copy"), device="cpu", dtype="float32")
    assert copy.hash == model.hash
    sounds = [m.generate("piano", seconds=0.3, seed=1).audio for m in (model, copy)]
    assert torch.equal(*sounds)
    assert copy.save_pretrained(tmp_path / "copy") == tmp_path / "copy"  # onto itself: nothing to do


def test_bfloat16_is_close_to_float32(model: StableAudio, tiny_bundle: Path) -> None:
    half = StableAudio.from_pretrained(tiny_bundle, device="cpu", dtype=torch.bfloat16)
    wide, narrow = (m.generate("piano", seconds=0.3, seed=1).audio for m in (model, half))
    assert narrow.dtype == torch.float32
    assert (wide - narrow).square().mean() < 0.1 * wide.square().mean()


def test_saved_files_carry_their_settings(model: StableAudio, tmp_path: Path) -> None:
    result = model.generate("piano é", seconds=0.1, seed=1, count=2)
    for name in ("a.wav", "a.flac"):
        result.save(tmp_path / name, 1)
        assert read_metadata(tmp_path / name).settings == result.settings[1]


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, "empty"),
        (["piano", " "], {}, "empty"),
        ("piano", {"seconds": 20.0}, r"at most 16\.0"),
        ("piano", {"seconds": 0.0}, "above 0"),
        ("piano", {"seconds": float("nan")}, "above 0"),
        ("piano", {"steps": 0}, "steps"),
        ("piano", {"count": 0}, "count"),
        ("piano", {"cfg": float("inf")}, "cfg"),
        ("piano", {"rescale": 2.0}, "rescale"),
        ("piano", {"seconds_start": -1.0}, "seconds_start"),
        ("piano", {"seconds_total": 99.0}, "seconds_total <= 16"),
        ("piano", {"sampler": "magic"}, "dpmpp-2m"),
        ("piano", {"seed": -(2**70)}, "seed"),
        ("piano", {"cfg": 1e9}, "cfg must lie in 0..100"),
        ("piano", {"cfg": 1.0, "negative": "drums"}, "negative changes guidance"),
        ("piano", {"cfg": 1.0, "rescale": 0.5}, "rescale changes guidance"),
        (5, {}, "prompts must be"),
        (b"piano", {}, "prompts must be"),
        (["piano", 5], {}, "must be text"),
        ("piano", {"negative": 5}, "must be text"),
        ("piano", {"seconds": "3"}, "seconds must be a number"),
        ("piano", {"seconds_start": "3"}, "seconds_start must be a number"),
        ("piano", {"steps": 2.5}, "steps must be a whole number"),
        ("piano", {"cfg": "high"}, "cfg must be a number"),
        ("piano", {"seed": "x"}, "seed must be a whole number"),
        ("piano", {"count": 1.5}, "count must be a whole number"),
        ("piano", {"batch": None}, "batch must be a whole number"),
        ("piano", {"sampler": 5}, "unknown sampler"),
        ("piano", {"edit": "loop"}, "edit must be"),
    ],
)
def test_bad_requests_say_what_is_possible(model: StableAudio, prompts: object, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        model.generate(prompts, **settings)  # type: ignore[arg-type]


def test_wrong_items_levels_and_strengths_are_named(model: StableAudio, tiny_bundle: Path, tmp_path: Path) -> None:
    result = model.generate("piano", seconds=0.1, steps=1)
    for arguments in ((-1,), (1,), ("0",), (0.5,), (0, "loud"), (0, 1.0), (0, float("nan"))):
        with pytest.raises(UserError, match="index|peak_db"):
            result.save(tmp_path / "a.wav", *arguments)
    for strength in (0.5, float("nan"), "full"):
        with pytest.raises(UserError, match="lora_strength"):
            StableAudio.from_pretrained(tiny_bundle, "cpu", lora_strength=strength)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="a bundle is a name or a path, got 5"):
        StableAudio.from_pretrained(5)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_devices_and_dtypes() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_dtype("float16", torch.device("cpu")) == torch.float16
    assert choose_dtype(None, torch.device("cpu")) in (torch.bfloat16, torch.float32)
    for wrong in ("cuda:99", "toaster"):
        with pytest.raises(UserError, match=wrong):
            choose_device(wrong)
    with pytest.raises(UserError, match="int8"):
        choose_dtype("int8", torch.device("cpu"))
