"""How fast one U-Net forward is, as a share of what this machine's matrix products reach.

    python -m evaluation.benchmarks.unet --config configs/stable_audio/paper.yaml --batch 2 --frames 1024

FLOPs are torch's own count (FlopCounterMode: matrix products, convolutions and attention). The yardstick is a
4096-cubed matrix product in the same dtype, timed before and after the U-Net, best of both.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from stable_audio_lite.devices import choose_device
from stable_audio_lite.errors import UserError
from stable_audio_lite.models.unet import UNet, UNetConfig
from stable_audio_lite.nn.attention import Condition

MATRIX = 4096
CONTEXT_WIDTH, CONTEXT_TOKENS, LATENT_CHANNELS = 768, 79, 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Rates in FLOP/s and the forward's cost."""

    matrix_rate: float
    flops: int
    seconds: float

    @property
    def rate(self) -> float:
        """FLOP/s of the forward."""
        return self.flops / self.seconds

    @property
    def ratio(self) -> float:
        """The forward's rate as a share of the matrix product's."""
        return self.rate / self.matrix_rate


def build(config: UNetConfig, device: torch.device, dtype: torch.dtype) -> UNet:
    """A U-Net with cheap random weights in `dtype` from the start (1.8 GB for the paper's in bfloat16)."""
    with torch.device("meta"):
        unet = UNet(config, channels=LATENT_CHANNELS, context_width=CONTEXT_WIDTH, context_tokens=CONTEXT_TOKENS)
    unet = unet.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for parameter in unet.parameters():
        parameter.uniform_(-0.03, 0.03)
    return unet


def best_seconds(function: Callable[[], object], repeats: int, device: torch.device) -> float:
    """The least wall time of `repeats` calls, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def matrix_seconds(device: torch.device, dtype: torch.dtype) -> float:
    """Best time of the yardstick matrix product."""
    a, b = (torch.randn(MATRIX, MATRIX, device=device).to(dtype) for _ in range(2))
    return best_seconds(lambda: a @ b, 5, device)


@torch.inference_mode()
def measure(unet: UNet, batch: int, frames: int, *, compiled: bool = False, repeats: int = 5) -> Timing:
    """Time one forward of `batch` x `frames`, its context ready as it is within a generation."""
    device, dtype = unet.null.device, unet.null.dtype
    x = torch.randn(batch, LATENT_CHANNELS, frames, device=device).to(dtype)
    t = torch.rand(batch, device=device)
    tokens = torch.randn(batch, CONTEXT_TOKENS, CONTEXT_WIDTH, device=device)
    mask = torch.ones(batch, CONTEXT_TOKENS, dtype=torch.bool, device=device)
    context = unet.context(Condition(tokens, mask))
    with FlopCounterMode(display=False) as counter:
        unet(x, t, context)
    forward = torch.compile(unet) if compiled else unet
    before = matrix_seconds(device, dtype)
    seconds = best_seconds(lambda: forward(x, t, context), repeats, device)
    after = matrix_seconds(device, dtype)
    matrix_rate = 2 * MATRIX**3 / min(before, after)
    return Timing(matrix_rate=matrix_rate, flops=counter.get_total_flops(), seconds=seconds)


def read_config(path: str | None) -> UNetConfig:
    """The U-Net of a model config, or the paper's without one."""
    if path is None:
        return UNetConfig()
    from stable_audio_lite.config import load_config
    from stable_audio_lite.systems import StableAudioConfig

    return load_config(path, StableAudioConfig).unet


def main() -> None:
    """Print the matrix product's rate, then the U-Net's FLOPs, seconds, rate and ratio."""
    parser = argparse.ArgumentParser(description="U-Net speed against this machine's matrix product.")
    parser.add_argument("--config", help="model config (default: the paper's U-Net)")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--frames", type=int, default=1024)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="time the compiled U-Net as well")
    args = parser.parse_args()
    try:
        unet = build(read_config(args.config), choose_device(args.device), getattr(torch, args.dtype))
    except UserError as error:
        sys.exit(f"error: {error}")
    count = sum(p.numel() for p in unet.parameters())
    print(f"{count:,} parameters, {args.dtype} on {args.device}, {torch.get_num_threads()} threads")
    for compiled in (False, True) if args.compile else (False,):
        timing = measure(unet, args.batch, args.frames, compiled=compiled, repeats=args.repeats)
        print(
            f"{'compiled' if compiled else 'eager'}: matmul {timing.matrix_rate / 1e9:.1f} GFLOP/s, forward "
            f"{timing.flops / 1e9:.1f} GFLOP in {timing.seconds:.3f} s = {timing.rate / 1e9:.1f} GFLOP/s, "
            f"ratio {timing.ratio:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
