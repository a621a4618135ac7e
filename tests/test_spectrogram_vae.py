"""The VAE on spectrograms: what its features keep, phases, stereo, level, streams that meet without a seam."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stable_audio_lite.audio.phase import GriffinLim, advance
from stable_audio_lite.models.spectrogram_vae import (
    HOP_SAMPLES,
    WINDOW_SAMPLES,
    FeatureTransform,
    SpectralFeatures,
    SpectrogramVAE,
    SpectrogramVAEConfig,
    SpectrumStream,
)

SMALL = SpectrogramVAEConfig(kind="spectrogram", width=32, encoder_blocks=1, decoder_blocks=2)
RATE = 44100


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def chord(seconds: float, *frequencies: float) -> Tensor:
    """Plucked partials, (T,), T a multiple of 1024."""
    time = torch.arange(round(seconds * RATE / 1024) * 1024) / RATE
    tones = [torch.sin(2 * math.pi * f * k * time) / k for f in frequencies for k in range(1, 6)]
    return 0.05 * torch.stack(tones).sum(0) * (-3 * (time % 0.8)).exp()


def resynthesise(audio: Tensor, iterations: int = 16) -> Tensor:
    """Sound of the features of (2, T) audio, decoded piece by piece as the VAE does."""
    transform = FeatureTransform()
    features = transform.features(audio[None])

    def between(first: int, last: int) -> SpectralFeatures:
        return SpectralFeatures(features.levels[:, :, 2 * first : 2 * last], features.stereo[..., first:last])

    return torch.cat(list(SpectrumStream(transform, iterations).sound(between, 1, audio.shape[1] // 1024)), 2)[0]


def spectral_error(one: Tensor, other: Tensor) -> Tensor:
    """Relative distance of magnitude spectra, (frames,), of two (C, T) sounds."""
    window = torch.hann_window(WINDOW_SAMPLES)
    a, b = (torch.stft(x, WINDOW_SAMPLES, HOP_SAMPLES, window=window, return_complex=True).abs() for x in (one, other))
    return (a - b).square().sum((0, 1)).sqrt() / a.square().sum((0, 1)).mean().sqrt()


def decibels(x: Tensor) -> float:
    return 10 * math.log10(max(float(x.square().mean()), 1e-20))


def test_features_are_what_they_are_called() -> None:
    """A full-scale sine has magnitude 1 in its bin; silence lies at the floor; pan and correlation have their signs."""
    time = torch.arange(64 * 1024) / WINDOW_SAMPLES
    sine = torch.sin(2 * math.pi * 100 * time)
    transform = FeatureTransform()
    mono = transform.features(torch.stack((sine, sine))[None])
    assert mono.levels.shape == (1, 320, 128) and mono.stereo.shape == (1, 3, 32, 64)
    inner = mono.levels[0, :, 8:-8]
    assert float(inner[100].exp().mean()) == pytest.approx(1, abs=1e-3)
    assert float(inner[200].max()) < math.log(2e-4)
    silence = transform.features(torch.zeros(1, 2, 4096))
    torch.testing.assert_close(silence.levels, torch.full_like(silence.levels, math.log(1e-4)))
    assert not silence.stereo.any()
    band = int(mono.stereo[0, 1, :, 30].argmax())
    for pair, wanted in (
        ((sine, sine), (0, 1, 0)),
        ((sine, 0 * sine), (1, 0, 0)),
        ((0 * sine, sine), (-1, 0, 0)),
        ((sine, -sine), (0, -1, 0)),
        (
            (sine, sine.roll(512 // 100)),
            (0, math.cos(2 * math.pi * 100 * 5 / WINDOW_SAMPLES), math.sin(math.pi * 1000 / 2048)),
        ),
    ):
        stokes = transform.features(torch.stack(pair)[None]).stereo[0, :, band, 30]
        assert stokes.tolist() == pytest.approx(wanted, abs=2e-3)


def test_phases_of_peaks_make_a_steady_sine() -> None:
    """Advanced phases of a sine between two bins are those of its spectrum, up to a constant."""
    window = torch.hann_window(WINDOW_SAMPLES)
    tone = torch.sin(2 * math.pi * 60.3 * torch.arange(40 * HOP_SAMPLES) / WINDOW_SAMPLES)
    spectrum = torch.fft.rfft(tone.unfold(0, WINDOW_SAMPLES, HOP_SAMPLES) * window)
    phases = advance(spectrum.abs(), spectrum[0].angle(), HOP_SAMPLES)
    off = torch.polar(torch.ones_like(phases), phases - spectrum.angle())[:, 59:62]
    turned = (off / off[0]).angle()
    assert float(turned.diff(dim=0).abs().max()) < 0.08  # radians a hop, of the 15.15 turns


def test_griffin_lim_comes_nearer_and_keeps_what_is_fixed() -> None:
    window = torch.hann_window(WINDOW_SAMPLES)
    sound = chord(1.0, 220.0, 277.0)[None]
    spectrum = torch.fft.rfft(sound.unfold(-1, WINDOW_SAMPLES, HOP_SAMPLES) * window)
    magnitude, start = spectrum.abs(), 2 * math.pi * torch.rand(spectrum.shape)
    errors = []
    for iterations in (1, 8, 32):
        phases = GriffinLim(window, HOP_SAMPLES, iterations)
        found = phases(magnitude, start.clone())
        again = phases.analyse(phases.synthesise(found)).abs()
        errors.append(float((again - magnitude)[:, 3:-3].norm() / magnitude[:, 3:-3].norm()))
    assert errors[0] > 1.5 * errors[1] > 1.2 * errors[2]
    fixed = spectrum[:, :5]
    assert torch.equal(GriffinLim(window, HOP_SAMPLES, 4)(magnitude, start.clone(), fixed)[:, :5], fixed)


def test_stereo_image_survives() -> None:
    """Mono comes back mono, panned panned, wide wide, and out of phase out of phase."""
    tone, other = chord(1.5, 220.0, 330.0), chord(1.5, 261.6, 392.0)

    def image(left: Tensor, right: Tensor) -> tuple[float, float]:
        """Levels of right beside left, and of difference beside sum, in dB."""
        out = resynthesise(torch.stack((left, right)))
        return decibels(out[1]) - decibels(out[0]), decibels(out[0] - out[1]) - decibels(out[0] + out[1])

    assert image(tone, tone)[1] < -40
    assert image(tone, 0.25 * tone)[0] == pytest.approx(-12, abs=0.5)
    assert image(tone, 0 * tone)[0] < -40
    assert image(tone, -tone)[1] > 40
    assert image(tone, other)[1] == pytest.approx(0, abs=1.5)
    noise = 0.05 * torch.randn(2, len(tone))
    assert image(noise[0], noise[1])[1] == pytest.approx(0, abs=1.5)


def test_silence_and_gain() -> None:
    """Silence in, silence out; and twice as loud in, twice as loud out, where it is above the floor."""
    sound = chord(1.0, 196.0).repeat(2, 1)
    assert decibels(resynthesise(0 * sound)) < -90
    levels = [decibels(resynthesise(gain * sound)) - decibels(gain * sound) for gain in (0.1, 1.0, 4.0)]
    assert levels == pytest.approx([0, 0, 0], abs=0.7)


def test_what_is_quieter_than_the_floor_is_kept() -> None:
    """A tone of -90 dB beside a loud one comes back; of what the levels can't say, -100 dB, nothing does."""
    time = torch.arange(64 * 1024) / WINDOW_SAMPLES
    loud, quiet = (torch.sin(2 * math.pi * bin * time) for bin in (60, 200))
    transform = FeatureTransform()
    for level, wanted in ((-70, -70), (-90, -90), (-100, -math.inf)):
        sound = 0.1 * loud + 10 ** (level / 20) * quiet
        magnitudes, _ = transform.components(transform.features(torch.stack((sound, sound))[None]))
        found = transform.scale * float(magnitudes[0, :, 40, 200].square().mean().sqrt())
        assert (20 * math.log10(found) if found else -math.inf) == pytest.approx(wanted, abs=0.5)


