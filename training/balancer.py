"""Gradient balancer (Défossez et al. 2022, EnCodec, arXiv 2210.13438, section 3.4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class Balancer:
    """Gives each loss on an output a fixed share of the gradient there, whatever the scale of the loss.

    With g_i the gradient of loss i with respect to the output and <|g_i|> the moving average of its norm per item, the
    gradient passed on is the sum of R w_i / (sum of w) g_i / <|g_i|>, divided by the number of items: like any loss it
    is a mean over the batch, whatever the number of processes.

    Args:
        weights: w_i by the losses' names; those that are missing or 0 are left out.
        norm: R.
        decay: of the moving averages, which are corrected for their start.

    Attributes:
        state: sums and weights of the averages, in the order of `weights`; to be saved with a checkpoint.
    """

    def __init__(self, weights: Mapping[str, float], norm: float, decay: float = 0.999):
        self.weights = {k: w for k, w in weights.items() if w}
        self.norm, self.decay = norm, decay
        self.state = torch.zeros(2, len(self.weights))

    def __call__(
        self,
        losses: Mapping[str, Tensor],
        output: Tensor,
        gradient: Callable[[Tensor, Tensor], Tensor],
        mean: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """A scalar whose gradient with respect to `output` (B, ...) is the balanced one.

        `gradient` differentiates a loss with respect to `output` and keeps its graph; `mean` averages a (N,) tensor
        over the processes.
        """
        names = [k for k in self.weights if k in losses]
        places = [list(self.weights).index(k) for k in names]
        grads = [gradient(losses[k], output).detach() for k in names]
        norms = mean(torch.stack([g.flatten(1).norm(dim=1).mean() for g in grads])).to(self.state)
        if bool(torch.isfinite(norms).all()):
            self.state[:, places] *= self.decay
            self.state[0, places] += norms
            self.state[1, places] += 1
        average = (self.state[0] / self.state[1].clamp_min(1e-12))[places].clamp_min(1e-12)
        shares = torch.tensor([self.weights[k] for k in names]) / sum(self.weights[k] for k in names)
        factors = (self.norm * shares / average).tolist()
        balanced = torch.stack([factor * g for factor, g in zip(factors, grads, strict=True)]).sum(0)
        return (output * balanced).sum() / len(output)
