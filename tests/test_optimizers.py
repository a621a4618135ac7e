"""Muon, learning rates and averaged weights, against what they are defined to be."""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import nn

from training import muon
from training.ema import EMA
from training.muon import Muon, orthogonalize
from training.task import OptimizerConfig, RunConfig


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"lr": 0.0}, "lr must be above 0"),
        ({"muon_lr": -1.0}, "muon_lr must be above 0"),
        ({"gamma": 0.0}, "gamma must be above 0"),
        ({"lr": 1e30}, "lr must be above 0 and at most 1, got 1e.30"),
        ({"muon_lr": 2.0}, "muon_lr must be above 0 and at most 1"),
        ({"gamma": 1.1}, "gamma must be above 0 and at most 1"),
        ({"weight_decay": 1e9}, "weight_decay must lie in 0..1"),
        ({"weight_decay": -1.0}, "weight_decay must lie in 0..1"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be at least 0"),
        ({"evaluate_every": -1}, "evaluate_every must be at least 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"steps": 0}, "steps must be at least 1"),
    ],
)
def test_settings_out_of_range_are_named(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        if wrong.keys() <= {field.name for field in fields(OptimizerConfig)}:
            OptimizerConfig(**{"lr": 1e-3} | wrong)
        else:
            RunConfig(**{"output": "run", "steps": 1} | wrong)


def test_muon_moves_every_direction_alike() -> None:
    """Singular values of an update are near 1 however unequal the gradient's are; directions are kept."""
    torch.manual_seed(0)
    for shape in ((8, 20), (20, 8)):
        u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
        gradient = u @ torch.diag(torch.logspace(0, -2, 8)) @ v
        update = orthogonalize(gradient)
        assert update.shape == gradient.shape
        assert torch.linalg.svdvals(update)[:6] == pytest.approx(torch.ones(6), abs=0.35)
        assert torch.linalg.svdvals(update).max() < 1.35
        assert ((u.T @ update @ v.T).diagonal() > 0).all()


def test_muon_updates_matrices_of_one_shape_together_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 6), nn.Conv1d(3, 4, 2), nn.Linear(6, 4)]
    together = nn.ModuleList(layers)
    alone = copy.deepcopy(together)
    counts: list[int] = []
    monkeypatch.setattr(muon, "orthogonalize", lambda m: counts.append(len(m)) or orthogonalize(m))
    for module, entries in ((together, 60), (alone, 1)):  # two matrices of 24 entries fit into 60
        monkeypatch.setattr(muon, "_TOGETHER", entries)
        optimizer = Muon(module, lr=0.01, muon_lr=0.1, weight_decay=0.1)
        for step in range(3):
            torch.manual_seed(step)
            for parameter in module.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
    assert counts == [2, 1, 1, 1] * 3 + [1] * 15
    for one, other in zip(together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_muon_updates_gains_by_adamw() -> None:
    torch.manual_seed(0)
    ours, theirs = torch.nn.LayerNorm(4), torch.nn.LayerNorm(4)
    optimizers = Muon(ours, lr=0.1, muon_lr=1.0), torch.optim.AdamW(theirs.parameters(), lr=0.1, weight_decay=0.0)
    for module, optimizer in zip((ours, theirs), optimizers, strict=True):
        torch.manual_seed(1)
        module(torch.randn(3, 4)).pow(2).mul(torch.arange(4.0)).sum().backward()
        optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)


def test_ema_warms_up_and_then_averages() -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    ema = EMA(module, decay=0.9)
    module.weight.data.fill_(1.0)
    ema.update(module, 0)
    assert ema.average["weight"].item() == pytest.approx(1.0)  # decay 0 at the first step
    module.weight.data.fill_(2.0)
    ema.update(module, 10_000_000)
    assert ema.average["weight"].item() == pytest.approx(0.9 * 1.0 + 0.1 * 2.0)


def test_learning_rate_warms_up_and_decays() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=4, decay="cosine")
    assert [config.rate(s, 100) for s in range(3)] == pytest.approx([0.25, 0.5, 0.75], rel=0.01)
    assert config.rate(99, 100) == pytest.approx(0.01, abs=0.002)
    assert replace(config, decay="exponential", gamma=0.5).rate(10, 100) == pytest.approx(0.5**10)
    assert replace(config, decay="inverse").rate(3_000_000, 10**7) == pytest.approx(0.5)
