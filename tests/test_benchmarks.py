"""The benchmarks' table: peers compute the same, figures are what was measured, mistakes are one line."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from evaluation.benchmarks import __main__, generation, networks, peers, processes
from evaluation.benchmarks.peers import PeerVAE, VAEPeer, peer_discriminator, unet_peer, vae_peers
from evaluation.benchmarks.processes import Ran
from evaluation.benchmarks.table import CostTable, Peer, Row
from evaluation.benchmarks.timing import Spread, Timing, time_in_turns
from stable_audio_lite.errors import UserError
from stable_audio_lite.models.discriminator import Discriminator, DiscriminatorConfig
from stable_audio_lite.models.waveform_vae import WaveformVAEConfig
from stable_audio_lite.nn.attention import Condition
from stable_audio_lite.systems import load_model_config

ROOT = Path(__file__).parents[1]
TINY = ROOT / "configs/stable_audio/tiny.yaml"
SMALL = WaveformVAEConfig(encoder_width=4, decoder_width=32)
CPU = torch.device("cpu")


def subject(vae: WaveformVAEConfig) -> networks.Subject:
    return networks.Subject(config=replace(load_model_config(TINY), vae=vae))


def test_the_peer_of_dacs_blocks_is_the_same_network_unfolded() -> None:
    vae = subject(SMALL).vae()
    peer = PeerVAE(SMALL).load(vae)
    audio, noise = 0.1 * torch.randn(1, 2, 8192), torch.randn(1, 64, 8)
    with torch.no_grad():
        theirs = peer(audio, noise)
        for a, b in zip(vae(audio, noise), theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        vae.prepare_for_inference()
        assert any(name.endswith("weight_g") for name, _ in peer.named_parameters())
        assert not any(name.endswith("weight_g") for name, _ in vae.named_parameters())
        torch.testing.assert_close(vae.decode_chunked(noise, chunk_frames=3), peer.decoder(noise), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "vae"),
    [
        ("descript-audio-codec", SMALL),
        ("stable-audio-tools", replace(SMALL, tanh=True)),
        ("stable-audio-tools", replace(SMALL, blocks="oobleck")),
        ("diffusers", replace(SMALL, encoder_width=128, decoder_width=64, blocks="oobleck")),
    ],
)
def test_peers_encode_and_decode_alike(name: str, vae: WaveformVAEConfig) -> None:
    modules = {"stable-audio-tools": "stable_audio_tools", "diffusers": "diffusers", "descript-audio-codec": "dac"}
    if not importlib.util.find_spec(modules[name]):
        pytest.skip(f"{name} is not installed")
    own = subject(vae).vae()
    found: dict[str, VAEPeer] = {peer.name: peer for peer in vae_peers(own, subject(vae).config)}
    audio, latents = 0.1 * torch.randn(1, 2, 4096), torch.randn(1, 64, 4)
    with torch.no_grad():
        pairs = (own.encode(audio).mean, found[name].encode(audio)), (own.decode(latents), found[name].decode(latents))
    for ours, theirs in pairs:
        assert ours.std() > 0.01
        assert networks._difference(ours, theirs) < 1e-3


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-4), (torch.bfloat16, 0.2)])
def test_the_peer_of_the_unet_predicts_alike(dtype: torch.dtype, atol: float) -> None:
    pytest.importorskip("stable_audio_tools")
    paper, tiny = load_model_config(ROOT / "configs/stable_audio/paper.yaml"), load_model_config(TINY)
    config = replace(paper, unet=replace(tiny.unet, groups=16, width=64))
    unet = networks.Subject(config=config).unet(CPU, dtype)
    x, t = torch.randn(2, 64, 16).to(dtype), torch.rand(2)
    tokens = torch.randn(2, config.context_tokens, config.context_width).to(dtype)
    peer = unet_peer(unet, config)
    assert peer is not None
    with torch.no_grad():
        own = unet(x, t, unet.context(Condition(tokens, torch.ones(2, config.context_tokens, dtype=torch.bool))))
        theirs = peer(x, t, tokens)
        assert theirs.dtype == dtype and float((own - theirs).abs().max() / theirs.abs().max()) < atol


def test_a_peer_that_can_not_be_imported_is_left_out_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken_peer").mkdir()
    (tmp_path / "broken_peer/__init__.py").write_text("import what_it_needs\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert peers._imported("broken_peer.models") is None and peers._imported("no_such_peer.models") is None
    assert capsys.readouterr().err == (
        "broken-peer is left out: it can't be imported (No module named 'what_it_needs')\n"
    )
    assert peers._imported("json.decoder").JSONDecoder


def test_peer_discriminator_is_the_same_in_the_usual_layout() -> None:
    torch.manual_seed(0)
    judge = DiscriminatorConfig(windows=(256, 64), filters=4)
    ours, peer = Discriminator(judge), peer_discriminator(judge)
    peer.load_state_dict(ours.state_dict())
    with torch.no_grad():
        for (a, first), (b, second) in zip(ours(audio := torch.randn(2, 2, 4096)), peer(audio), strict=True):
            for one, other in zip((a, *first), (b, *second), strict=True):
                torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
            assert all(x.is_contiguous(memory_format=torch.channels_last) for x in first)
            assert all(x.is_contiguous() for x in second)


def test_functions_are_timed_in_turns_and_warmups_do_not_count() -> None:
    calls: list[int] = []
    one, other = time_in_turns((lambda: calls.append(1) or 7, lambda: calls.append(2)), repeats=3)
    assert calls == [1, 2] * 4 and one.output == 7 and len(one.seconds) == len(other.seconds) == 3
    timing = Timing((0.3, 0.1, 0.2), None)
    assert timing.spread == Spread(0.2, 0.1, 0.3) and timing.rates(3)[1] == pytest.approx(30)
    assert timing.ratio(Timing((0.6, 0.1, 0.8), None)) == Spread(2.0, 1.0, 4.0)  # turn by turn, not of the medians


def test_a_share_is_of_the_matrix_products_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix product itself has the share of its own times: here it takes twice as long as the yardstick."""
    a = torch.randn(64, 64)
    monkeypatch.setattr(networks, "matrix_product", lambda device, dtype: (lambda: None, 2.0 * 64**3))
    timings = [Timing((2.0, 4.0), None), Timing((1.0, 2.0), None)]
    monkeypatch.setattr(networks, "time_in_turns", lambda runs, repeats: timings)
    timed = networks._timed(lambda: a @ a, {}, CPU, torch.float32, 2)
    assert timed.share == Spread(0.5, 0.5, 0.5)


