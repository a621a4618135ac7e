"""Times of the networks of the latent system alone: a step of the U-Net, the VAE, a step of training either.

Floating-point operations are torch's own count of matrix products, convolutions and attention. A matrix product in the
same number type takes turns with each network, and so do its peers; outputs are compared with theirs.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from evaluation.benchmarks.machine import matrix_product
from evaluation.benchmarks.peers import PeerVAE, peer_discriminator, unet_peer, vae_peers
from evaluation.benchmarks.table import Peer, Row
from evaluation.benchmarks.timing import Spread, Timing, time_in_turns
from stable_audio_lite.audio.io import write_audio
from stable_audio_lite.bundle import load_part, resolve
from stable_audio_lite.config import save_config
from stable_audio_lite.diffusion.denoiser import Guidance
from stable_audio_lite.diffusion.replay import Recorder
from stable_audio_lite.diffusion.samplers import SAMPLERS, ItemNoise, polyexponential_sigmas
from stable_audio_lite.models.discriminator import DiscriminatorConfig
from stable_audio_lite.models.unet import UNet
from stable_audio_lite.models.vae import VAE, Posterior
from stable_audio_lite.models.waveform_vae import WaveformVAEConfig
from stable_audio_lite.nn.attention import Condition
from stable_audio_lite.systems import StableAudioConfig, build_vae, load_model_config
from training.losses import MultiResolutionSTFTLoss, feature_matching, hinge_discriminator, hinge_generator
from training.plan import FlopCounter
from training.task import OptimizerConfig, RunConfig
from training.train_vae import LOSSES, WEIGHTS, TrainVAEConfig, VAETask
from training.update import Update

_WINDOWS, _RATE = (2048, 512, 128), 1e-4
JUDGE = DiscriminatorConfig(windows=(1024, 512, 256), filters=8)
"""The discriminator of the VAE's training step."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of what is computed.

    Attributes:
        frames: of latents in a step of the U-Net, a guidance pair, and in training.
        seconds: of sound that the VAE encodes and decodes.
        batch: windows in a training step of the U-Net, and crops in one of the VAE.
        crop_frames: length of these crops.
    """

    frames: int
    seconds: float
    batch: int = 4
    crop_frames: int = 64


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The system whose networks are measured: with a bundle's weights, or with random ones.

    Attributes:
        config: of the system.
        folder: of the bundle, or None.
    """

    config: StableAudioConfig
    folder: Path | None = None

    @classmethod
    def of(cls, model: str) -> Subject:
        """The system of a bundle, or of a model's YAML.

        Raises:
            UserError: there is none, or it is of another kind.
        """
        folder = None if Path(model).suffix in (".yaml", ".yml") else resolve(model)
        return cls(config=load_model_config(model if folder is None else folder), folder=folder)

    def unet(self, device: torch.device, dtype: torch.dtype) -> UNet:
        """The U-Net, random weights being cheap ones in `dtype` from the start (1.8 GB for the paper's in bfloat16)."""
        if self.folder is not None:
            unet = self.config.network()
            load_part(self.folder, "unet", unet)
            return unet.to(device, dtype)
        with torch.device("meta"):
            unet = self.config.network()
        unet = unet.to(dtype).to_empty(device=device)
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter.uniform_(-0.03, 0.03)
        return unet

    def vae(self) -> VAE:
        """The VAE in float32, its weight norm not folded."""
        torch.manual_seed(0)
        vae = build_vae(self.config.vae).requires_grad_(False)
        if self.folder is not None:
            load_part(self.folder, "vae", vae)
            return vae.float()
        for name, parameter in vae.named_parameters():
            # Fresh biases are zero and fresh Snake frequencies one, which would hide an exchange between layers.
            if name.endswith("alpha"):
                parameter.uniform_(0.5, 2.0) if vae.config.kind == "waveform" else None
            elif name.endswith("bias"):
                parameter.uniform_(-0.02, 0.02)
        return vae


