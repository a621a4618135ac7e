"""Generation on spectrograms: with and without text, from the library and the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from stable_audio_lite import cli
from stable_audio_lite.audio.io import audio_info, read_metadata
from stable_audio_lite.audio.spectrogram import Spectrogram
from stable_audio_lite.bundle import save_bundle
from stable_audio_lite.clap.text_encoder import TextEncoder
from stable_audio_lite.clap.tokenizer import train_tokenizer
from stable_audio_lite.diffusion.samplers import SAMPLERS, polyexponential_sigmas
from stable_audio_lite.errors import UserError
from stable_audio_lite.models.conditioner import Conditioner
from stable_audio_lite.pipeline import StableAudio
from stable_audio_lite.systems import SpectralConfig, SpectrogramDiffusionConfig, load_system

CONFIGS = Path(__file__).parents[1] / "configs"
WINDOW = 512  # samples of configs/spectrogram_transformer/tiny.yaml


def save(folder: Path, config: SpectralConfig) -> Path:
    """A bundle with random weights, none of them 0: those that start there would hide the prompt."""
    torch.manual_seed(0)
    network = config.network()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    parts, tokenizer = {config.part: network.state_dict()}, None
    if isinstance(config, SpectrogramDiffusionConfig) and config.clap:
        trained = train_tokenizer(["warm slow piano", "fast techno drums"], 280)
        parts["text_encoder"] = TextEncoder(config.clap, trained).state_dict()
        parts["conditioner"] = Conditioner(config.timing, config.clap.text_width).state_dict()
        tokenizer = trained.to_str()
    save_bundle(folder, config, parts, tokenizer)
    return folder


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`text` and `plain` of the transformer, and `unet`."""
    folder = tmp_path_factory.mktemp("spectral")
    text = load_system(CONFIGS / "spectrogram_transformer" / "tiny.yaml")
    assert isinstance(text, SpectrogramDiffusionConfig)
    plain = replace(text, transformer=replace(text.transformer, text=False), clap=None)
    unet = load_system(CONFIGS / "complex_stft" / "tiny.yaml")
    return {name: save(folder / name, config) for name, config in (("text", text), ("plain", plain), ("unet", unet))}


