"""Embedders against reference values and plain definitions, on small random weights in the published files' formats."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from evaluation.embedders import load_embedder
from evaluation.embedders.clap import ClapEmbedder, streamed_log_mel
from evaluation.embedders.openl3 import OpenL3Embedder, load_openl3, mel_spectrogram
from evaluation.embedders.passt import PaSST, PaSSTEmbedder, load_passt
from evaluation.embedders.streams import TargetLevel, mono_at, overlapping_windows, stereo_at
from evaluation.result import Missing
from stable_audio_lite.audio.io import read_audio, write_audio
from stable_audio_lite.clap.mel import log_mel, repeat_pad
from stable_audio_lite.clap.model import Clap
from stable_audio_lite.clap.tokenizer import train_tokenizer
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import save_tensors
from stable_audio_lite.systems import load_model_config
from stable_audio_lite.weights import read_weights

pytestmark = pytest.mark.filterwarnings("ignore:Input image size", "ignore:stft with")

TINY = Path(__file__).parents[1] / "configs" / "stable_audio" / "tiny.yaml"
WIDTHS = (4, 4, 6, 6, 8, 8, 10, 10)


def wave(shape: tuple[int, ...], phase: float) -> torch.Tensor:
    return torch.from_numpy(np.sin(np.arange(math.prod(shape)) * 0.37 + phase)).float().reshape(shape)


def openl3_file(path: Path) -> Path:
    """Known weights as torchopenl3 stores them, its front end's tables included."""
    state = {"speclayer.mel_basis": torch.zeros(3)}
    for index, (fan_in, width) in enumerate(zip((1, *WIDTHS), WIDTHS, strict=False), 1):
        norm, conv = f"batch_normalization_{index}.", f"conv2d_{index}." if index < 8 else "audio_embedding_layer."
        scale, offset = (300, 40) if index == 1 else (1, 0)
        state[norm + "weight"] = 1 + 0.5 * wave((fan_in,), index)
        state[norm + "bias"] = wave((fan_in,), index + 1)
        state[norm + "running_mean"] = wave((fan_in,), index + 2) - offset
        state[norm + "running_var"] = (1 + 0.5 * wave((fan_in,), index + 3)) * scale
        state[norm + "num_batches_tracked"] = torch.tensor(0)
        state[conv + "weight"] = 0.2 * wave((width, fan_in, 3, 3), index)
        state[conv + "bias"] = wave((width,), index + 1)
    torch.save(state, path)
    return path


def test_openl3_equals_the_package_that_published_figures_were_made_with(tmp_path: Path) -> None:
    """Values that kapre 0.3.7 and the Keras network of openl3 0.4.2 gave for these weights and this noise."""
    noise = np.random.default_rng(0).standard_normal(48000) * np.linspace(0.01, 0.3, 48000)
    mel = mel_spectrogram(torch.from_numpy(noise)[None].float())
    assert mel.shape == (1, 256, 199)
    found = [float(mel[0, i, j]) for i, j in ((0, 0), (10, 50), (100, 100), (200, 150), (255, 198))]
    assert found == pytest.approx([-19.168, -18.106, -10.542, -6.859, -28.954], abs=2e-3)
    embedding = load_openl3(openl3_file(tmp_path / "weights.pth.tar")).eval()(mel)[0].detach()
    wanted = [1.2144, -0.2658, 1.1825, 0.8361, -1.2943, -0.2937, 0.6418, -0.7737, -0.5595, 1.5574]
    assert embedding.tolist() == pytest.approx(wanted, abs=1e-3)


def test_openl3_hears_both_channels_from_half_a_second_before_the_start(tmp_path: Path) -> None:
    """2.2 s at 44.1 kHz: centres at 0, 0.5, ... until every sample is heard; left and right one after the other."""
    generator = torch.Generator().manual_seed(0)
    audio = 0.2 * torch.randn(2, round(2.2 * 44100), generator=generator)
    write_audio(tmp_path / "a.wav", audio, 44100)
    network = load_openl3(openl3_file(tmp_path / "weights.pth.tar"))
    found = OpenL3Embedder(network, TargetLevel(), 2).embed(tmp_path / "a.wav")["embedding"]
    padded = F.pad(torch.cat(list(stereo_at(tmp_path / "a.wav", (44100, 48000), TargetLevel())), 1), (24000, 48000))
    own = torch.stack([padded[:, i * 24000 : i * 24000 + 48000] for i in range(len(found))])
    with torch.inference_mode():
        sides = [network(mel_spectrogram(own[:, side])) for side in (0, 1)]
    assert found.shape == (5, 20)  # 2.7 s with what goes before: 1 + ceil(1.7 / 0.5)
    torch.testing.assert_close(found, torch.cat(sides, 1), rtol=1e-4, atol=1e-4)