def unet_rows(
    subject: Subject, sizes: Sizes, device: torch.device, dtypes: Sequence[torch.dtype], repeats: int
) -> Iterator[Row]:
    """Time a step with guidance as generation takes it, its condition being ready.

    It is one forward of a pair, or of one item where the network takes the guidance scale.
    """
    for dtype in dtypes:
        unet = subject.unet(device, dtype).eval().requires_grad_(False)
        yield _unet_row(unet, subject.config, sizes.frames, repeats)


@torch.no_grad()
def _unet_row(unet: UNet, config: StableAudioConfig, frames: int, repeats: int) -> Row:
    device, dtype, items = unet.null.device, unet.null.dtype, 2 if unet.guidance is None else 1
    x, t = torch.randn(items, unet.channels, frames, device=device).to(dtype), torch.rand(items, device=device)
    tokens = torch.randn(items, config.context_tokens, config.context_width, device=device).to(dtype)
    condition = Condition(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=device))
    scale = None if unet.guidance is None else torch.full((items,), unet.largest_scale, device=device)
    context = unet.context(condition, scale)
    peer = unet_peer(unet, config)
    others = {} if peer is None else {"stable-audio-tools": lambda: peer(x, t, tokens)}
    step = partial(Recorder(unet), x, t, context)
    if x.is_cuda:
        step()  # the next is recorded
    timed = _timed(step, others, device, dtype, repeats, counted=lambda: unet(x, t, context))
    how = f"{_name(dtype)}, {items} x {frames} frames"
    return timed.row(part="unet", what="U-Net step with guidance", how=how)


