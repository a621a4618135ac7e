"""Other implementations of the same networks, with the same weights, where they are installed.

descript-audio-codec's own blocks, weight norm in place, run whole; the VAEs and the U-Net of stable-audio-tools; the
AutoencoderOobleck of diffusers.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stable_audio_lite.errors import UserError
from stable_audio_lite.interchange.model_config import Described, check_expressible, write_model_config
from stable_audio_lite.interchange.tensors import places
from stable_audio_lite.models.dac import state_to_dac
from stable_audio_lite.models.discriminator import Discriminator, DiscriminatorConfig
from stable_audio_lite.models.unet import UNet
from stable_audio_lite.models.vae import VAE, Posterior
from stable_audio_lite.models.waveform_vae import WaveformVAE, WaveformVAEConfig
from stable_audio_lite.systems import StableAudioConfig


class PeerVAE(nn.Module):
    """The VAE of the same shape from descript-audio-codec's encoder and decoder, without their closing tanh."""

    def __init__(self, config: WaveformVAEConfig):
        from dac.model.dac import Decoder, Encoder
        from dac.nn.layers import WNConv1d

        super().__init__()
        width = config.encoder_width * 2 ** len(config.strides)
        self.encoder = Encoder(config.encoder_width, list(config.strides), width)
        self.encoder.block[0] = WNConv1d(config.audio_channels, config.encoder_width, kernel_size=7, padding=3)
        self.project = nn.Conv1d(width, 2 * config.latent_channels, 1)
        self.decoder = Decoder(
            config.latent_channels, config.decoder_width, config.strides[::-1], config.audio_channels
        )
        del self.decoder.model[-1]

    def posterior(self, audio: Tensor) -> Posterior:
        """As VAE.encode."""
        return Posterior.of(self.project(self.encoder(audio)))

    def forward(self, audio: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As VAE.forward."""
        posterior = self.posterior(audio)
        return self.decoder(posterior.mean + posterior.std * noise), posterior.mean, posterior.std

    def load(self, vae: WaveformVAE) -> PeerVAE:
        """Take over the weights of ours, which is not folded."""
        project = {f"project.{k}": v for k, v in vae.encoder.project.state_dict().items()}  # type: ignore[operator, union-attr]
        self.load_state_dict(state_to_dac(vae) | project)
        return self


def peer_discriminator(config: DiscriminatorConfig) -> Discriminator:
    """The discriminator with its maps laid out in memory as torch does by itself."""
    discriminator = Discriminator(config)
    for scale in discriminator.scales:
        scale.convs[0].register_forward_pre_hook(lambda _, inputs: inputs[0].contiguous())  # type: ignore[index, union-attr]
    return discriminator


@dataclass(frozen=True)
class VAEPeer:
    """Another VAE with the same weights: means of the latents of sound, and sound of latents."""

    name: str
    module: nn.Module
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]


def vae_peers(vae: VAE, config: StableAudioConfig) -> Iterator[VAEPeer]:
    """Build the peers of a VAE on waveforms, whose weights are not folded yet, in evaluation mode."""
    if not isinstance(vae, WaveformVAE):
        return
    if vae.config.blocks == "dac" and not vae.config.tanh and _imported("dac.model.dac"):
        dac = _ready(PeerVAE(vae.config).load(vae))
        yield VAEPeer("descript-audio-codec", dac, lambda audio: dac.posterior(audio).mean, dac.decoder)
    if _expressible(config, whole=False) and (models := _imported("stable_audio_tools.models.autoencoders")):
        described = Described(config)
        tools = models.create_autoencoder_from_config(_model_json(described))
        tools.load_state_dict(_foreign(described, {"vae": vae}))
        tools = _ready(tools)
        yield VAEPeer(
            "stable-audio-tools", tools, lambda audio: tools.encoder(audio).chunk(2, 1)[0], lambda z: tools.decoder(z)
        )
    shape = vae.config
    same = shape.blocks == "oobleck" and not shape.tanh and shape.encoder_width == 2 * shape.latent_channels
    if same and (models := _imported("diffusers.models.autoencoders.autoencoder_oobleck")):
        oobleck = models.AutoencoderOobleck(
            encoder_hidden_size=shape.encoder_width,
            downsampling_ratios=list(shape.strides),
            channel_multiples=list(shape.multipliers[1:]),
            decoder_channels=shape.decoder_width // shape.multipliers[-1],
            decoder_input_channels=shape.latent_channels,
            audio_channels=shape.audio_channels,
            sampling_rate=config.sample_rate,
        )
        oobleck.load_state_dict(_foreign(Described(config, "diffusers"), {"vae": vae}))
        oobleck = _ready(oobleck)
        yield VAEPeer(
            "diffusers", oobleck, lambda audio: oobleck.encoder(audio).chunk(2, 1)[0], lambda z: oobleck.decoder(z)
        )


def unet_peer(unet: UNet, config: StableAudioConfig) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """The U-Net of stable-audio-tools with the same weights, of x, t and tokens; None if there is none."""
    # Without masked tokens it makes no difference, and theirs is always so; and the VAE has no part in it.
    vae = WaveformVAEConfig(latent_channels=config.vae.latent_channels, tanh=True)
    config = replace(config, unet=replace(config.unet, attend_padding=True), vae=vae)
    if not _expressible(config, whole=True) or not (models := _imported("stable_audio_tools.models.diffusion")):
        return None
    described = Described(config, scale=1.0)
    settings = _model_json(described)["model"]["diffusion"]["config"]
    with torch.device(unet.null.device):
        peer = models.UNetCFG1DWrapper(**settings).to(unet.null.dtype)
    state = {name.removeprefix("model."): v for name, v in _foreign(described, {"unet": unet}).items()}
    peer.load_state_dict(state)
    peer = _ready(peer)
    dtype = unet.null.dtype

    def step(x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        # It makes float32 of times and of attention's weights, which without autocast don't multiply with others.
        with torch.autocast(x.device.type, dtype, enabled=dtype is not torch.float32):
            return peer(x, t, cross_attn_cond=tokens)

    return step


def _imported(name: str) -> Any:
    """A peer's module; None where it isn't installed, or something that it needs isn't, which is said."""
    package = name.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return importlib.import_module(name)
    except Exception as error:  # a peer's own, of any kind
        reason = " ".join(str(error).split())[:160]
        print(f"{package.replace('_', '-')} is left out: it can't be imported ({reason})", file=sys.stderr)
        return None


def _expressible(config: StableAudioConfig, whole: bool) -> bool:
    try:
        check_expressible(config, whole, "")
    except UserError:
        return False
    return True


def _foreign(described: Described, modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The weights of our `modules`, by part, as another implementation names and shapes them."""
    states = {part: module.state_dict() for part, module in modules.items()}
    return {
        place.foreign: place.outward(states[place.part][place.name]).contiguous()
        for place in places(described)
        if place.part in states
    }


def _model_json(described: Described) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        write_model_config(file := Path(folder) / "model_config.json", described)
        return json.loads(file.read_text(encoding="utf-8"))


def _ready(module: Any) -> Any:
    return module.eval().requires_grad_(False)
