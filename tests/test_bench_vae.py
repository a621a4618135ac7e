"""The decoder benchmark compares equal things: same weights, same output, honest error measures."""

import math

import pytest
import torch

from evaluation.benchmarks.timing import Timing, time_in_turns
from evaluation.benchmarks.vae_decoding import decoder_pair, snr_db, time_decoding
from stable_audio_lite.models.waveform_vae import WaveformVAEConfig

SMALL = WaveformVAEConfig(encoder_width=8, decoder_width=32, strides=(2, 4), latent_channels=4)


def test_pair_gives_the_same_output_and_keeps_the_peers_weight_norm():
    vae, peer = decoder_pair(SMALL)
    assert any(name.endswith("weight_g") for name, _ in peer.named_parameters())
    assert not any(name.endswith("weight_g") for name, _ in vae.named_parameters())
    z = torch.randn(1, 4, 33)
    ours, theirs = vae.decode_chunked(z, chunk_frames=8), peer(z)
    assert theirs.std() > 0.01
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_rows_hold_both_times_and_the_accuracy_of_each_dtype():
    exact, rounded = time_decoding(SMALL, seconds=0.05, dtypes=["float32", "bfloat16"], repeats=1)
    assert exact.our_error < 1e-4 and exact.our_snr_db > 100
    assert 20 < rounded.our_snr_db < exact.our_snr_db
    assert exact.ratio == exact.peer_seconds / exact.our_seconds > 0


def test_snr_of_known_noise():
    signal = torch.ones(1000)
    assert snr_db(signal * 1.01, signal) == pytest.approx(40, abs=0.01)
    assert snr_db(signal, signal) == math.inf


def test_functions_are_timed_in_turns_and_warmups_do_not_count():
    calls = []
    one, other = time_in_turns((lambda: calls.append(1) or 7, lambda: calls.append(2)), repeats=3)
    assert calls == [1, 2] * 4 and one.output == 7 and len(one.seconds) == len(other.seconds) == 3
    timing = Timing((0.3, 0.1, 0.2), None)
    assert timing.minimum == 0.1 and str(timing) == "0.100 s (median 0.200, most 0.300)"
