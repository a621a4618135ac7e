"""The shipped models: they load alone, make sound of the asked length, keep a waveform, and fit in a small download."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torchaudio
from torch import Tensor

from evaluation.metrics.levels import sound_end
from evaluation.metrics.music import tempo
from stable_audio_lite.bundle import SHIPPED
from stable_audio_lite.clap.checkpoints import load_clap
from stable_audio_lite.clap.mel import log_mel, repeat_pad
from stable_audio_lite.codec import Codec
from stable_audio_lite.diffusion.denoiser import Guidance
from stable_audio_lite.pipeline import StableAudio
from stable_audio_lite.restoration.degradations import Denoise
from stable_audio_lite.restoration.restorer import Restorer, RestoreSettings

MEGABYTE = 2**20


@pytest.fixture(scope="module")
def starter() -> StableAudio:
    return StableAudio.from_pretrained("starter")


def test_generates_sound_of_the_asked_length(starter: StableAudio) -> None:
    result = starter.generate("solo piano", seconds=3, seed=1, steps=8)
    assert result.audio.shape == (1, 2, 3 * 44100)
    assert result.audio.isfinite().all()
    assert 0.003 < float(result.audio.square().mean().sqrt()) < 0.5
    assert not torch.equal(result.audio[0, 0], result.audio[0, 1])  # stereo


def test_same_alone_and_in_a_batch(starter: StableAudio) -> None:
    starter.to(torch.device("cpu"), torch.float32)
    prompts = ["solo piano", "drums and bass, fast"]
    both = starter.generate(prompts, seconds=1, seed=5, steps=4)
    alone = starter.generate(prompts[1], seconds=1, seed=6, steps=4)
    sounds = both.audio[1], alone.audio[0]
    # Latents differ by rounding, after which phases may be found that sound the same and look different.
    one, other = (torch.stft(x, 2048, 512, window=torch.hann_window(2048), return_complex=True).abs() for x in sounds)
    assert float((one - other).norm() / other.norm()) < 0.02


@pytest.mark.parametrize(
    ("prompt", "seconds"),
    [("solo piano, slow, classical", 3.5), ("solo trumpet, jazz", 6.5), ("synth lead, house, fast, drums", 9.5)],
)
def test_sounds_end_when_they_should(starter: StableAudio, prompt: str, seconds: float) -> None:
    """Between whole seconds too, and what follows is no louder than a codec's floor."""
    result = starter.generate(prompt, seconds_total=seconds, seed=1, steps=25)
    assert abs(sound_end(result.audio[0], result.sample_rate) - seconds) <= 0.5


def test_sounds_last_as_long_as_asked_for(starter: StableAudio) -> None:
    """Most of their ends come within the last 0.4 of ten seconds: players hold their last notes so long."""
    prompts = ["solo piano, slow, classical", "solo trumpet, jazz", "solo flute, folk", "acoustic guitar, folk"]
    made = starter.generate(prompts, seconds=10, seed=1, steps=8)
    assert sum(sound_end(audio, made.sample_rate) for audio in made.audio) / len(prompts) > 9.6


def test_the_tempo_is_kept(starter: StableAudio) -> None:
    """Three of four at least, within 4 %; without its pulse the starter keeps one of them."""
    bpm = {"jazz, piano": 120, "rock, distorted guitar": 150, "folk, acoustic guitar": 110, "house, electric bass": 130}
    made = starter.generate([f"{name} with drums, {at} bpm" for name, at in bpm.items()], seconds=8, seed=1, steps=8)
    heard = [tempo(audio, made.sample_rate) or 0.0 for audio in made.audio]
    assert sum(abs(found / at - 1) < 0.04 for found, at in zip(heard, bpm.values(), strict=True)) >= 3, heard


@torch.no_grad()
def test_key_mode_and_tempo_count_and_wording_does_not(starter: StableAudio) -> None:
    """What is expected to come of almost pure noise, for one request in other words and for requests of other music."""
    starter.to(torch.device("cpu"), torch.float32)
    sigma, noise = 20.0, torch.randn(1, 64, 384, generator=torch.Generator().manual_seed(0))

    def differences(piece: str) -> Tensor:
        """Of another wording, another mode, key and tempo from "C major, 120 bpm"."""
        texts = [f"{piece}, {asked}" for asked in ("C major, 120 bpm", "key of C major, 120 bpm", "C minor, 120 bpm")]
        texts += [f"{piece}, F# major, 120 bpm", f"{piece}, C major, 90 bpm"]
        timing = torch.zeros(len(texts)), torch.full((len(texts),), 8.0)
        condition = starter.conditioner(starter.text_encoder.encode(texts), *timing)
        guidance = Guidance(starter.network, starter.process, condition, scale=1.0)
        x = ((1 + sigma**2) ** 0.5 * noise).expand(len(texts), -1, -1)
        estimates = guidance(x, torch.full((len(texts),), sigma))
        return (estimates[1:] - estimates[0]).square().mean((1, 2)).sqrt()

    pieces = ("solo piano, classical", "solo flute, folk", "church organ, classical", "violin, jazz", "choir, folk")
    wording, mode, key, bpm = torch.stack([differences(piece) for piece in pieces]).mean(0).tolist()
    assert mode > 2 * wording and bpm > 2 * wording and key > 4 * wording


