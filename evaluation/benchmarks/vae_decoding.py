"""VAE decoding speed beside descript-audio-codec's own blocks on the same random weights.

    python -m evaluation.benchmarks.vae_decoding --seconds 24

The peer is assembled from `dac.model.dac.Decoder`, weight norm in place, run whole (its closing tanh is left off: this
VAE has none). Ours folds weight norm and decodes in cache-sized pieces. Both outputs are compared with the peer's in
float32: the largest difference as a share of its peak, and the signal-to-noise ratio in dB.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from stable_audio_lite.devices import choose_device
from stable_audio_lite.errors import UserError
from stable_audio_lite.models.dac import state_to_dac
from stable_audio_lite.models.waveform_vae import WaveformVAE, WaveformVAEConfig

SAMPLE_RATE = 44100
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One dtype's result: best wall times in seconds, and how far each output is from the peer's in float32."""

    dtype: str
    peer_seconds: float
    our_seconds: float
    our_error: float
    our_snr_db: float
    peer_snr_db: float

    @property
    def ratio(self) -> float:
        """How many times as fast as the peer."""
        return self.peer_seconds / self.our_seconds


def build_pair(config: WaveformVAEConfig, seed: int = 0) -> tuple[WaveformVAE, nn.Module]:
    """Our VAE, folded, and DAC's decoder with the same random weights, both float32 in evaluation mode."""
    from dac.model.dac import Decoder

    torch.manual_seed(seed)
    vae = WaveformVAE(config).requires_grad_(False)
    for name, parameter in vae.decoder.named_parameters():
        # Fresh biases are zero and fresh Snake frequencies one, which would hide an exchange between layers.
        if name.endswith("alpha"):
            parameter.uniform_(0.5, 2.0)
        elif name.endswith("bias"):
            parameter.uniform_(-0.02, 0.02)
    peer = Decoder(config.latent_channels, config.decoder_width, config.strides[::-1], config.audio_channels)
    del peer.model[-1]  # tanh
    prefix = "decoder."
    state = {k.removeprefix(prefix): v for k, v in state_to_dac(vae).items() if k.startswith(prefix)}
    peer.load_state_dict(state)
    return vae.prepare_for_inference(), peer.eval().requires_grad_(False)


def snr_db(output: Tensor, reference: Tensor) -> float:
    """Energy of `reference` over energy of the difference, in dB; infinite where they are equal."""
    noise = (output - reference).square().sum(dtype=torch.float64).item()
    signal = reference.square().sum(dtype=torch.float64).item()
    return 10 * math.log10(signal / noise) if noise else math.inf


@torch.inference_mode()
def measure(
    config: WaveformVAEConfig, seconds: float, dtypes: list[str], repeats: int, device: str = "cpu"
) -> list[Row]:
    """Decode `seconds` of random latents with both, `repeats` times each in turn, and compare."""
    vae, peer = (module.to(device) for module in build_pair(config))
    frames = math.ceil(seconds * SAMPLE_RATE / config.hop)
    latents = torch.randn(1, config.latent_channels, frames, generator=torch.Generator().manual_seed(1)).to(device)
    reference = peer(latents)
    rows = []
    for name in dtypes:
        dtype = DTYPES[name]
        vae, peer, z = vae.to(dtype), peer.to(dtype), latents.to(dtype)
        runs = (lambda peer=peer, z=z: peer(z), lambda vae=vae, z=z: vae.decode_chunked(z))
        (peer_seconds, peer_output), (our_seconds, our_output) = _race(runs, repeats)
        error = (our_output.float() - reference).abs().max() / reference.abs().max()
        rows.append(
            Row(
                dtype=name,
                peer_seconds=peer_seconds,
                our_seconds=our_seconds,
                our_error=error.item(),
                our_snr_db=snr_db(our_output.float(), reference),
                peer_snr_db=snr_db(peer_output.float(), reference),
            )
        )
    return rows


def _race(runs: Sequence[Callable[[], Tensor]], repeats: int) -> list[tuple[float, Tensor]]:
    """Least wall time and the output of each run; they take turns, so that a busy machine slows all of them."""
    best: list[tuple[float, Tensor]] = [(math.inf, torch.empty(0))] * len(runs)
    for _ in range(repeats):
        for index, run in enumerate(runs):
            start = time.perf_counter()
            output = run()
            if output.is_cuda:
                torch.cuda.synchronize()
            best[index] = (min(best[index][0], time.perf_counter() - start), output)
    return best


def main() -> None:
    """Print one line for each dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="model config (default: the paper's VAE)")
    parser.add_argument("--seconds", type=float, default=24.0)
    parser.add_argument("--dtype", choices=(*DTYPES, "both"), default="both")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    args = parser.parse_args()
    dtypes = list(DTYPES) if args.dtype == "both" else [args.dtype]
    try:
        rows = measure(read_config(args.config), args.seconds, dtypes, args.repeats, str(choose_device(args.device)))
    except UserError as error:
        sys.exit(f"error: {error}")
    if args.json:
        print(json.dumps([asdict(row) | {"ratio": row.ratio} for row in rows]))
        return
    print(f"decoding {args.seconds:g} s on {args.device}, {torch.get_num_threads()} threads")
    for row in rows:
        print(
            f"{row.dtype}: DAC's blocks {row.peer_seconds:.2f} s ({row.peer_snr_db:.1f} dB), "
            f"ours {row.our_seconds:.2f} s = {row.ratio:.2f}x; "
            f"largest error {row.our_error:.1e} of peak, {row.our_snr_db:.1f} dB"
        )


def read_config(path: str | None) -> WaveformVAEConfig:
    """The VAE of a model config, or the paper's without one."""
    if path is None:
        return WaveformVAEConfig()
    from stable_audio_lite.config import load_config
    from stable_audio_lite.systems import StableAudioConfig

    return load_config(path, StableAudioConfig).vae


if __name__ == "__main__":
    main()
