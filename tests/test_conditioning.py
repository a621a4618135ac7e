"""Timing tokens, and conditions that are dropped for guidance."""

import pytest
import torch

from stable_audio_lite.models.conditioner import Conditioner, TimingConfig, drop
from stable_audio_lite.nn.attention import Condition


def condition(batch: int = 3, tokens: int = 77, width: int = 16) -> Condition:
    return Condition(torch.randn(batch, tokens, width), torch.rand(batch, tokens) < 0.5)


def test_timing_tokens_follow_the_text():
    conditioner = Conditioner(TimingConfig(max_seconds=95), 16)
    text = condition()
    joined = conditioner(text, torch.tensor([0.0, 10.0, 95.0]), torch.tensor([30.0, 10.0, 0.0]))
    assert joined.tokens.shape == (3, 79, 16)
    assert torch.equal(joined.tokens[:, :77], text.tokens) and torch.equal(joined.mask[:, :77], text.mask)
    assert joined.mask[:, 77:].all()
    assert torch.equal(joined.tokens[:, 77], conditioner.seconds_start.weight[[0, 10, 95]])
    assert torch.equal(joined.tokens[:, 78], conditioner.seconds_total.weight[[30, 10, 0]])
    assert {n for n, _ in conditioner.named_parameters()} == {"seconds_start.weight", "seconds_total.weight"}


def test_between_whole_seconds_the_nearest_two_are_mixed():
    conditioner = Conditioner(TimingConfig(max_seconds=95), 16)
    joined = conditioner(condition(), torch.zeros(3), torch.tensor([7.25, 94.5, 95.0]))
    table = conditioner.seconds_total.weight
    expected = torch.stack([0.75 * table[7] + 0.25 * table[8], (table[94] + table[95]) / 2, table[95]])
    assert torch.allclose(joined.tokens[:, 78], expected, atol=1e-6)


@pytest.mark.parametrize("seconds", [-1.0, 95.1, float("nan"), float("inf")])
def test_seconds_outside_the_table_are_refused(seconds):
    conditioner = Conditioner(TimingConfig(max_seconds=95), 16)
    with pytest.raises(ValueError, match="seconds_total must lie in 0..95"):
        conditioner(condition(), torch.zeros(3), torch.tensor([1.0, seconds, 2.0]))


def test_dropped_items_have_the_null_and_the_others_their_own():
    given, null = condition(4), condition(1)
    dropped = torch.tensor([False, True, False, True])
    some = drop(given, null, dropped)
    assert torch.equal(some.tokens[~dropped], given.tokens[~dropped])
    assert torch.equal(some.mask[~dropped], given.mask[~dropped])
    assert torch.equal(some.tokens[dropped], null.tokens.expand(2, -1, -1))
    assert torch.equal(some.mask[dropped], null.mask.expand(2, -1))
    with pytest.raises(ValueError, match="null condition"):
        drop(given, condition(1, 3, 2), dropped)


def test_the_null_learns_only_from_dropped_items():
    null = Condition(torch.zeros(1, 4, 2, requires_grad=True), torch.ones(1, 4, dtype=torch.bool))
    drop(condition(8, 4, 2), null, torch.zeros(8, dtype=torch.bool)).tokens.sum().backward()
    assert not null.tokens.grad.any()
    drop(condition(8, 4, 2), null, torch.ones(8, dtype=torch.bool)).tokens.sum().backward()
    assert (null.tokens.grad == 8).all()