def test_steps_of_training_change_the_weights_of_both() -> None:
    config, judge = replace(load_model_config(TINY), vae=SMALL), DiscriminatorConfig(windows=(256,), filters=4)
    sizes = networks.Sizes(frames=8, seconds=1, batch=1, crop_frames=8)
    step, peers = networks.vae_steps(config, sizes, CPU, torch.float32, judge)
    assert list(peers) == ["descript-audio-codec"]
    step()
    peers["descript-audio-codec"]()
    spectral = load_model_config(ROOT / "configs/stable_audio/starter.yaml")
    small = replace(spectral.vae, width=16, encoder_blocks=1, decoder_blocks=1, latent_channels=4)
    step, peers = networks.vae_steps(replace(spectral, vae=small), sizes, CPU, torch.float32, judge)
    assert not peers
    step()
    unet = networks.Subject(config=config).unet(CPU, torch.float32)
    before = {name: p.clone() for name, p in unet.named_parameters() if p.ndim > 1 and name != "null"}
    networks._unet_step(unet, config, sizes, torch.float32)()
    assert not any(torch.equal(before[name], p) for name, p in unet.named_parameters() if name in before)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    return __main__.main()


def test_the_table_comes_as_text_and_as_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("evaluation.benchmarks.machine._ROWS", 64)
    output = tmp_path / "speed.json"
    asked = ["--only", "unet", "vae", "--seconds", "0.1", "--frames", "16", "--dtypes", "float32", "--repeats", "2"]
    assert run(monkeypatch, str(TINY), *asked, "-o", str(output)) == 0
    data, printed = json.loads(output.read_text()), capsys.readouterr().out
    assert data["machine"]["cores"] > 0 and data["machine"]["processor"] and data["repeats"] == 2
    assert [row["what"] for row in data["rows"]] == ["U-Net step with guidance", "VAE encode", "VAE decode"]
    for row in data["rows"]:
        figure = row["figure"]
        assert 0 < figure["least"] <= figure["median"] <= figure["most"] and row["share"]["median"] > 0
        assert f"| {row['what']} | {row['how']} |" in printed
    (peer,) = data["rows"][2]["peers"]
    assert peer["name"] == "descript-audio-codec" and peer["difference"] < 1e-4
    assert "ours is" in printed and "outputs differ by" in printed
    assert run(monkeypatch, str(TINY), *asked, "-o", str(output)) == 2
    assert "is there already" in capsys.readouterr().err