def test_magnitudes_survive_the_phases() -> None:
    """Spectra of a sound resynthesised from its own features are near, and nearer the longer phases are looked for."""
    sound = chord(2.0, 220.0, 277.2).repeat(2, 1)
    errors = [float(spectral_error(sound, resynthesise(sound, iterations)).mean()) for iterations in (1, 16)]
    assert errors[1] < 0.2 and errors[1] < 0.9 * errors[0]


def test_pieces_of_a_stream_meet_without_a_seam() -> None:
    """The spectral error where pieces meet is no larger than elsewhere; three pieces of 128 frames here."""
    sound = torch.stack((chord(9.0, 220.0, 277.2), chord(9.0, 196.0, 329.6)))
    error = spectral_error(sound, resynthesise(sound))
    seams = torch.cat([error[256 * n - 3 : 256 * n + 4] for n in (1, 2, 3)])
    assert float(seams.median()) < float(error.quantile(0.75))
    assert float(seams.max()) < float(error.quantile(0.99)) + 0.02


def lively(config: SpectrogramVAEConfig = SMALL) -> SpectrogramVAE:
    """Blocks that do something."""
    vae = SpectrogramVAE(config)
    for module in vae.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return vae.requires_grad_(False)


@pytest.mark.parametrize("frames", [1, 130, 300])
def test_decoding_is_the_same_whole_and_as_a_stream(frames: int) -> None:
    """To the bit, whatever pieces are asked for, and again; every sample is there."""
    vae, latents = lively(), torch.randn(2, 64, frames)
    whole = vae.decode(latents)
    assert whole.shape == (2, 2, frames * 1024)
    assert torch.equal(torch.cat(list(vae.decode_stream(latents, 7)), 2), whole)
    assert torch.equal(vae.decode(latents), whole)