def test_mono_is_heard_by_both_sides(tmp_path: Path) -> None:
    write_audio(tmp_path / "a.wav", 0.2 * torch.randn(1, 44100, generator=torch.Generator().manual_seed(0)), 44100)
    network = load_openl3(openl3_file(tmp_path / "weights.pth.tar"))
    left, right = OpenL3Embedder(network, TargetLevel(), 8).embed(tmp_path / "a.wav")["embedding"].chunk(2, 1)
    torch.testing.assert_close(left, right)


@pytest.fixture(scope="module")
def passt() -> PaSST:
    pytest.importorskip("hear21passt")
    torch.manual_seed(0)
    network = PaSST(width=64, depth=1, classes=527).eval()
    with torch.no_grad():
        for parameter in network.net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def test_passt_takes_windows_of_ten_seconds_every_five(passt: PaSST, tmp_path: Path) -> None:
    """Starts at 0, 5, ... below the length less 5 s; the last filled up; a sound up to 1.5 s is not."""
    generator = torch.Generator().manual_seed(0)
    embedder = PaSSTEmbedder(passt, TargetLevel(), 2)
    for seconds, starts in ((16.0, (0, 5, 10)), (15.0, (0, 5)), (3.0, (0,)), (1.2, (0,)), (0.05, (0,))):
        write_audio(tmp_path / "a.wav", 0.1 * torch.randn(2, round(seconds * 32000), generator=generator), 32000)
        audio = read_audio(tmp_path / "a.wav", 32000).mean(0)
        audio = audio * 10 ** (-1 / 20) / audio.abs().max()
        own = [audio[i * 32000 : (i + 10) * 32000] for i in starts]
        if seconds > 1.5:
            own = [F.pad(part, (0, 320000 - len(part))) for part in own]
        own = [F.pad(part, (0, max(0, 5120 - len(part)))) for part in own]  # a patch
        heard = embedder.embed(tmp_path / "a.wav")
        with torch.inference_mode():
            wanted = [passt(part[None]) for part in own]
        torch.testing.assert_close(heard["logits"], torch.cat([logits for logits, _ in wanted]), rtol=1e-4, atol=1e-4)
        assert heard["embedding"].shape == (len(starts), 64)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_passt_is_read_from_its_own_file(passt: PaSST, tmp_path: Path, suffix: str) -> None:
    path, state = tmp_path / f"passt{suffix}", passt.net.state_dict()
    torch.save(state, path) if suffix == ".pt" else save_tensors(path, state, {})
    audio = torch.randn(1, 32000, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(load_passt(path).eval()(audio)[0], passt(audio)[0])


@pytest.fixture(scope="module")
def clap() -> Clap:
    torch.manual_seed(0)
    return Clap(load_model_config(TINY).clap, train_tokenizer(["warm slow piano", "fast drums"], 280)).eval()


@pytest.mark.parametrize("seconds", [0.3, 9.9, 10.5, 37.3])
def test_a_spectrogram_made_in_pieces_equals_the_whole(clap: Clap, seconds: float) -> None:
    audio = torch.randn(1, round(seconds * 48000), generator=torch.Generator().manual_seed(0))
    mel = streamed_log_mel(clap.config, audio.split(70001, 1))
    torch.testing.assert_close(mel, log_mel(clap.config, repeat_pad(audio[0])))


def test_clap_hears_the_mean_of_both_channels_at_its_peak(clap: Clap, tmp_path: Path) -> None:
    write_audio(tmp_path / "a.wav", 0.1 * torch.randn(2, 96000, generator=torch.Generator().manual_seed(0)), 48000)
    audio = read_audio(tmp_path / "a.wav", 48000).mean(0)
    wanted = clap.embed_audio(audio[None] * 10 ** (-1 / 20) / audio.abs().max())
    torch.testing.assert_close(ClapEmbedder(clap, TargetLevel()).embed(tmp_path / "a.wav")["embedding"], wanted)
    quiet = ClapEmbedder(clap, TargetLevel("peak", -20.0)).embed(tmp_path / "a.wav")["embedding"]
    assert not torch.allclose(quiet, wanted, atol=1e-4)


@pytest.mark.parametrize(("length", "count"), [(0, 1), (9, 1), (10, 1), (11, 2), (15, 2), (16, 3), (31, 6)])
@pytest.mark.parametrize("block", [1, 4, 100])
def test_windows_hold_every_sample(length: int, count: int, block: int) -> None:
    audio = torch.arange(1.0, length + 1)[None]
    found = list(overlapping_windows(audio.split(block, 1) if length else [], 10, 5, 1))
    padded = F.pad(audio, (0, 100))
    assert len(found) == count
    for index, window in enumerate(found):
        assert torch.equal(window, padded[:, 5 * index : 5 * index + 10])


def test_levels_are_told_as_they_are_measured() -> None:
    """A peak is that of what is heard, a loudness that of the file."""
    assert TargetLevel().of("mean") == "peak -1, of the mean"
    assert TargetLevel("lufs", -23.0).of("mean") == "lufs -23, or peak -1 of less than 0.4 s or below -70, of the file"


def test_settings_of_a_clap_name_what_its_weights_do_not(clap: Clap) -> None:
    """Its tokenizer, and where its mel bands begin."""
    other = Clap(replace(clap.config, mel_lowest=50.0), train_tokenizer(["loud organ", "slow choir"], 280))
    other.load_state_dict(clap.state_dict())
    one, two = ClapEmbedder(clap, TargetLevel()).settings, ClapEmbedder(other, TargetLevel()).settings
    assert {name for name in one if one[name] != two[name]} == {"tokenizer", "mel"}


def test_streams_are_at_their_level_and_silence_is_left_alone(tmp_path: Path) -> None:
    audio = 0.05 * torch.randn(2, 30000, generator=torch.Generator().manual_seed(0))
    write_audio(tmp_path / "a.wav", audio, 44100)
    write_audio(tmp_path / "silent.wav", torch.zeros(2, 30000), 44100)
    whole = torch.cat(list(stereo_at(tmp_path / "a.wav", (44100,), TargetLevel())), 1)
    assert float(whole.abs().max()) == pytest.approx(10 ** (-1 / 20))
    torch.testing.assert_close(whole / whole.abs().max(), audio / audio.abs().max(), atol=1e-5, rtol=0)
    one = torch.cat(list(mono_at(tmp_path / "a.wav", 16000, TargetLevel("peak", -6.0))), 1)
    assert one.shape == (1, 10884) and float(one.abs().max()) == pytest.approx(10 ** (-6 / 20))
    assert not torch.cat(list(stereo_at(tmp_path / "silent.wav", (44100, 48000), TargetLevel())), 1).any()


@pytest.mark.parametrize(("name", "file"), [("openl3", "music_512.pth.tar"), ("passt", "476-swa.pt")])
def test_missing_weights_say_what_to_fetch_and_where_to_put_it(name: str, file: str, tmp_path: Path) -> None:
    def load(source: str | None) -> None:
        load_embedder(name, source, tmp_path, torch.device("cpu"), level=TargetLevel(), batch=1, content="music")

    with pytest.raises(Missing, match=file) as caught:
        load(None)
    assert str(tmp_path) in str(caught.value) and f"--{name}" in str(caught.value) and "https://" in str(caught.value)
    with pytest.raises(UserError, match="no such file") as wrong:
        load("nowhere.pt")
    assert not isinstance(wrong.value, Missing)


@pytest.mark.parametrize("load", [load_openl3, load_passt])
def test_broken_and_foreign_weights_are_refused(load, tmp_path: Path) -> None:
    pytest.importorskip("hear21passt")
    (tmp_path / "broken.pt").write_bytes(b"\x80\x02nothing")
    torch.save({"conv2d_1.weight": torch.zeros(2, 1, 3, 3), "cls_token": torch.zeros(1, 1, 64)}, tmp_path / "other.pt")
    for name in ("broken.pt", "other.pt"):
        with pytest.raises(UserError, match=name):
            load(tmp_path / name)


def test_code_in_a_weights_file_is_not_run(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "harm",))

    torch.save({"state_dict": Harmful()}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="not loaded"):
        read_weights(tmp_path / "a.pt")
    assert not (tmp_path / "harm").exists()


def test_openl3_needs_all_its_tensors(tmp_path: Path) -> None:
    state = torch.load(openl3_file(tmp_path / "a.pt"), weights_only=True)
    del state["batch_normalization_5.running_mean"]
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"norms\.4\.running_mean"):
        load_openl3(tmp_path / "a.pt")