def test_a_negative_prompt_is_heard_less_and_deafens_nobody(starter: StableAudio) -> None:
    """By the starter's own CLAP; what it adds to guidance doesn't run away."""
    clap = load_clap("starter").eval()
    asked = {"seconds": 5, "seed": 1, "count": 6}
    without, against = (starter.generate("piano and flute, jazz", **asked, negative=x).audio for x in (None, "piano"))
    other = starter.generate("solo flute, folk", **asked, negative="drums").audio
    assert without.abs().max() < 2 and against.abs().max() < 5 and other.abs().max() < 5

    @torch.inference_mode()
    def piano_in(sounds: Tensor) -> float:
        level = 0.1 / sounds.square().mean((1, 2), keepdim=True).sqrt()
        mono = torchaudio.functional.resample((level * sounds).mean(1), 44100, 48000)
        found = clap.embed_mels([log_mel(clap.config, repeat_pad(sound)) for sound in mono])
        return float((found @ clap.embed_text(["solo piano"])[0]).mean())

    assert piano_in(against) < piano_in(without) - 0.05


def test_silence_is_silent() -> None:
    vae = Codec.from_pretrained("starter", "cpu", "float32").vae
    silence = vae.decode(vae.encode(torch.zeros(1, 2, 65536)).mean)
    assert float(silence.square().mean()) < 1e-7  # -70 dB of full scale


def test_the_vae_keeps_the_waveform() -> None:
    """Four notes of a broken chord, decaying, from left towards right, come back with less than 14 % of noise power."""
    time = torch.arange(2 * 44100) / 44100
    audio = torch.zeros(2, len(time))
    for number, hertz in enumerate((130.8, 164.8, 196.0, 261.6)):
        since = (time - 0.5 * number).clamp_min(0)
        partials = sum(0.5**n * torch.sin(2 * math.pi * (n + 1) * hertz * since) for n in range(6))
        note = 0.067 * partials * torch.exp(-2 * since) * (1 - torch.exp(-400 * since))
        audio += torch.stack(((4.5 - number) * note, (1.5 + number) * note))
    vae = Codec.from_pretrained("starter-vae", "cpu", "float32").vae
    noise = vae.decode(vae.encode(audio[None]).mean)[0, :, : audio.shape[1]] - audio
    assert float(noise.square().sum() / audio.square().sum()) < 0.14


def test_the_restorer_takes_noise_away() -> None:
    """Of three decaying notes under white noise of 10 dB it leaves less than half."""
    restorer = Restorer.from_pretrained("restorer", "cpu")
    time = torch.arange(16000) / 16000
    clean = torch.zeros(1, 16000)
    for number, hertz in enumerate((261.6, 329.6, 392.0)):
        since = (time - 0.3 * number).clamp_min(0)
        partials = sum(0.4**n * torch.sin(2 * math.pi * (n + 1) * hertz * since) for n in range(5))
        clean += 0.1 * partials * torch.exp(-3 * since) * (1 - torch.exp(-400 * since))
    level = float(clean.square().mean().sqrt()) * 10**-0.5
    noisy = clean + level * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    settings = RestoreSettings(steps=10, seed=0)
    found = restorer.restore(noisy, Denoise(20 * math.log10(level)), settings)
    assert float((found - clean).square().sum()) < 0.5 * float((noisy - clean).square().sum())


@pytest.mark.parametrize(("name", "megabytes"), [("starter", 60), ("starter-vae", 15), ("restorer", 8)])
def test_is_small_and_has_a_card(name: str, megabytes: int) -> None:
    assert sum(file.stat().st_size for file in SHIPPED[name].iterdir()) < megabytes * MEGABYTE
    assert f"\n# {name.split('-')[0].capitalize()}" in (SHIPPED[name] / "README.md").read_text()


def test_the_vaes_card_says_what_it_loses_of_recordings() -> None:
    """Which is more than of the corpus that it has heard, and that its table is of."""
    assert re.search(r"real music .* dB of SI-SDR", (SHIPPED["starter-vae"] / "README.md").read_text())