@pytest.mark.parametrize(("latents", "frames"), [(60, 40), (200, 126), (200, 150), (60, 60), (60, 70)])
def test_decoding_the_first_frames_alone(latents: int, frames: int) -> None:
    """Every sample is that of the whole, nearly so at the very end."""
    vae, data = lively(), torch.randn(1, 64, latents)
    with torch.no_grad():
        whole, part = vae.decode(data), torch.cat(list(vae.decode_stream(data, frames=frames)), 2)
        count = min(frames, latents) * 1024
        assert part.shape[2] == count
        steady = (min(frames, latents) - 24) * 1024
        torch.testing.assert_close(part[..., :steady], whole[..., :steady], atol=1e-4, rtol=0)
        end = whole[..., count - 1024 : count]
    assert float((part[..., -1024:] - end).norm() / end.norm()) < 0.1  # half, if nothing followed


def test_an_item_sounds_the_same_in_a_batch() -> None:
    vae, latents = lively(), torch.randn(3, 64, 20)
    alone = vae.decode(latents[1:2])
    assert float((vae.decode(latents)[1:2] - alone).norm() / alone.norm()) < 1e-3


def test_what_lies_far_behind_changes_no_sample() -> None:
    """Decoding is causal but for some frames: a stream can begin before its end is known."""
    vae, latents = lively(), torch.randn(1, 64, 400)
    other = torch.cat((latents[:, :, :300], torch.randn(1, 64, 100)), 2)
    assert torch.equal(
        vae.decode(latents)[:, :, : 256 * 1024 - WINDOW_SAMPLES], vae.decode(other)[:, :, : 256 * 1024 - WINDOW_SAMPLES]
    )