@pytest.fixture(scope="module")
def text(bundles: dict[str, Path]) -> StableAudio:
    return StableAudio.from_pretrained(bundles["text"], device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def plain(bundles: dict[str, Path]) -> StableAudio:
    return StableAudio.from_pretrained(bundles["plain"], device="cpu", dtype="float32")


@pytest.mark.parametrize("name", ["text", "plain", "unet"])
def test_any_bundle_makes_mono_sound_from_nothing(bundles: dict[str, Path], name: str) -> None:
    model = StableAudio.from_pretrained(bundles[name], device="cpu", dtype="float32")
    result = model.generate(count=3, seed=5, batch=2)
    assert result.audio.shape == (3, 1, WINDOW) and result.audio.dtype == torch.float32
    assert torch.isfinite(result.audio).all() and result.audio.std() > 1e-4
    assert result.seeds == [5, 6, 7] and result.sample_rate == 8000
    assert result.settings[0]["model"] == model.hash
    assert not {"prompt", "cfg", "negative", "seconds_total"} & result.settings[0].keys()


def test_settings_of_a_prompt_are_kept(text: StableAudio) -> None:
    settings = text.generate("piano", seed=1, cfg=2.0, seconds_total=9.0).settings[0]
    assert (settings["prompt"], settings["cfg"], settings["seconds_total"]) == ("piano", 2.0, 9.0)


@pytest.mark.parametrize("samples", [1, 31, 32, 33, 500, WINDOW])
def test_length_is_exact_and_the_sound_the_same(plain: StableAudio, samples: int) -> None:
    whole = plain.generate(seed=0, steps=2).audio
    assert torch.equal(plain.generate(seed=0, steps=2, seconds=samples / 8000).audio, whole[..., :samples])


def test_same_seed_same_sound_and_another_seed_another(plain: StableAudio) -> None:
    first, again, other = (plain.generate(seed=seed).audio for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-3)


def test_an_item_is_the_same_alone_and_in_any_batch(text: StableAudio) -> None:
    prompts = ["piano", "drums", "slow piano"]
    together = text.generate(prompts, seed=3, batch=3).audio
    assert torch.allclose(together, text.generate(prompts, seed=3, batch=1).audio, atol=1e-4)
    assert torch.allclose(together[1:2], text.generate("drums", seed=4).audio, atol=1e-4)
    nothing = text.generate(count=3, seed=3, batch=3).audio
    assert torch.allclose(nothing[1:2], text.generate(seed=4).audio, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [{"prompts": "drums"}, {"prompts": None}, {"cfg": 1.0}, {"negative": "drums"}, {"steps": 3}, {"rescale": 1.0}]
    + [{"seconds_start": 3.0}, {"seconds_total": 9.0}],
    ids=str,
)
def test_every_setting_matters(text: StableAudio, change: dict) -> None:
    reference = text.generate("piano", seed=1).audio
    changed = text.generate(**{"prompts": "piano", "seed": 1} | change).audio
    assert not torch.allclose(reference, changed, atol=1e-5)


def test_the_network_sees_the_steps_of_its_schedule(plain: StableAudio) -> None:
    seen: list[float] = []
    hook = plain.network.register_forward_pre_hook(lambda _, inputs: seen.append(float(inputs[1])))
    plain.generate(seed=0, steps=6, sampler="ddpm")
    hook.remove()
    defaults = plain.config.generation
    sigmas = polyexponential_sigmas(6, defaults.sigma_min, defaults.sigma_max)
    assert seen == pytest.approx(plain.process.time(sigmas[:-1]).tolist())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_runs_and_repeats(text: StableAudio, sampler: str) -> None:
    first, again = (text.generate("piano", seed=1, sampler=sampler).audio for _ in range(2))
    assert torch.isfinite(first).all() and torch.equal(first, again)


def test_a_network_that_learned_one_clip_generates_it(plain: StableAudio) -> None:
    """By every sampler, from noise alone, to within 5 % of the spectrogram's variance."""
    time_axis = torch.arange(WINDOW) / 8000
    clip = sum(0.3 * torch.sin(2 * torch.pi * hertz * time_axis) for hertz in (430, 1290, 2200))
    x0 = Spectrogram(plain.config.spectrogram).encode(clip[None])
    torch.manual_seed(0)
    network, process = plain.config.network(), plain.process
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    for _ in range(200):
        steps, batch = process.at(torch.rand(8)), x0.expand(8, -1, -1, -1)
        error = (network(process.add_noise(batch, torch.randn_like(batch), steps), steps) - batch).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    trained = StableAudio(plain.folder, plain.config, plain.representation, network)
    for sampler in SAMPLERS:
        made = trained.generate(seed=1, count=2, sampler=sampler, steps=10).audio
        error = (Spectrogram(plain.config.spectrogram).encode(made[:, 0]) - x0).square().mean()
        assert error < 0.05 * x0.var(), sampler


def test_a_copy_of_the_bundle_makes_the_same_sound(text: StableAudio, tmp_path: Path) -> None:
    copy = StableAudio.from_pretrained(text.save_pretrained(tmp_path / "copy"), device="cpu", dtype="float32")
    assert copy.hash == text.hash
    assert torch.equal(copy.generate("piano", seed=1).audio, text.generate("piano", seed=1).audio)


def test_bfloat16_is_close_to_float32(text: StableAudio) -> None:
    half = StableAudio.from_pretrained(text.folder, device="cpu", dtype=torch.bfloat16)
    wide, narrow = (model.generate("piano", seed=1, cfg=1.0).audio for model in (text, half))
    assert half.dtype == torch.bfloat16 and narrow.dtype == torch.float32
    assert (wide - narrow).square().mean() < 0.1 * wide.square().mean()


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("plain", {"prompts": "piano"}, "reads no text; leave out the prompt"),
        ("plain", {"prompts": []}, "reads no text; leave out the prompt"),
        ("plain", {"negative": "drums"}, "reads no text; leave out negative"),
        ("plain", {"cfg": 3.0}, "reads no text; leave out cfg"),
        ("plain", {"seconds": 0.0}, "seconds must lie above 0"),
        ("plain", {"steps": 0}, "steps"),
        ("plain", {"sampler": "magic"}, "dpmpp-2m.*ddpm"),
        ("text", {"negative": "drums"}, "negative says something about a prompt; give one"),
        ("text", {"cfg": 3.0}, "cfg says something about a prompt"),
        ("text", {"prompts": ["piano", " "]}, "empty"),
        ("text", {"prompts": []}, "empty"),
        ("text", {"prompts": "piano", "seconds_total": 99.0}, "seconds_total <= 16"),
    ],
)
def test_bad_requests_say_what_is_possible(
    request: pytest.FixtureRequest, kind: str, settings: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        request.getfixturevalue(kind).generate(**settings)


def test_a_lora_is_refused(bundles: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="a LoRA is for a model of kind stable_audio, .* is spectrogram_transformer"):
        StableAudio.from_pretrained(bundles["text"], lora="some/lora")


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "conditioner"])
def test_a_missing_part_is_named(text: StableAudio, tmp_path: Path, part: str) -> None:
    folder = text.save_pretrained(tmp_path / "copy")
    (folder / f"{part}.safetensors").unlink()
    with pytest.raises(UserError, match=f"{part}.safetensors: missing"):
        StableAudio.from_pretrained(folder)


