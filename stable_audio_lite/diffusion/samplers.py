"""k-diffusion's solvers for any denoiser, with noise seeded per item.

The one module that knows k-diffusion. A sampler takes x (B, ...) from noise level sigmas[0] to sigmas[-1]:

    noise = ItemNoise(seeds, shape)
    SAMPLERS["dpmpp-3m-sde"](denoiser, noise() * sigmas[0], sigmas, noise=noise)
"""

from __future__ import annotations

import builtins
import functools
import importlib.machinery
import importlib.util
import math
import types
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x, sigma) -> x0, for x (B, ...) = x0 + sigma * eps and sigma (B,)."""


class Sampler(Protocol):
    """A solver from sigmas[0] to sigmas[-1]."""

    def __call__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        sigmas: Tensor,
        *,
        noise: Callable[[], Tensor],
        on_step: Callable[[], None] | None = None,
    ) -> Tensor:
        """Draw a sample.

        Args:
            denoiser: estimates x0.
            x: (B, ...) at noise level sigmas[0], which is standard normal noise times that.
            sigmas: (steps + 1,) falling noise levels; end in 0 for a clean result.
            noise: returns fresh standard normal noise of x's shape at each call; ddpm and the `-sde` samplers add it
                at each step.
            on_step: called after the denoiser in each step.

        Returns:
            (B, ...) in x's dtype.

        Raises:
            ValueError: sigmas aren't falling.
        """
        ...


class ItemNoise:
    """Standard normal noise from one seed per item, the same for an item alone, in any batch and on any device.

    Args:
        seeds: one per item.
        shape: of one item.
        device: where the noise goes; it is drawn on the CPU.
        frames: of the last axis, the first so many of the noise; None: all.
    """

    def __init__(
        self, seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu", frames: int | None = None
    ) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape, self.device, self.frames = tuple(shape), device, frames

    def __call__(self) -> Tensor:
        """Draw the next (items, *shape), float32."""
        rows = [torch.randn(self.shape, generator=generator)[..., : self.frames] for generator in self.generators]
        return torch.stack(rows).to(self.device)


def _solve(
    name: str,
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: Callable[[], Tensor],
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """Run k-diffusion's function `name`; see `Sampler`."""
    if sigmas.ndim != 1 or len(sigmas) < 2 or not bool((sigmas.diff() < 0).all()):
        raise ValueError(f"sigmas must be at least 2 falling noise levels, got {sigmas.tolist()}")
    options: dict[str, Any] = {"disable": True}
    if on_step is not None:
        options["callback"] = lambda state: on_step()
    if len(sigmas) == 2 and sigmas[-1] == 0:
        # One step to zero is the same for every solver, and k-diffusion's SDE functions trip over it.
        name = "sample_dpmpp_2m"
    if name.endswith(("_sde", "_ancestral")):
        # k-diffusion's own choice, a Brownian tree, is slow, and pays only where steps are retaken; here none is, so
        # unit normal noise per step has the same law.
        options["noise_sampler"] = lambda sigma, sigma_next: noise().to(x)
    return getattr(_k_sampling(), name)(denoiser, x, sigmas.to(x), **options)


def polyexponential_sigmas(steps: int, sigma_min: float, sigma_max: float, rho: float = 1.0) -> Tensor:
    """Noise levels for `steps` sampler steps: sigma_max down to sigma_min, then 0.

    Equal steps in log sigma for rho = 1; a larger rho spends more of them at low noise.

    Returns:
        (steps + 1,) float32 on the CPU.

    Raises:
        ValueError: steps < 1, rho <= 0, or not 0 < sigma_min < sigma_max.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"expected 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    if not rho > 0:
        raise ValueError(f"rho must be above 0, got {rho}")
    ramp = torch.linspace(1, 0, steps, dtype=torch.float64) ** rho
    low, high = math.log(sigma_min), math.log(sigma_max)
    sigmas = torch.exp(low + ramp * (high - low))
    return torch.cat((sigmas, sigmas.new_zeros(1))).float()


@functools.cache
def _k_sampling() -> types.ModuleType:
    """Import k_diffusion.sampling alone.

    Importing k_diffusion runs its training and evaluation code with torchvision and more, which takes seconds. So the
    one file is run by itself, and what it imports only for functions that aren't used here (SciPy's integrals, ODE
    solvers and Brownian trees, .3 s on a fast machine) is left out, as is its `utils` but for one function.
    """
    package = importlib.util.find_spec("k_diffusion")
    folders = list(package.submodule_search_locations or ()) if package else []
    spec = importlib.machinery.PathFinder.find_spec("sampling", folders)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError("k-diffusion is missing; install it with: pip install k-diffusion")
    utils = types.SimpleNamespace(append_dims=lambda x, ndim: x.reshape(*x.shape, *[1] * (ndim - x.ndim)))
    left_out = types.SimpleNamespace(utils=utils, integrate=None, odeint=None)

    def import_used(name: str, *args: Any) -> Any:
        return left_out if name in ("", "scipy", "torchdiffeq", "torchsde") else builtins.__import__(name, *args)

    module = importlib.util.module_from_spec(spec)
    module.__dict__["__builtins__"] = vars(builtins) | {"__import__": import_used}
    spec.loader.exec_module(module)
    return module


SAMPLERS: dict[str, Sampler] = {
    "dpmpp-2m": functools.partial(_solve, "sample_dpmpp_2m"),
    "dpmpp-2m-sde": functools.partial(_solve, "sample_dpmpp_2m_sde"),
    "dpmpp-3m-sde": functools.partial(_solve, "sample_dpmpp_3m_sde"),
    "ddim": functools.partial(_solve, "sample_euler"),
    "ddpm": functools.partial(_solve, "sample_euler_ancestral"),
}
"""DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095) by name: 2M as an ODE, 2M and 3M as SDEs; DDIM (Song et al.
2020, arXiv 2010.02502), which takes the estimate of x0 for constant within a step; and DDPM's ancestral sampling (Ho et
al. 2020, arXiv 2006.11239, algorithm 2, with the posterior's variance of equation 7)."""