@pytest.mark.parametrize("chunk", [3, 13])
def test_encoding_in_pieces_equals_whole(chunk: int) -> None:
    vae = lively(replace(SMALL, encoder_blocks=2))
    audio = 0.1 * torch.randn(1, 2, 60 * 1024 - 100)
    one = vae.encode(audio)
    many = list(vae.encode_stream(audio.split(1500, 2), chunk))
    torch.testing.assert_close(torch.cat([p.mean for p in many], 2), one.mean, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(torch.cat([p.std for p in many], 2), one.std, atol=2e-4, rtol=1e-3)


def test_packing_and_calibration() -> None:
    """Unpacking gives features back; after calibration levels have mean 0 and standard deviation 1."""
    vae, audio = lively(), 0.1 * torch.randn(4, 2, 32 * 1024)
    vae.calibrate(audio)
    features = vae.transform.features(audio)
    packed = vae.encoder.pack(features)
    for got, wanted in zip(vae.encoder.unpack(packed), features, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    levels = packed[:, :320].transpose(0, 1).flatten(1)
    torch.testing.assert_close(levels.mean(1), torch.zeros(320), atol=0.15, rtol=0)
    assert 0.2 < float(levels.std(1).mean()) < 1.1


def test_config_and_latents_are_checked() -> None:
    with pytest.raises(ValueError, match="iterations"):
        replace(SMALL, iterations=0)
    with pytest.raises(ValueError, match=r"expected latents \(B, 64, F\)"):
        SpectrogramVAE(SMALL).decode(torch.zeros(1, 63, 4))
    with pytest.raises(ValueError, match="chunk_frames"):
        next(SpectrogramVAE(SMALL).decode_stream(torch.zeros(1, 64, 4), 0))
    assert SMALL.hop == 1024 and SMALL.audio_channels == 2


def test_phases_between_known_sound_fit_it_on_both_sides() -> None:
    """Far from the frames in between nothing changes; at their edges the sound goes on without a jump in phase."""
    vae = lively()
    sound = chord(3.0, 220.0, 277.2).expand(1, 2, -1) * torch.tensor([[1.0], [0.5]])
    frames = sound.shape[2] // 1024
    features = vae.transform.features(sound)
    vae._features = (
        lambda latents, first, last: SpectralFeatures(  # as a VAE that loses nothing would decode
            features.levels[:, :, 2 * first : 2 * last], features.stereo[..., first:last]
        )
    )
    made = vae.decode_between(torch.zeros(1, 64, frames), sound, 40, 70)
    assert made.shape == sound.shape
    far = torch.cat(
        (made[..., : 36 * 1024] - sound[..., : 36 * 1024], made[..., 76 * 1024 :] - sound[..., 76 * 1024 :]), -1
    )
    assert float(far.abs().max()) < 1e-4
    inside = slice(44 * 1024, 66 * 1024)
    assert float((made - sound)[..., inside].abs().max()) > 1e-3  # found anew
    error = spectral_error(sound[0], made[0])
    edges = torch.cat((error[78:84], error[138:144]))
    assert float(edges.max()) < 0.25
    for ends in ((0, 30), (frames - 30, frames)):
        open_ended = vae.decode_between(torch.zeros(1, 64, frames), sound, *ends)
        assert open_ended.isfinite().all() and float(spectral_error(sound[0], open_ended[0]).mean()) < 0.15


def test_what_the_decoder_gets_wrong_beside_a_stretch_is_corrected_at_its_edges() -> None:
    """Levels that are wrong all along are right at the edges, and as decoded in the middle; open ends are no other."""
    vae = lively()
    sound = (0.05 * torch.randn(3 * RATE // 1024 * 1024)).expand(1, 2, -1)
    frames = sound.shape[2] // 1024
    features = vae.transform.features(sound)
    wrong = torch.tensor(2.0).log() * torch.randn(320, 1).sign()  # by 6 dB
    vae._features = lambda latents, first, last: SpectralFeatures(
        features.levels[:, :, 2 * first : 2 * last] + wrong, features.stereo[..., first:last]
    )

    def errors(first: int, last: int) -> Tensor:
        """Mean of the levels' errors in each spectrum, by the sign that the decoder gives them."""
        made = vae.decode_between(torch.zeros(1, 64, frames), sound, first, last)
        return ((vae.transform.features(made).levels - features.levels) * wrong).mean((0, 1)) / wrong.square().mean()

    found = errors(4, frames - 4)
    assert float(found[6:16].abs().max()) < 0.4 and float(found[-16:-6].abs().max()) < 0.4
    assert float(found[frames - 20 : frames + 20].mean()) > 0.6
    assert float(errors(4, frames)[6:16].abs().max()) < 0.4 and float(errors(0, frames - 4)[-16:-6].abs().max()) < 0.4