@torch.no_grad()
def play_window(subject: Subject, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Make one sound of the whole window, with guidance, in two steps; returns (C, samples) float32 on the CPU."""
    config, vae = subject.config, subject.vae().eval().prepare_for_inference()
    unet = subject.unet(device, dtype).eval().requires_grad_(False)
    vae = vae.to(device, torch.float32 if vae.float32 else dtype)
    tokens = torch.randn(1, config.context_tokens, config.context_width, device=device)
    condition = Condition(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=device))
    denoiser = Guidance(unet, config.process, condition, scale=config.generation.cfg, recorder=Recorder(unet))
    sigmas = polyexponential_sigmas(2, config.generation.sigma_min, config.generation.sigma_max)
    noise = ItemNoise([0], config.latent_shape, device)
    latents = SAMPLERS["dpmpp-2m"](denoiser, noise() * sigmas[0], sigmas, noise=noise)
    return vae.decode_chunked(latents.to(next(vae.parameters()).dtype))[0].float().cpu()


def vae_rows(
    subject: Subject, sizes: Sizes, device: torch.device, dtypes: Sequence[torch.dtype], repeats: int
) -> Iterator[Row]:
    """Time the encoding and the decoding of sound of some length."""
    vae, config = subject.vae(), subject.config
    peers = list(vae_peers(vae, config))
    vae = vae.eval().prepare_for_inference()
    frames = math.ceil(sizes.seconds * config.sample_rate / config.hop)
    draws = torch.Generator().manual_seed(1)
    audio = 0.1 * torch.randn(1, config.vae.audio_channels, frames * config.hop, generator=draws)
    latents = torch.randn(1, config.vae.latent_channels, frames, generator=draws)
    for dtype in [torch.float32] if vae.float32 else dtypes:
        vae = vae.to(device, dtype)
        sound, z = audio.to(device, dtype), latents.to(device, dtype)
        encoders: dict[str, Callable[[], Tensor]] = {}
        decoders: dict[str, Callable[[], Tensor]] = {}
        for peer in peers:
            peer.module.to(device, dtype)
            encoders[peer.name] = partial(peer.encode, sound)
            decoders[peer.name] = partial(peer.decode, z)
        how = f"{_name(dtype)}, {sizes.seconds:g} s"
        with torch.no_grad():
            encode, decode = (
                _timed(run, others, device, dtype, repeats)
                for run, others in (
                    (lambda vae=vae, sound=sound: vae.encode_chunked(sound).mean, encoders),
                    (lambda vae=vae, z=z: vae.decode_chunked(z), decoders),
                )
            )
        yield encode.row(part="vae", what="VAE encode", how=how)
        yield decode.row(part="vae", what="VAE decode", how=how)


def training_rows(
    subject: Subject, sizes: Sizes, device: torch.device, dtypes: Sequence[torch.dtype], repeats: int
) -> Iterator[Row]:
    """Time whole steps: both passes, clipping and update, of the U-Net and of the VAE, its discriminator included."""
    for dtype in dtypes:
        step = _unet_step(subject.unet(device, torch.float32), subject.config, sizes, dtype)
        how = f"{_name(dtype)}, {sizes.batch} x {sizes.frames} frames"
        yield _timed(step, {}, device, dtype, repeats).row(part="train", what="train step, U-Net", how=how)
    for dtype in dtypes:
        step, others = vae_steps(subject.config, sizes, device, dtype)
        how = f"{_name(dtype)}, {sizes.batch} x {sizes.crop_frames} frames"
        timed = _timed(step, others, device, dtype, repeats)
        yield timed.row(part="train", what="train step, VAE", how=how, compare=False)


@dataclass(frozen=True, kw_only=True)
class _Timed:
    """Timings of ours and of peers, and its rate as a share of the matrix product's."""

    own: Timing
    share: Spread
    peers: dict[str, Timing]

    def row(self, *, part: str, what: str, how: str, compare: bool = True) -> Row:
        """The row; with `compare`, outputs are compared."""
        peers = tuple(
            Peer(
                name=name,
                figure=timing.spread,
                ratio=self.own.ratio(timing),
                difference=_difference(self.own.output, timing.output) if compare else None,
            )
            for name, timing in self.peers.items()
        )
        return Row(part=part, what=what, how=how, unit="s", figure=self.own.spread, share=self.share, peers=peers)


def _timed(
    run: Callable[[], Any],
    others: dict[str, Callable[[], Any]],
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
    counted: Callable[[], Any] | None = None,
) -> _Timed:
    """Time `run`, a matrix product and `others` in turns; operations are those of `counted`, by default `run`."""
    with FlopCounter() as counter:
        (counted or run)()
    product, flops = matrix_product(device, dtype)
    own, yardstick, *timings = time_in_turns((run, product, *others.values()), repeats)
    pairs = zip(own.rates(counter.total), yardstick.rates(flops), strict=True)
    share = Spread.of([rate / matrices for rate, matrices in pairs])
    return _Timed(own=own, share=share, peers=dict(zip(others, timings, strict=True)))


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())


