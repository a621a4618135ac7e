"""Speed of a U-Net's forward pass, as a share of what this machine's matrix products reach.

    python -m evaluation.benchmarks.unet --config configs/stable_audio/paper.yaml --batch 2 --frames 1024

FLOPs are torch's own count (FlopCounterMode: matrix products, convolutions and attention). The yardstick is a
4096-cubed matrix product in the same dtype, which takes turns with the U-Net; the least time of each counts.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from evaluation.benchmarks.timing import Timing, time_in_turns
from stable_audio_lite.command import Parser, guarded
from stable_audio_lite.devices import choose_device
from stable_audio_lite.models.unet import UNet, UNetConfig
from stable_audio_lite.nn.attention import Condition
from stable_audio_lite.systems import load_model_config

MATRIX = 4096
CONTEXT_WIDTH, CONTEXT_TOKENS, LATENT_CHANNELS = 768, 79, 64


@dataclass(frozen=True)
class ForwardSpeed:
    """FLOPs and times of a forward pass, and the matrix product's rate in FLOP/s."""

    flops: int
    timing: Timing
    matrix_rate: float

    def __str__(self) -> str:
        rate = self.flops / self.timing.minimum
        return (
            f"matmul {self.matrix_rate / 1e9:.1f} GFLOP/s, forward {self.flops / 1e9:.1f} GFLOP in {self.timing} = "
            f"{rate / 1e9:.1f} GFLOP/s, ratio {rate / self.matrix_rate:.2f}"
        )


def random_unet(config: UNetConfig, device: torch.device, dtype: torch.dtype) -> UNet:
    """A U-Net with cheap random weights in `dtype` from the start (1.8 GB for the paper's in bfloat16)."""
    with torch.device("meta"):
        unet = UNet(config, channels=LATENT_CHANNELS, context_width=CONTEXT_WIDTH, context_tokens=CONTEXT_TOKENS)
    unet = unet.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for parameter in unet.parameters():
        parameter.uniform_(-0.03, 0.03)
    return unet


@torch.inference_mode()
def time_forward(unet: UNet, batch: int, frames: int, *, compiled: bool = False, repeats: int = 5) -> ForwardSpeed:
    """Time a forward pass of `batch` x `frames`, its context ready as it is within a generation."""
    device, dtype = unet.null.device, unet.null.dtype
    x = torch.randn(batch, LATENT_CHANNELS, frames, device=device).to(dtype)
    t = torch.rand(batch, device=device)
    tokens = torch.randn(batch, CONTEXT_TOKENS, CONTEXT_WIDTH, device=device)
    mask = torch.ones(batch, CONTEXT_TOKENS, dtype=torch.bool, device=device)
    context = unet.context(Condition(tokens, mask))
    with FlopCounterMode(display=False) as counter:
        unet(x, t, context)
    forward = torch.compile(unet) if compiled else unet
    a, b = (torch.randn(MATRIX, MATRIX, device=device).to(dtype) for _ in range(2))
    own, product = time_in_turns((lambda: forward(x, t, context), lambda: a @ b), repeats)
    return ForwardSpeed(counter.get_total_flops(), own, 2 * MATRIX**3 / product.minimum)


def main() -> int:
    """Run the command; returns its exit status."""
    parser = Parser(description=__doc__)
    parser.add_argument("--config", help="model config (default: the paper's U-Net)")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--frames", type=int, default=1024)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="time the compiled U-Net as well")
    return guarded(lambda: _run(parser.parse_args()))


def _run(args: argparse.Namespace) -> None:
    config = load_model_config(args.config).unet if args.config else UNetConfig()
    unet = random_unet(config, choose_device(args.device), getattr(torch, args.dtype))
    count = sum(p.numel() for p in unet.parameters())
    print(f"{count:,} parameters, {args.dtype} on {args.device}, {torch.get_num_threads()} threads")
    for compiled in (False, True) if args.compile else (False,):
        speed = time_forward(unet, args.batch, args.frames, compiled=compiled, repeats=args.repeats)
        print(f"{'compiled' if compiled else 'eager'}: {speed}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