# The command line


def run(folder: Path, *args: object) -> int:
    fixed = ["--model", str(folder), "--device", "cpu", "--dtype", "float32"]
    return cli.main(["generate", *fixed, *map(str, args)])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_needs_no_prompt(
    bundles: dict[str, Path], here: Path, capsys: pytest.CaptureFixture[str], plain: StableAudio
) -> None:
    assert run(bundles["plain"], "--seed", 7, "--count", 3, "--batch", 2, "--plot") == 0
    names = [f"sound-{seed}" for seed in (7, 8, 9)]
    assert sorted(p.name for p in here.iterdir()) == sorted(f"{n}{end}" for n in names for end in (".wav", ".png"))
    header, stored = audio_info(here / "sound-9.wav"), read_metadata(here / "sound-9.wav")
    assert (header.channels, header.sample_rate, header.frames) == (1, 8000, WINDOW)
    assert stored.title is None and stored.settings == plain.generate(seed=9).settings[0]
    assert "sound-7.wav: unprompted\n  seed 7" in capsys.readouterr().out
    assert run(bundles["text"], "--seed", 7, "--steps", 1, "-o", "a.flac") == 0
    assert "prompt" not in read_metadata(here / "a.flac").settings


def test_the_command_reads_prompts(bundles: dict[str, Path], here: Path, text: StableAudio) -> None:
    assert run(bundles["text"], "warm piano", "--seed", 7, "--cfg", 2, "--sampler", "ddpm", "--seconds", 0.05) == 0
    stored = read_metadata(here / "warm-piano-7.wav")
    assert stored.title == "warm piano"
    same = text.generate("warm piano", seed=7, cfg=2.0, sampler="ddpm", seconds=0.05)
    assert stored.settings == same.settings[0]


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("plain", ["piano"], "this model reads no text; leave out the prompt"),
        ("plain", ["--negative", "piano"], "leave out negative"),
        ("plain", ["--lora", "x"], "x: a LoRA is for a model of kind stable_audio"),
        ("text", ["--cfg", 3], "cfg says something about a prompt"),
        ("text", ["--count", 0], "--count"),
        ("text", ["piano", "--prompts", "x"], "PROMPT or --prompts"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    bundles: dict[str, Path], here: Path, capsys: pytest.CaptureFixture[str], name: str, args: list, message: str
) -> None:
    assert run(bundles[name], *args) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("error: ") and message in captured.err
    assert not list(here.iterdir())


def info(capsys: pytest.CaptureFixture[str], path: Path) -> dict:
    assert cli.main(["info", str(path), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_info_counts_the_transformer_exactly(capsys: pytest.CaptureFixture[str]) -> None:
    facts = info(capsys, CONFIGS / "spectrogram_transformer" / "unconditional.yaml")
    assert facts["parameters"] == {"transformer": 5_388_802, "total": 5_388_802}
    assert facts["spectrogram_shape"] == [2, 412, 256] and facts["sample_rate"] == 22050
    assert facts["window_samples"] == 256 * 412 and facts["window_seconds"] == pytest.approx(4.783)
    assert (facts["predicts"], facts["reads_text"]) == ("x0", False)


def test_info_counts_the_unet_as_its_paper_does(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = CONFIGS / "complex_stft" / "paper.yaml"
    facts = info(capsys, path)
    assert 31_290_000 <= facts["parameters"]["unet"] <= 31_320_000
    assert facts["predicts"] == "eps"
    assert facts["spectrogram_shape"] == [2, 512, 512] and facts["window_seconds"] == pytest.approx(2.972)
    assert cli.main(["info", str(path)]) == 0
    assert "(31.3 M)" in capsys.readouterr().out
    for value in ("plain", "residual"):  # an option of earlier versions
        data = yaml.safe_load(path.read_text())
        data["unet"]["resample"] = value
        (other := tmp_path / "other.yaml").write_text(yaml.safe_dump(data))
        assert cli.main(["info", str(other)]) == (0 if value == "plain" else 2)
    assert "'unet.resample' is 'residual', which this version no longer has" in capsys.readouterr().err


def test_info_on_a_bundle_counts_its_parts(
    bundles: dict[str, Path], text: StableAudio, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = info(capsys, bundles["text"])
    assert facts["parts"] == ["text_encoder", "conditioner", "transformer"] and facts["model"] == text.hash
    modules = {"text_encoder": text.text_encoder, "conditioner": text.conditioner, "transformer": text.network}
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
    assert facts["parameters"] == counts | {"total": sum(counts.values())}
    assert facts["reads_text"] is True