def test_generation_is_measured_in_seconds_of_sound(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timings = [Timing(own, None) for own in ((0.5, 0.25), (1.0, 1.0), (0.2, 0.2), (0.4, 0.2))]
    asked: list[tuple[float, int]] = []

    def timed(runs: list, repeats: int) -> list[Timing]:
        made = [call().settings[0] for call in runs]
        asked.extend((settings["seconds"], settings["steps"]) for settings in made)
        return timings

    monkeypatch.setattr(generation, "time_in_turns", timed)
    rows = list(generation.generation_rows(str(tiny_bundle), [0.25, 0.1], [1, 2], "cpu", [torch.float32], 2))
    assert asked == [(0.25, 1), (0.25, 2), (0.1, 1), (0.1, 2)]
    assert [row.figure.most for row in rows] == pytest.approx([1.0, 0.25, 0.5, 0.5])
    assert [row.how for row in rows][:2] == ["float32, 1 steps, 0.25 s", "float32, 2 steps, 0.25 s"]


def test_a_network_that_takes_the_scale_needs_one_forward_for_guidance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluation.benchmarks.machine._ROWS", 64)
    tiny, sizes = load_model_config(TINY), networks.Sizes(frames=16, seconds=0.1)
    for guidance, items in ((0.0, 2), (4.0, 1)):
        config = replace(tiny, unet=replace(tiny.unet, guidance=guidance))
        (row,) = networks.unet_rows(networks.Subject(config=config), sizes, CPU, [torch.float32], 1)
        assert row.how == f"float32, {items} x 16 frames"


def test_the_memory_of_a_whole_window_is_that_of_a_process_which_makes_it(tiny_bundle: Path) -> None:
    """It has the window's length, and is more than the process alone takes."""
    sound = networks.play_window(networks.Subject.of(str(TINY)), CPU, torch.float32)
    assert sound.shape == (2, load_model_config(TINY).window_samples) and sound.isfinite().all() and sound.std() > 0
    bare = processes.run_python(["-c", "import torch, evaluation.benchmarks.networks"]).megabytes
    for model in (str(TINY), str(tiny_bundle)):
        (row,) = processes.window_rows(model, CPU, torch.float32, 1)
        assert row.unit == "MB" and bare + 1 < row.figure.median < bare + 2000


def test_the_memory_of_a_process_is_its_own() -> None:
    """Neither less than what it fills, nor that of the larger process which started it."""
    held = bytearray(b"x" * 2**29)
    little, more = (processes.run_python(["-c", f"len(b'x' * {size} * 2**20)"]) for size in (1, 100))
    assert little.megabytes < 60 and more.megabytes == pytest.approx(little.megabytes + 99, abs=5) and held[0]
    with pytest.raises(UserError, match="failed .ZeroDivisionError"):
        processes.run_python(["-c", "1 / 0"])
    with pytest.raises(UserError, match="failed .error: no/such"):
        processes.run_python(["-m", "stable_audio_lite.cli", "info", "no/such"])


def test_starts_are_measured_without_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a load and of a first sound in turn, as users' commands."""
    calls: list[list[str]] = []

    def ran(arguments: list[str]) -> Ran:
        calls.append(arguments)
        return Ran(seconds=float(len(calls)), megabytes=100.0 * len(calls))

    monkeypatch.setattr(processes, "run_python", ran)
    load, sound, memory = processes.load_rows("starter", 10, "cpu", 2)
    assert load.figure == Spread(4.0, 3.0, 5.0) and sound.figure == Spread(5.0, 4.0, 6.0)
    assert memory.figure == Spread(500.0, 400.0, 600.0) and memory.unit == "MB"
    assert calls[0][0] == "-c" and calls[1][:3] == ["-m", "stable_audio_lite.cli", "generate"]


def test_a_table_has_a_line_for_each_row_and_peer() -> None:
    figure, machine = Spread(2.0, 1.0, 3.0), {"features": ["avx2"], "processor": "P", "threads": 1, "cores": 2}
    peer = Peer(name="other", figure=figure, ratio=Spread(1.5, 1.2, 1.8), difference=2e-6)
    row = Row(part="vae", what="VAE decode", how="float32", unit="s", figure=figure, share=figure, peers=(peer,))
    table = CostTable(model="m", machine=machine | {"device": "cpu", "torch": "2"}, repeats=3, rows=[row])
    assert table.as_text().splitlines()[-2:] == [
        "| VAE decode | float32 | 2 (1 to 3) s | 2.00 |",
        "| | other | 2 (1 to 3) s: ours is 1.5 (1.2 to 1.8) times as fast, outputs differ by 2e-06 of the peak | |",
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--repeats", "0"], "--repeats must be above 0, got 0"),
        (["--seconds", "nan"], "--seconds must be above 0, got nan"),
        (["--steps", "8", "0"], "--steps must be above 0, got 0"),
        (["--dtypes", "float8"], "unknown dtype 'float8'"),
        ([str(TINY), "--only", "load"], "--only load: .*tiny.yaml has no weights; give a bundle"),
        (["no/such/bundle"], "no/such/bundle: no such bundle"),
        (["restorer"], "is of kind complex_stft"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert re.search(words, line)


@pytest.mark.long
def test_memory_of_an_evaluation_is_measured(tmp_path: Path) -> None:
    assert 50 < processes.evaluation_peak(2, 1.0, ["--metrics", "fd_clap", "--clap", "starter"]) < 8000