def _unet_step(unet: UNet, config: StableAudioConfig, sizes: Sizes, dtype: torch.dtype) -> Callable[[], None]:
    """A step of training on v, without the text encoder, whose features can be kept."""
    optimizer, device, batch = torch.optim.AdamW(unet.parameters(), lr=_RATE), unet.null.device, sizes.batch
    x, target = (torch.randn(batch, unet.channels, sizes.frames, device=device) for _ in range(2))
    t = torch.rand(batch, device=device)
    tokens = torch.randn(batch, config.context_tokens, config.context_width, device=device)
    mask = torch.ones(batch, config.context_tokens, dtype=torch.bool, device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
            loss = (unet(x, t, unet.context(Condition(tokens, mask))) - target).square().mean()
        _learn(unet, optimizer, loss)

    return step


def vae_steps(
    config: StableAudioConfig,
    sizes: Sizes,
    device: torch.device,
    dtype: torch.dtype,
    judge: DiscriminatorConfig = JUDGE,
) -> tuple[Callable[[], None], dict[str, Callable[[], None]]]:
    """Return our step of the joint phase, and that of peers: the same networks, losses and data in eager PyTorch.

    The peer is of descript-audio-codec's blocks, its Snake and torch's weight norm in place, and runs the discriminator
    anew for each loss, as GAN trainers do.
    """
    torch.manual_seed(0)
    shape = config.vae
    crops = {
        "audio": 0.1 * torch.randn(sizes.batch, shape.audio_channels, sizes.crop_frames * shape.hop, device=device),
        "noise": torch.randn(sizes.batch, shape.latent_channels, sizes.crop_frames, device=device),
    }
    bf16 = dtype is torch.bfloat16
    ours = _our_step(_vae_task(config, judge, crops["audio"][0].cpu(), sizes.crop_frames), crops, bf16)
    if not isinstance(shape, WaveformVAEConfig) or shape.blocks != "dac" or shape.tanh:
        return ours, {}
    peer = PeerVAE(shape).to(device), peer_discriminator(judge).to(device)
    stft = MultiResolutionSTFTLoss(config.sample_rate, _WINDOWS).to(device)
    return ours, {"descript-audio-codec": _peer_step(*peer, stft, crops, bf16)}


def _our_step(task: VAETask, batch: dict[str, Tensor], bf16: bool) -> Callable[[], None]:
    """A whole step as `training.loop` takes it."""
    device = batch["audio"].device
    accelerator = Accelerator(cpu=device.type == "cpu")
    task.modules = {k: accelerator.prepare_model(m.to(device)) for k, m in task.modules.items()}
    optimizers = {k: c.build(task.modules[k]) for k, c in task.optimizers.items()}
    update = Update(accelerator, task.config.run, task, optimizers)

    def step() -> None:
        update.begin(0)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            task.step(batch, 0, update)
        update.end()

    return step


def _peer_step(
    vae: nn.Module, discriminator: nn.Module, stft: MultiResolutionSTFTLoss, batch: dict[str, Tensor], bf16: bool
) -> Callable[[], None]:
    """A whole step: both forwards, backwards, clipping and AdamW updates."""
    audio = batch["audio"]
    first, second = (torch.optim.AdamW(m.parameters(), lr=_RATE) for m in (vae, discriminator))

    def step() -> None:
        with torch.autocast(audio.device.type, torch.bfloat16, enabled=bf16):
            output, mean, std = vae(audio, batch["noise"])
            output = output.float()
            discriminator.requires_grad_(False)
            fake = discriminator(output)
            with torch.no_grad():
                real = discriminator(audio)
            discriminator.requires_grad_(True)
        losses = stft(output, audio) | {"kl/latent": Posterior(mean, std).kl()}
        losses |= {"adversarial/generator": hinge_generator(fake), "adversarial/features": feature_matching(real, fake)}
        _learn(vae, first, torch.stack([WEIGHTS[name] * loss for name, loss in losses.items()]).sum())
        with torch.autocast(audio.device.type, torch.bfloat16, enabled=bf16):
            real, fake = discriminator(audio), discriminator(output.detach())
        _learn(discriminator, second, hinge_discriminator(real, fake))

    return step


def _learn(module: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()


def _vae_task(config: StableAudioConfig, judge: DiscriminatorConfig, sound: Tensor, crop_frames: int) -> VAETask:
    """The joint phase of VAE training, on a data set of the one `sound`, which is never read again."""
    waveform, kind = config.vae.kind == "waveform", config.vae.kind
    with tempfile.TemporaryDirectory() as folder:
        write_audio(Path(folder) / "noise.wav", sound, config.sample_rate)
        save_config(config, model := Path(folder) / "model.yaml")
        optimizer = OptimizerConfig(lr=_RATE)
        return VAETask(
            TrainVAEConfig(
                model=str(model),
                data=folder,
                crop_frames=crop_frames,
                weights=WEIGHTS if waveform else dict.fromkeys(LOSSES[kind], 1.0),
                stft_windows=_WINDOWS,
                optimizer=optimizer,
                discriminator=judge if waveform else None,  # which judges sound, and the other's losses are of features
                discriminator_optimizer=optimizer if waveform else None,
                run=RunConfig(output=folder, steps=1),
            )
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
