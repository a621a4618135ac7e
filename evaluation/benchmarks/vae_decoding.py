"""Speed of VAE decoding beside descript-audio-codec's own blocks on the same random weights.

    python -m evaluation.benchmarks.vae_decoding --seconds 24

The peer is assembled from `dac.model.dac.Decoder`, weight norm in place, run whole (its closing tanh is left off: this
VAE has none). Ours folds weight norm and decodes in cache-sized pieces. Both outputs are compared with the peer's in
float32: the largest difference as a share of its peak, and the signal-to-noise ratio in dB.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from evaluation.benchmarks.timing import time_in_turns
from evaluation.output import print_result
from stable_audio_lite.command import Parser, guarded
from stable_audio_lite.devices import choose_device
from stable_audio_lite.errors import UserError
from stable_audio_lite.models.dac import state_to_dac
from stable_audio_lite.models.waveform_vae import WaveformVAE, WaveformVAEConfig
from stable_audio_lite.systems import load_model_config

_SAMPLE_RATE = 44100
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class DecodingSpeed:
    """Least wall times of one dtype in seconds, and how far each output is from the peer's in float32."""

    dtype: str
    peer_seconds: float
    our_seconds: float
    our_error: float
    our_snr_db: float
    peer_snr_db: float

    @property
    def ratio(self) -> float:
        """Our speed as a multiple of the peer's."""
        return self.peer_seconds / self.our_seconds


def waveform_vae(path: str | Path) -> tuple[WaveformVAEConfig, int]:
    """The VAE of a model config, and its sample rate.

    Raises:
        UserError: the VAE is on spectrograms, so that no peer has its shape.
    """
    config = load_model_config(path)
    if not isinstance(config.vae, WaveformVAEConfig):
        raise UserError(f"{path}: has a VAE on spectrograms, and the peer's is on waveforms; give another model")
    return config.vae, config.sample_rate


def peer_decoder(config: WaveformVAEConfig) -> nn.Module:
    """A decoder of the same shape from descript-audio-codec's blocks, without their closing tanh."""
    from dac.model.dac import Decoder

    decoder = Decoder(config.latent_channels, config.decoder_width, config.strides[::-1], config.audio_channels)
    del decoder.model[-1]
    return decoder


def decoder_pair(config: WaveformVAEConfig, seed: int = 0) -> tuple[WaveformVAE, nn.Module]:
    """Our VAE, folded, and DAC's decoder with the same random weights, both float32 in evaluation mode."""
    torch.manual_seed(seed)
    vae = WaveformVAE(config).requires_grad_(False)
    for name, parameter in vae.decoder.named_parameters():
        # Fresh biases are zero and fresh Snake frequencies one, which would hide an exchange between layers.
        if name.endswith("alpha"):
            parameter.uniform_(0.5, 2.0)
        elif name.endswith("bias"):
            parameter.uniform_(-0.02, 0.02)
    peer, prefix = peer_decoder(config), "decoder."
    peer.load_state_dict({k.removeprefix(prefix): v for k, v in state_to_dac(vae).items() if k.startswith(prefix)})
    return vae.prepare_for_inference(), peer.eval().requires_grad_(False)


def snr_db(output: Tensor, reference: Tensor) -> float:
    """Energy of `reference` over energy of the difference, in dB; infinite where they are equal."""
    noise = (output - reference).square().sum(dtype=torch.float64).item()
    signal = reference.square().sum(dtype=torch.float64).item()
    return 10 * math.log10(signal / noise) if noise else math.inf


@torch.inference_mode()
def time_decoding(
    config: WaveformVAEConfig, seconds: float, dtypes: list[str], repeats: int, device: str = "cpu"
) -> list[DecodingSpeed]:
    """Decode `seconds` of random latents with both, `repeats` times each in turn, and compare."""
    vae, peer = (module.to(device) for module in decoder_pair(config))
    frames = math.ceil(seconds * _SAMPLE_RATE / config.hop)
    latents = torch.randn(1, config.latent_channels, frames, generator=torch.Generator().manual_seed(1)).to(device)
    reference = peer(latents)
    rows = []
    for name in dtypes:
        dtype = _DTYPES[name]
        vae, peer, z = vae.to(dtype), peer.to(dtype), latents.to(dtype)
        runs = (lambda peer=peer, z=z: peer(z), lambda vae=vae, z=z: vae.decode_chunked(z))
        theirs, ours = time_in_turns(runs, repeats, warmups=0)
        error = (ours.output.float() - reference).abs().max() / reference.abs().max()
        rows.append(
            DecodingSpeed(
                dtype=name,
                peer_seconds=theirs.minimum,
                our_seconds=ours.minimum,
                our_error=error.item(),
                our_snr_db=snr_db(ours.output.float(), reference),
                peer_snr_db=snr_db(theirs.output.float(), reference),
            )
        )
    return rows


def main() -> int:
    """Run the command; returns its exit status."""
    parser = Parser(description=__doc__)
    parser.add_argument("--config", help="model config (default: the paper's VAE)")
    parser.add_argument("--seconds", type=float, default=24.0)
    parser.add_argument("--dtype", choices=(*_DTYPES, "both"), default="both")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    return guarded(lambda: _run(parser.parse_args()))


def _run(args: argparse.Namespace) -> None:
    config = waveform_vae(args.config)[0] if args.config else WaveformVAEConfig()
    dtypes = list(_DTYPES) if args.dtype == "both" else [args.dtype]
    rows = time_decoding(config, args.seconds, dtypes, args.repeats, str(choose_device(args.device)))
    lines = [f"decoding {args.seconds:g} s on {args.device}, {torch.get_num_threads()} threads"]
    lines += [
        f"{row.dtype}: DAC's blocks {row.peer_seconds:.2f} s ({row.peer_snr_db:.1f} dB), "
        f"ours {row.our_seconds:.2f} s = {row.ratio:.2f}x; "
        f"largest error {row.our_error:.1e} of peak, {row.our_snr_db:.1f} dB"
        for row in rows
    ]
    print_result(args.json, [asdict(row) | {"ratio": row.ratio} for row in rows], "\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
