"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for matrices and convolutions, AdamW for the rest.

The momentum of a weight, seen as a matrix of output rows, is replaced by the nearest orthogonal matrix, found by
Newton-Schulz iteration: every direction of the update has the same size, so rare ones are learned as fast as common
ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from training.shard import full, sharded_like

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_MOMENTUM = 0.9  # Nesterov's
_TOGETHER = 2**22  # entries of small matrices that are orthogonalised at once, which a GPU does as fast as one of them


def orthogonalize(matrices: Tensor) -> Tensor:
    """Matrices with the singular vectors of `matrices` (..., rows, columns) and singular values near 1 (.7 to 1.2)."""
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).float()
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(AdamW):
    """AdamW, except that in groups marked `muon` the update is orthogonalised momentum.

    Args:
        module: parameters of two or more axes are updated by Muon, all others by AdamW.
        lr: of AdamW.
        muon_lr: of Muon, in units of the matrix's spectral norm.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        lr: float,
        muon_lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ):
        parameters = [p for p in module.parameters() if p.requires_grad]
        matrices = [p for p in parameters if _is_matrix(p)]
        others = [p for p in parameters if not _is_matrix(p)]
        groups = [
            {"params": matrices, "muon": True, "scale": muon_lr / lr},
            {"params": others, "muon": False, "scale": 1.0},
        ]
        super().__init__(groups, lr=lr, betas=betas, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[no-untyped-def, override]
        """Update all parameters once."""
        for group in self.param_groups:
            if group["muon"]:
                for parameters in _batches([p for p in group["params"] if p.grad is not None]):
                    self._orthogonal_step(parameters, group)
        # AdamW skips parameters without a gradient: hide those that Muon updates.
        done = [(p, p.grad) for g in self.param_groups if g["muon"] for p in g["params"]]
        for parameter, _ in done:
            parameter.grad = None
        super().step(closure)
        for parameter, grad in done:
            parameter.grad = grad

    def _orthogonal_step(self, parameters: Sequence[Tensor], group: dict) -> None:
        """Update parameters of one shape."""
        updates = torch.stack([full(self._momentum(parameter)).flatten(1) for parameter in parameters])
        # Rows longer than columns would otherwise move less per entry (the usual shape factor).
        shape_factor = max(1.0, updates.shape[1] / updates.shape[2]) ** 0.5
        for parameter, update in zip(parameters, orthogonalize(updates), strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            update = sharded_like(update.reshape(parameter.shape), parameter)
            parameter.add_(update, alpha=-group["lr"] * group["scale"] * shape_factor)

    def _momentum(self, parameter: Tensor) -> Tensor:
        """Add the parameter's gradient to its momentum; returns Nesterov's."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if "momentum" not in state:
            state["step"] = torch.zeros(())  # AdamW expects to find one when it is loaded
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - _MOMENTUM)
        return gradient.lerp(state["momentum"], _MOMENTUM)


def _batches(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield all parameters in lists of one shape, which are short where matrices are large."""
    alike = defaultdict(list)
    for parameter in parameters:
        alike[parameter.shape].append(parameter)
    for shape, those in alike.items():
        count = max(1, _TOGETHER // shape.numel())
        yield from (those[i : i + count] for i in range(0, len(those), count))


def _is_matrix(parameter: Tensor) -> bool:
    """Check for at least two axes longer than 1: gains, biases and Snake frequencies have one."""
    return sum(size > 1 for size in parameter.shape) >= 2
