"""Muon, gradient balance, learning rates and averaged weights, against what they are defined to be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from training.balancer import Balancer
from training.ema import EMA
from training.muon import Muon, orthogonalize
from training.task import OptimizerConfig


def differentiate(loss: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, at, retain_graph=True)[0]


def test_balancer_shares_the_gradient_out() -> None:
    """Whatever the losses' scales, each has its share of the norm; the average follows a loss that grows."""
    output = torch.randn(4, 2, 100, requires_grad=True)
    balancer = Balancer({"a": 3.0, "b": 1.0, "absent": 5.0, "none": 0.0}, norm=2.0, decay=0.5)
    for scale in (1.0, 1.0, 10.0):
        losses = {"a": scale * output.square().mean(), "b": 1e4 * output[:, 0].abs().mean(), "none": output.sum()}
        alone = {k: torch.autograd.grad(losses[k], output, retain_graph=True)[0] for k in ("a", "b")}
        total = balancer(losses, output, differentiate, lambda x: x)
        gradient = 4 * torch.autograd.grad(total, output)[0]  # a mean over 4 items
        norms = {k: g.flatten(1).norm(dim=1).mean() for k, g in alone.items()}
        if scale == 1.0:
            expected = 2.0 * (0.75 * alone["a"] / norms["a"] + 0.25 * alone["b"] / norms["b"])
            torch.testing.assert_close(gradient, expected)
    # (1/4 + 1/2 + 10) / (1/4 + 1/2 + 1): the last one weighs most.
    average = float(balancer.state[0, 0] / balancer.state[1, 0])
    assert average == pytest.approx(float(norms["a"]) / 10 * 10.75 / 1.75, rel=1e-4)


def test_a_balanced_gradient_is_a_mean_over_the_batch() -> None:
    """Each of two halves with the same items has twice the whole's gradient per item: their mean is the whole's."""
    half = torch.randn(2, 2, 50)

    def gradient(items: torch.Tensor) -> torch.Tensor:
        output = items.clone().requires_grad_()
        losses = {"a": output.square().mean(), "b": output.abs().mean()}
        total = Balancer({"a": 1.0, "b": 1.0}, norm=2.0)(losses, output, differentiate, lambda x: x)
        return torch.autograd.grad(total, output)[0]

    torch.testing.assert_close(gradient(half.repeat(2, 1, 1)), gradient(half).repeat(2, 1, 1) / 2)


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
    inverse = replace(config, decay="inverse", inverse_gamma=5.0, inverse_power=0.5)
    assert inverse.rate(15, 100) == pytest.approx(0.5)
