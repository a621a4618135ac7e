"""Checkpoints of stable-audio-tools and diffusers: every tensor arrives and computes what it did, and goes back.

The reference's forward passes are stated anew here, over a state that makes each tensor when it is first asked for: the
same lines give the layout of a checkpoint and what the network in it should compute.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training_runs import TINY, diffusion_settings, load

from stable_audio_lite import bundle, cli
from stable_audio_lite.clap.config import ClapConfig
from stable_audio_lite.clap.text_encoder import TextEncoder
from stable_audio_lite.clap.tokenizer import train_tokenizer
from stable_audio_lite.codec import Codec
from stable_audio_lite.config import save_config
from stable_audio_lite.diffusion.denoiser import Guidance
from stable_audio_lite.errors import UserError
from stable_audio_lite.interchange.model_config import check_expressible, read_model_config
from stable_audio_lite.interchange.tensors import places
from stable_audio_lite.models.conditioner import Conditioner, drop
from stable_audio_lite.models.waveform_vae import WaveformVAE, WaveformVAEConfig
from stable_audio_lite.nn.attention import Condition
from stable_audio_lite.nn.snake import SnakeBeta
from stable_audio_lite.pipeline import StableAudio
from stable_audio_lite.systems import build_vae, load_model_config
from training import pre_encode, train_diffusion

WIDTH, TOKENS, LONGEST = 768, 79, 20
DAC = {
    "encoder": {"type": "dac", "config": {"in_channels": 2, "latent_dim": 16, "d_model": 4, "strides": [2, 4]}},
    "decoder": {"type": "dac", "config": {"out_channels": 2, "latent_dim": 8, "channels": 16, "rates": [4, 2]}},
    "bottleneck": {"type": "vae"},
    "latent_dim": 8,
    "downsampling_ratio": 8,
    "io_channels": 2,
}
_SHAPE = {"channels": 16, "c_mults": [1, 2, 4], "strides": [2, 4, 4], "use_snake": True}
OOBLECK = DAC | {
    "encoder": {"type": "oobleck", "config": {"in_channels": 2, "latent_dim": 16, **_SHAPE}},
    "decoder": {"type": "oobleck", "config": {"out_channels": 2, "latent_dim": 8, "final_tanh": False, **_SHAPE}},
    "downsampling_ratio": 32,
}
NETWORK = {
    "in_channels": 8,
    "context_embedding_features": WIDTH,
    "context_embedding_max_length": TOKENS,
    "channels": 32,
    "resnet_groups": 16,
    "kernel_multiplier_downsample": 2,
    "multipliers": [1, 1, 2],
    "factors": [1, 2],
    "num_blocks": [1, 2],
    "attentions": [0, 1, 1],
    "attention_heads": 2,
    "attention_multiplier": 2,
    "use_nearest_upsample": False,
    "use_skip_scale": True,
    "use_context_time": True,
}
_CLAP = {"clap_ckpt_path": "clap.pt", "use_text_features": True, "feature_layer_ix": -2, "enable_fusion": True}
SECONDS = {"min_val": 0, "max_val": LONGEST}
SYSTEM = {
    "model_type": "diffusion_cond",
    "sample_size": 32 * 8,
    "sample_rate": 44100,
    "audio_channels": 2,
    "model": {
        "pretransform": {"type": "autoencoder", "iterate_batch": True, "scale": 1.5, "config": DAC},
        "conditioning": {
            "configs": [
                {"id": "prompt", "type": "clap_text", "config": {"audio_model_type": "HTSAT-base", **_CLAP}},
                *({"id": name, "type": "int", "config": dict(SECONDS)} for name in ("seconds_start", "seconds_total")),
            ],
            "cond_dim": WIDTH,
        },
        "diffusion": {
            "type": "adp_cfg_1d",
            "cross_attention_cond_ids": ["prompt", "seconds_start", "seconds_total"],
            "config": NETWORK,
        },
        "io_channels": 8,
    },
    "training": {"learning_rate": 4e-5, "use_ema": True},
}


def autoencoder(model: dict[str, Any]) -> dict[str, Any]:
    return {"model_type": "autoencoder", "sample_size": 65536, "sample_rate": 44100, "model": model, "training": {}}


class State(dict[str, Tensor]):
    """A state dict that makes what it lacks, lively enough for every tensor to matter."""

    def get_or_make(self, name: str, *shape: int) -> Tensor:
        if name not in self:
            fan = max(torch.Size(shape[1:]).numel(), 4)
            gain = name.endswith(("weight_g", "norm.weight", "groupnorm.weight", "to_in.0.weight"))
            small = gain or len(shape) == 1 or name.endswith(("alpha", "beta"))
            self[name] = torch.randn(shape) * (0.2 if small else fan**-0.5) + gain
        return self[name]

    def linear(self, name: str, x: Tensor, out: int, bias: bool = True) -> Tensor:
        weight = self.get_or_make(f"{name}.weight", out, x.shape[-1])
        return F.linear(x, weight, self.get_or_make(f"{name}.bias", out) if bias else None)

    def conv(self, name: str, x: Tensor, out: int, kernel: int, stride: int = 1) -> Tensor:
        """A convolution whose padding has its odd sample on the left."""
        right = (kernel - stride) // 2
        x = F.pad(x, (kernel - stride - right, right))
        weight = self.get_or_make(f"{name}.weight", out, x.shape[1], kernel)
        return F.conv1d(x, weight, self.get_or_make(f"{name}.bias", out), stride)

    def group_norm(self, name: str, x: Tensor, groups: int, eps: float = 1e-5) -> Tensor:
        weight, bias = (self.get_or_make(f"{name}.{leaf}", x.shape[1]) for leaf in ("weight", "bias"))
        return F.group_norm(x, groups, weight, bias, eps)

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = (self.get_or_make(f"{name}.{leaf}", x.shape[-1]) for leaf in ("weight", "bias"))
        return F.layer_norm(x, x.shape[-1:], weight, bias)


def reference_unet(s: State, x: Tensor, t: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """v from x (B, 8, T), times (B,), tokens (B, 79, 768) and their mask (B, 79)."""
    width, multipliers, factors = NETWORK["channels"], NETWORK["multipliers"], NETWORK["factors"]
    blocks, attentions = NETWORK["num_blocks"], NETWORK["attentions"]
    angles = 2 * torch.pi * t[:, None] * s.get_or_make("to_time.0.0.weights", width // 2)
    features = torch.cat((t[:, None], angles.sin(), angles.cos()), 1)
    mapping = F.gelu(s.linear("to_time.0.1", features, 4 * width))
    for layer in (0, 2):
        mapping = F.gelu(s.linear(f"to_mapping.{layer}", mapping, 4 * width))

    def residual(name: str, x: Tensor, out: int, groups: int = 16) -> Tensor:
        hidden = F.silu(s.group_norm(f"{name}.block1.groupnorm", x, groups))
        hidden = s.conv(f"{name}.block1.project", hidden, out, 3)
        film = s.linear(f"{name}.to_scale_shift.to_scale_shift.1", F.silu(mapping), 2 * out)
        scale, shift = film[:, :, None].chunk(2, 1)
        hidden = s.group_norm(f"{name}.block2.groupnorm", hidden, groups) * (scale + 1) + shift
        hidden = s.conv(f"{name}.block2.project", F.silu(hidden), out, 3)
        return hidden + (x if x.shape[1] == out else s.conv(f"{name}.to_out", x, out, 1))

    def attention(name: str, x: Tensor, context: Tensor | None) -> Tensor:
        heads, wide = NETWORK["attention_heads"], x.shape[2]
        inner = s.layer_norm(f"{name}.norm", x)
        outer = s.layer_norm(f"{name}.norm_context", x if context is None else context)
        q = s.linear(f"{name}.to_q", inner, wide, bias=False)
        k, v = s.linear(f"{name}.to_kv", outer, 2 * wide, bias=False).chunk(2, 2)
        if context is not None:  # masked tokens stay, as zeros
            k, v = k * mask[:, :, None], v * mask[:, :, None]
        q, k, v = (y.unflatten(2, (heads, -1)).transpose(1, 2) for y in (q, k, v))
        weights = (q @ k.transpose(2, 3) * (wide // heads) ** -0.5).softmax(-1)
        return s.linear(f"{name}.attention.to_out", (weights @ v).transpose(1, 2).flatten(2), wide)

    def transformer(name: str, x: Tensor, depth: int) -> Tensor:
        channels = x.shape[1]
        x = s.conv(f"{name}.to_in.1", s.group_norm(f"{name}.to_in.0", x, 32, 1e-6), channels, 1).transpose(1, 2)
        for block in (f"{name}.blocks.{i}" for i in range(depth)):
            x = x + attention(f"{block}.attention", x, None)
            x = x + attention(f"{block}.cross_attention", x, tokens)
            hidden = F.gelu(s.linear(f"{block}.feed_forward.0", x, channels * NETWORK["attention_multiplier"]))
            x = x + s.linear(f"{block}.feed_forward.2", hidden, channels)
        return s.conv(f"{name}.to_out.1", x.transpose(1, 2), channels, 1)

    levels = range(len(factors))
    x = first = residual("to_in.block", x, width * multipliers[0], 1)
    kept = []
    for i in levels:
        name, out = f"downsamples.{i}", width * multipliers[i + 1]
        x = s.conv(f"{name}.downsample", x, out, 2 * factors[i] + 1, factors[i])
        skips = []
        for j in range(blocks[i]):
            x = residual(f"{name}.blocks.{j}", x, out)
            skips.append(x)
        if attentions[i]:
            x = transformer(f"{name}.transformer", x, attentions[i])
            skips.append(x)
        kept.append(skips)
    x = residual("bottleneck.pre_block", x, x.shape[1])
    x = transformer("bottleneck.transformer", x, attentions[-1])
    x = residual("bottleneck.post_block", x, x.shape[1])
    for n, i in enumerate(reversed(levels)):
        name, out = f"upsamples.{n}", width * multipliers[i]
        skips = kept.pop()
        for j in range(len(skips)):
            x = residual(f"{name}.blocks.{j}", torch.cat((x, skips.pop() * 2**-0.5), 1), x.shape[1])
        if attentions[i]:
            x = transformer(f"{name}.transformer", x, attentions[i])
        if (factor := factors[i]) == 1:
            x = s.conv(f"{name}.upsample", x, out, 3)
            continue
        weight = s.get_or_make(f"{name}.upsample.weight", x.shape[1], out, 2 * factor)
        y = F.conv_transpose1d(x, weight, s.get_or_make(f"{name}.upsample.bias", out), factor)
        x = y[:, :, factor - factor // 2 : y.shape[2] - factor // 2]
    return residual("to_out.block", x + first, NETWORK["in_channels"], 1)


def reference_dac() -> tuple[nn.Module, nn.Module, nn.Module, State]:
    """descript-audio-codec's encoder, the projection and the decoder, lively, and their state as stored."""
    from dac.model.dac import Decoder, Encoder, WNConv1d

    encoder, project, decoder = Encoder(4, [2, 4], 16), nn.Conv1d(16, 16, 1), Decoder(8, 16, [4, 2], 2)
    encoder.block[0] = WNConv1d(2, 4, kernel_size=7, padding=3)
    state = State()
    for prefix, module in (("encoder.encoder", encoder), ("encoder.proj_out", project), ("decoder.decoder", decoder)):
        for name, value in module.named_parameters():
            value.data += 0.2 * value.data.abs().mean() * torch.randn_like(value)
            state[f"{prefix}.{name}"] = value.data
    return encoder, project, decoder, state


class ReferenceOobleck:
    """Oobleck as `state` has it, under the names of stable-audio-tools or of diffusers."""

    def __init__(self, diffusers: bool):
        self.state, self.diffusers = State(), diffusers

    def snake(self, name: str, x: Tensor) -> Tensor:
        shape = (1, x.shape[1], 1) if self.diffusers else (x.shape[1],)
        alpha, beta = (self.state.get_or_make(f"{name}.{leaf}", *shape).view(1, -1, 1) for leaf in ("alpha", "beta"))
        return x + (alpha.exp() * x).sin() ** 2 / (beta.exp() + 1e-9)

    def conv(self, name: str, x: Tensor, out: int, kernel: int, bias: bool = True, **how: int) -> Tensor:
        v = self.state.get_or_make(f"{name}.weight_v", out, x.shape[1], kernel)
        g = self.state.get_or_make(f"{name}.weight_g", out, 1, 1)
        b = self.state.get_or_make(f"{name}.bias", out) if bias else None
        return F.conv1d(x, g * v / v.norm(dim=(1, 2), keepdim=True), b, **how)

    def transposed(self, name: str, x: Tensor, out: int, stride: int) -> Tensor:
        v = self.state.get_or_make(f"{name}.weight_v", x.shape[1], out, 2 * stride)
        g = self.state.get_or_make(f"{name}.weight_g", x.shape[1], 1, 1)
        b = self.state.get_or_make(f"{name}.bias", out)
        return F.conv_transpose1d(x, g * v / v.norm(dim=(1, 2), keepdim=True), b, stride, stride // 2)

    def units(self, name: str, x: Tensor, first: int) -> Tensor:
        for i, dilation in enumerate((1, 3, 9)):
            unit = f"{name}.res_unit{i + 1}" if self.diffusers else f"{name}.layers.{first + i}"
            a, b, c, d = (
                (f"{unit}.{leaf}" for leaf in ("snake1", "conv1", "snake2", "conv2"))
                if self.diffusers
                else (f"{unit}.layers.{leaf}" for leaf in range(4))
            )
            hidden = self.conv(b, self.snake(a, x), x.shape[1], 7, dilation=dilation, padding=3 * dilation)
            x = x + self.conv(d, self.snake(c, hidden), x.shape[1], 1)
        return x

    def name(self, part: str, ours: int, theirs: str) -> str:
        return f"{part}.{theirs}" if self.diffusers else f"{part}.layers.{ours}"

    def encode(self, x: Tensor) -> Tensor:
        x = self.conv(self.name("encoder", 0, "conv1"), x, 16, 7, padding=3)
        for i, (out, stride) in enumerate(zip((16, 32, 64), (2, 4, 4), strict=True)):
            block = self.name("encoder", i + 1, f"block.{i}")
            x = self.snake(self.name(block, 3, "snake1"), self.units(block, x, 0))
            x = self.conv(self.name(block, 4, "conv1"), x, out, 2 * stride, stride=stride, padding=stride // 2)
        x = self.snake(self.name("encoder", 4, "snake1"), x)
        return self.conv(self.name("encoder", 5, "conv2"), x, 16, 3, padding=1)

    def decode(self, x: Tensor) -> Tensor:
        x = self.conv(self.name("decoder", 0, "conv1"), x, 64, 7, padding=3)
        for i, (out, stride) in enumerate(zip((32, 16, 16), (4, 4, 2), strict=True)):
            block = self.name("decoder", i + 1, f"block.{i}")
            x = self.transposed(
                self.name(block, 1, "conv_t1"), self.snake(self.name(block, 0, "snake1"), x), out, stride
            )
            x = self.units(block, x, 2)
        x = self.snake(self.name("decoder", 4, "snake1"), x)
        return self.conv(self.name("decoder", 5, "conv2"), x, 2, 7, bias=False, padding=3)


def conditions(batch: int = 2) -> tuple[Tensor, Tensor]:
    """Tokens (B, 79, 768) and a mask of prompts that are shorter than their room."""
    mask = torch.ones(batch, TOKENS, dtype=torch.bool)
    for row in range(batch):
        mask[row, 5 + 4 * row : TOKENS - 2] = False
    return torch.randn(batch, TOKENS, WIDTH), mask


@pytest.fixture(scope="module")
def whole() -> dict[str, Tensor]:
    """The state of a small Stable Audio 1.0, unwrapped."""
    torch.manual_seed(0)
    unet, _ = State(), reference_dac()
    reference_unet(unet, torch.randn(1, 8, 8), torch.rand(1), *conditions(1))
    unet.get_or_make("fixed_embedding.embedding.weight", TOKENS, WIDTH)
    state = {f"model.model.{name}": value for name, value in unet.items()}
    for name in ("seconds_start", "seconds_total"):
        state[f"conditioner.conditioners.{name}.int_embedder.weight"] = torch.randn(LONGEST + 1, WIDTH)
    return state | {f"pretransform.model.{name}": value for name, value in _[3].items()}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run a command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *args: cli.main(list(map(str, args)))


def write(state: dict[str, Tensor], config: dict[str, Any], wrapped: bool = True) -> None:
    plain = dict(state)
    torch.save({"state_dict": plain} if wrapped else plain, "model.ckpt")
    Path("model_config.json").write_text(json.dumps(config))


def stored(name: str) -> dict[str, Tensor]:
    return torch.load(name, weights_only=True)["state_dict"]


def parts_of(folder: str) -> dict[str, Tensor]:
    names = [name for name in bundle.PARTS if bundle.part_path(folder, name).is_file()]
    return {f"{name}/{key}": value for name in names for key, value in bundle.read_part(folder, name).items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def unet_state(state: dict[str, Tensor]) -> State:
    return State({k.removeprefix("model.model."): v for k, v in state.items() if k.startswith("model.model.")})


FILES = ("model.ckpt", "--config", "model_config.json", "-o")


def test_a_whole_system_computes_what_it_did(run, whole: dict[str, Tensor]) -> None:
    """v, x0 under guidance, tokens and sound equal the reference's; the scale of its latents is ours."""
    write(whole, SYSTEM)
    assert run("import", *FILES, "ours") == 0
    config = load_model_config("ours")
    unet = bundle.load_module("ours", "unet", config.network)
    reference = unet_state(whole)
    torch.manual_seed(1)
    (tokens, mask), x, sigma = conditions(), torch.randn(2, 8, 24), torch.tensor([0.3, 4.0])
    t = sigma.atan() / torch.pi * 2
    with torch.no_grad():
        ours = unet(x, t, unet.context(Condition(tokens, mask)))
        expected = reference_unet(reference, x, t, tokens, mask)
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-5)
        ignored = unet(x, t, unet.context(Condition(tokens, torch.ones_like(mask))))
        assert (ignored - expected).abs().max() > 1e-2 * expected.abs().max()  # padding does matter

        noisy = x * (1 + sigma[:, None, None] ** 2).sqrt()
        null = reference["fixed_embedding.embedding.weight"].expand_as(tokens)
        unguided = reference_unet(reference, x, t, null, mask)
        v = unguided + 6 * (expected - unguided)
        s = sigma[:, None, None]
        x0 = noisy / (s**2 + 1) - v * s / (s**2 + 1).sqrt()
        guided = Guidance(unet, config.process, Condition(tokens, mask), scale=6.0)(noisy, sigma)
        torch.testing.assert_close(guided, x0, atol=2e-4, rtol=2e-4)

        other, own = torch.randn_like(tokens), mask.roll(1, 0)  # another prompt, with its own padding
        negative = reference_unet(reference, x, t, torch.where(own[..., None], other, null), mask)
        v = negative + 6 * (expected - negative)
        v = 0.4 * v * expected.std(1, keepdim=True) / v.std(1, keepdim=True) + 0.6 * v
        x0 = noisy / (s**2 + 1) - v * s / (s**2 + 1).sqrt()
        against = {"negative": Condition(other, own), "scale": 6.0, "rescale": 0.4}
        guided = Guidance(unet, config.process, Condition(tokens, mask), **against)(noisy, sigma)
        torch.testing.assert_close(guided, x0, atol=2e-4, rtol=2e-4)

        conditioner = bundle.load_module("ours", "conditioner", lambda: Conditioner(config.timing, WIDTH))
        text = Condition(tokens[:, :77], mask[:, :77])
        joined = conditioner(text, torch.tensor([3.0, 0.0]), torch.tensor([20.0, 7.0]))
    for row, name, seconds in ((77, "seconds_start", [3, 0]), (78, "seconds_total", [20, 7])):
        table = whole[f"conditioner.conditioners.{name}.int_embedder.weight"]
        assert torch.equal(joined.tokens[:, row], table[seconds])
    dropped = drop(joined, unet.null_condition(2, joined.mask), torch.tensor([True, False]))
    assert torch.equal(dropped.mask, joined.mask)
    assert unet.latent_std.tolist() == [1.5] * 8 and unet.latent_mean.tolist() == [0.0] * 8
    assert (config.generation.cfg, config.generation.rescale, config.generation.sampler) == (6.0, 0.4, "dpmpp-3m-sde")


def test_a_dac_vae_computes_what_it_did_tanh_included(run) -> None:
    torch.manual_seed(2)
    encoder, project, decoder, state = reference_dac()
    loud, audio = 4 * torch.randn(1, 8, 20), 0.3 * torch.randn(1, 2, 160)
    write(state, autoencoder(DAC))
    assert run("import", *FILES, "ours") == 0
    vae = Codec.from_pretrained("ours", "cpu", "float32").vae
    with torch.no_grad():
        expected = decoder(loud)
        assert expected.abs().max() > 0.3
        torch.testing.assert_close(vae.decode(loud), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(vae.decode_chunked(loud, 3), expected, atol=1e-5, rtol=1e-5)
        mean, scale = project(encoder(audio)).chunk(2, 1)
        posterior = vae.encode_chunked(audio, 7)
    torch.testing.assert_close(posterior.mean, mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(posterior.std, F.softplus(scale) + 1e-4, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("diffusers", [False, True])
def test_an_oobleck_vae_computes_what_it_did(run, diffusers: bool) -> None:
    """As trained, folded and in pieces."""
    torch.manual_seed(3)
    reference, audio, latents = ReferenceOobleck(diffusers), 0.3 * torch.randn(1, 2, 640), torch.randn(1, 8, 20)
    mean, sound = reference.encode(audio).chunk(2, 1)[0], reference.decode(latents)
    described = {"_class_name": "AutoencoderOobleck", "_diffusers_version": "0.30.0", "audio_channels": 2}
    described |= {"channel_multiples": [1, 2, 4], "decoder_channels": 16, "decoder_input_channels": 8}
    described |= {"downsampling_ratios": [2, 4, 4], "encoder_hidden_size": 16, "sampling_rate": 44100}
    write(reference.state, described if diffusers else autoencoder(OOBLECK), wrapped=not diffusers)
    assert run("import", *FILES, "ours") == 0
    config = load_model_config("ours")
    assert config.hop == 32 and config.latent_frames * config.hop == 4194304
    vae = bundle.load_module("ours", "vae", lambda: build_vae(config.vae))
    with torch.no_grad():
        for prepared in (False, True):
            vae = vae.prepare_for_inference() if prepared else vae
            for ours in (vae.decode(latents), vae.decode_chunked(latents, 3)):
                assert (ours - sound).abs().max() < 3e-5 * sound.abs().max()
            for ours in (vae.encode(audio).mean, vae.encode_chunked(audio, 3).mean):
                assert (ours - mean).abs().max() < 3e-5 * mean.abs().max()


def test_stable_audio_opens_vae_has_its_size_and_can_be_trained() -> None:
    with torch.device("meta"):
        open_vae = WaveformVAE(WaveformVAEConfig(decoder_width=2048, strides=(2, 4, 4, 8, 8), blocks="oobleck"))
    assert sum(p.numel() for p in open_vae.parameters()) == 156_112_514 and open_vae.hop == 2048
    torch.manual_seed(0)
    vae = WaveformVAE(WaveformVAEConfig(encoder_width=4, decoder_width=8, strides=(2, 2), blocks="oobleck", tanh=True))
    output, mean, std = vae(torch.randn(1, 2, 64), torch.randn(1, 64, 16))
    (output.square().mean() + mean.square().mean() + std.mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())
    assert 0 < std.mean() < 0.2  # the noise doesn't drown the mean at first


def test_the_papers_size_is_read_whole(tmp_path: Path) -> None:
    """Stable Audio 1.0's own config gives configs/stable_audio/paper.yaml, and as many numbers."""
    config = copy.deepcopy(SYSTEM) | {"sample_size": 4194304}
    vae, unet = config["model"]["pretransform"]["config"], config["model"]["diffusion"]["config"]
    vae |= {"latent_dim": 64, "downsampling_ratio": 1024}
    vae["encoder"]["config"] |= {"latent_dim": 128, "d_model": 128, "strides": [4, 4, 8, 8]}
    vae["decoder"]["config"] |= {"latent_dim": 64, "channels": 1536, "rates": [8, 8, 4, 4]}
    unet |= {"in_channels": 64, "channels": 256, "multipliers": [4, 4, 4, 5, 5], "factors": [1, 2, 2, 4]}
    unet |= {"num_blocks": [2] * 4, "attentions": [1, 3, 3, 3, 3], "attention_heads": 16, "attention_multiplier": 4}
    config["model"]["io_channels"] = 64
    for condition in config["model"]["conditioning"]["configs"][1:]:
        condition["config"]["max_val"] = 512
    (tmp_path / "a.json").write_text(json.dumps(config))
    described = read_model_config(tmp_path / "a.json")
    paper, ours = load_model_config("stable_audio/paper.yaml"), described.config
    assert replace(paper.vae, tanh=True) == ours.vae and replace(paper.unet, attend_padding=True) == ours.unet
    assert (paper.timing, paper.latent_frames) == (ours.timing, ours.latent_frames)
    found = places(described)
    counts = {part: sum(p.like.numel() for p in found if p.part == part) for part in ("vae", "unet")}
    assert counts == {"vae": 133_431_300, "unet": 906_679_744}
    check_expressible(ours, True, "ours")
    others = {
        "unet.rotary": replace(ours, unet=replace(ours.unet, rotary=True)),
        "unet.pooled_context": replace(ours, unet=replace(ours.unet, pooled_context=True)),
        "unet.pulse": replace(ours, unet=replace(ours.unet, pulse=True)),
        "unet.guidance": replace(ours, unet=replace(ours.unet, guidance=8.0)),
    }
    for key, other in others.items():
        with pytest.raises(UserError, match=f"ours: key '{key}'"):
            check_expressible(other, True, "ours")
        check_expressible(other, False, "ours")  # its VAE alone


def test_snake_with_two_parameters_has_its_gradients() -> None:
    snake, x = SnakeBeta(3).double(), torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    snake.alpha.data.normal_()
    snake.beta.data.normal_()
    expected = x + torch.sin(snake.alpha.exp() * x) ** 2 / snake.beta.exp()
    at = (x, snake.alpha, snake.beta)
    wanted = torch.autograd.grad(expected.pow(3).sum(), at)
    for a, b in zip(torch.autograd.grad(snake(x).pow(3).sum(), at), wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_system_goes_back_tensor_by_tensor_and_in_again(run, whole: dict[str, Tensor], suffix: str) -> None:
    from safetensors.torch import load_file

    write(whole, SYSTEM)
    assert run("import", *FILES, "ours") == 0
    assert run("export", "ours", "-o", f"back{suffix}", "--config", "back.json") == 0
    back = load_file("back.safetensors") if suffix != ".ckpt" else stored("back.ckpt")
    assert equal(back, whole)
    assert run("import", f"back{suffix}", "--config", "back.json", "-o", "again") == 0
    assert equal(parts_of("again"), parts_of("ours"))
    assert load_model_config("again") == load_model_config("ours")


@pytest.mark.parametrize("model", [DAC, OOBLECK])
def test_a_vae_goes_back_and_in_again(run, model: dict[str, Any]) -> None:
    torch.manual_seed(4)
    reference = ReferenceOobleck(False)
    reference.decode(torch.randn(1, 8, 4)), reference.encode(torch.randn(1, 2, 64))
    state = reference_dac()[3] if model is DAC else reference.state
    write(state, autoencoder(model))
    assert run("import", *FILES, "ours") == 0
    assert run("export", "ours", "-o", "back.ckpt", "--config", "back.json") == 0
    assert equal(stored("back.ckpt"), state)
    assert json.loads(Path("back.json").read_text())["model"] == model
    assert run("import", "back.ckpt", "--config", "back.json", "-o", "again") == 0
    assert load_model_config("again") == load_model_config("ours") and equal(parts_of("again"), parts_of("ours"))


def test_lightnings_wrapping_and_its_averages(run, whole: dict[str, Tensor]) -> None:
    """Weights as trained by default, averaged ones with --ema; what training keeps beside them stays out."""
    averaged = {k: v + 1 for k, v in whole.items() if k.startswith("model.")}
    state = {f"diffusion.{k}": v for k, v in whole.items()}
    state |= {f"diffusion_ema.ema_model.{k.removeprefix('model.')}": v for k, v in averaged.items()}
    state |= {"diffusion_ema.step": torch.tensor([5]), "diffusion_ema.initted": torch.tensor([True])}
    write(state, SYSTEM)
    for flags, expected in (((), whole), (("--ema",), whole | averaged)):
        assert run("import", *FILES, "ours", "--overwrite", *flags) == 0
        assert run("export", "ours", "-o", "back.ckpt", "--config", "back.json", "--overwrite") == 0
        assert equal(stored("back.ckpt"), expected)
    torch.manual_seed(5)
    own, other = reference_dac()[3], reference_dac()[3]
    new = {k.replace("weight_g", "parametrizations.weight.original0"): v for k, v in own.items()}
    new = {k.replace("weight_v", "parametrizations.weight.original1"): v for k, v in new.items()}
    state = {f"autoencoder.{k}": v for k, v in new.items()} | {"discriminator.a": torch.zeros(1)}
    write(state, autoencoder(DAC))
    assert run("import", *FILES, "vae", "--ema") == 2
    write(state | {f"autoencoder_ema.ema_model.{k}": v for k, v in other.items()}, autoencoder(DAC))
    for flags, expected in (((), own), (("--ema",), other)):
        assert run("import", *FILES, "vae", "--overwrite", *flags) == 0
        assert run("export", "vae", "-o", "back.ckpt", "--config", "back.json", "--overwrite") == 0
        assert equal(stored("back.ckpt"), expected)


def test_the_vae_comes_out_of_a_system_that_we_cannot_run(run, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(6)
    state = {f"pretransform.model.{k}": v for k, v in reference_dac()[3].items()}
    config = copy.deepcopy(SYSTEM) | {"model_type": "diffusion_cond_inpaint"}
    config["model"]["diffusion"] = {"type": "dit", "config": {"depth": 2}}
    write(state | {"model.model.transformer.a": torch.zeros(2)}, config)
    assert run("import", *FILES, "ours") == 2
    write(state | {"model.model.transformer.a": torch.zeros(2)}, config | {"model_type": "diffusion_cond"})
    assert "'model.diffusion.type' is 'dit'" in refusal(run, capsys, "import", *FILES, "ours")
    assert run("import", *FILES, "ours", "--vae-only") == 0
    assert {name.split("/")[0] for name in parts_of("ours")} == {"vae"}


def test_with_its_clap_a_system_generates(run, whole: dict[str, Tensor], capsys: pytest.CaptureFixture[str]) -> None:
    """The CLAP of a bundle here; one of another width is refused."""
    sizes = {"vocab_size": 300, "text_layers": 2, "text_feed_forward": 16, "text_positions": 80}
    tokenizer = train_tokenizer(["warm slow piano", "fast techno drums"], 280)
    for width in (WIDTH, 96):
        clap = ClapConfig(text_width=width, **sizes)
        parts = {"text_encoder": TextEncoder(clap, tokenizer).state_dict()}
        bundle.save_bundle(f"clap{width}", replace(load_model_config(TINY), clap=clap), parts, tokenizer.to_str())
    write(whole, SYSTEM)
    assert run("import", *FILES, "ours") == 0
    assert "--clap" in capsys.readouterr().out
    assert run("import", *FILES, "bad", "--clap", "clap96") == 2
    assert "clap.text_width" in capsys.readouterr().err and not Path("bad").exists()
    assert run("import", *FILES, "ours", "--clap", "clap768", "--overwrite") == 0
    model = StableAudio.from_pretrained("ours", "cpu", "float32")
    assert model.generate("warm piano", steps=2, seed=1).audio.isfinite().all()


@pytest.mark.long
def test_a_unet_trains_on_an_imported_vae(run, data: Path, tiny_bundle: Path) -> None:
    torch.manual_seed(7)
    reference = ReferenceOobleck(False)
    reference.decode(torch.randn(1, 8, 4)), reference.encode(torch.randn(1, 2, 64))
    write(reference.state, autoencoder(OOBLECK))
    assert run("import", *FILES, "ours") == 0
    config = replace(load_model_config(TINY), vae=load_model_config("ours").vae)
    save_config(config, "model.yaml")
    pre_encode.run(pre_encode.PreEncodeConfig(vae="ours", data=str(data), output="latents"))
    parts = {"vae": Path("ours"), "clap": tiny_bundle, "latents": Path("latents")}
    settings = diffusion_settings(parts, Path("run"), 1) | {"model": "model.yaml"}
    made = train_diffusion.run(load(train_diffusion.TrainDiffusionConfig, settings, Path()))
    model = StableAudio.from_pretrained(made, "cpu", "float32")
    assert model.representation.hop == 32 and model.generate("tone", steps=1, seed=1).audio.isfinite().all()


@pytest.mark.long
def test_an_imported_system_is_trained_on_and_goes_back(run, whole: dict[str, Tensor], data: Path) -> None:
    """From its weights, scale of latents included: the same tensors by name, some of which have moved."""
    tokenizer = train_tokenizer(["a tone number 1"], 280)
    clap = ClapConfig(vocab_size=300, text_layers=2, text_feed_forward=16, text_positions=80)
    encoder = {"text_encoder": TextEncoder(clap, tokenizer).state_dict()}
    bundle.save_bundle("clap", replace(load_model_config(TINY), clap=clap), encoder, tokenizer.to_str())
    write(whole, SYSTEM)
    assert run("import", *FILES, "ours", "--clap", "clap") == 0
    pre_encode.run(pre_encode.PreEncodeConfig(vae="ours", data=str(data), output="latents"))
    parts = {"vae": Path("ours"), "clap": Path("ours"), "latents": Path("latents"), "initial": Path("ours")}
    settings = diffusion_settings(parts, Path("run"), 1, ema_decay=0.0) | {"model": "ours/config.yaml"}
    made = train_diffusion.run(load(train_diffusion.TrainDiffusionConfig, settings, Path()))
    assert run("export", made, "-o", "back.ckpt", "--config", "back.json") == 0
    back = stored("back.ckpt")
    assert back.keys() == whole.keys()
    moved = {name.split(".")[0] for name, value in whole.items() if not torch.equal(back[name], value)}
    assert moved == {"model", "conditioner"}
    assert json.loads(Path("back.json").read_text())["model"]["pretransform"]["scale"] == 1.5


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


def refusal(run, capsys: pytest.CaptureFixture[str], *args: object) -> str:
    capsys.readouterr()
    assert run(*args) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert not Path("new").exists() and not list(Path().glob(".*"))
    return lines[0]


def test_files_that_are_no_weights_are_refused(run, whole: dict[str, Tensor], capsys) -> None:
    from safetensors.torch import save_file

    write(whole, SYSTEM)
    torch.save({"state_dict": whole, "callbacks": Payload()}, "code.ckpt")
    Path("half.ckpt").write_bytes(Path("model.ckpt").read_bytes()[:-20000])
    save_file(whole, "a.safetensors")
    Path("half.safetensors").write_bytes(Path("a.safetensors").read_bytes()[:-20000])
    Path("text.ckpt").write_text("hello")
    torch.save([1, 2], "list.ckpt")
    for name, words in {
        "code.ckpt": "more than weights",
        "half.ckpt": "damaged",
        "half.safetensors": "damaged",
        "text.ckpt": "damaged",
        "list.ckpt": "no tensors",
        "none.ckpt": "no such file",
    }.items():
        line = refusal(run, capsys, "import", name, "--config", "model_config.json", "-o", "new")
        assert name in line and words in line, line
    assert not Path("ran").exists()
    assert "ask for no averages" in refusal(run, capsys, "import", *FILES, "new", "--ema")


def test_tensors_that_do_not_fit_are_named(run, whole: dict[str, Tensor], capsys) -> None:
    key = "model.model.to_in.block.block1.project.weight"
    missing = {k: v for k, v in whole.items() if k != key}
    wrong, more = whole | {key: torch.zeros(32, 8, 5)}, whole | {"model.model.extra": torch.zeros(3)}
    for state, words in (
        (missing, f"'{key}' (32, 8, 3) is missing"),
        (wrong, f"'{key}' has shape (32, 8, 5), model_config.json gives (32, 8, 3)"),
        (more, "'model.model.extra' (3,) is unexpected"),
    ):
        write(state, SYSTEM)
        line = refusal(run, capsys, "import", *FILES, "new")
        assert words in line and "model.ckpt" in line and "model_config.json" in line, line


CHANGES: dict[str, tuple[str, Any]] = {
    "another network": ("model.diffusion.type", "dit"),
    "another text encoder": ("model.conditioning.configs.0.type", "t5"),
    "text encoder trained": ("model.conditioning.configs.0.config.finetune", True),
    "last layer": ("model.conditioning.configs.0.config.feature_layer_ix", -1),
    "timing from another second": ("model.conditioning.configs.1.config.min_val", 1),
    "two lengths": ("model.conditioning.configs.1.config.max_val", LONGEST + 1),
    "another order of tokens": (
        "model.diffusion.cross_attention_cond_ids",
        ["seconds_start", "prompt", "seconds_total"],
    ),
    "another objective": ("model.diffusion.diffusion_objective", "rectified_flow"),
    "groups": ("model.diffusion.config.resnet_groups", 8),
    "an option unknown here": ("model.diffusion.config.context_channels", [1]),
    "a list of texts": ("model.diffusion.config.factors", ["1", "2"]),
    "nearest": ("model.diffusion.config.use_nearest_upsample", True),
    "another encoder": ("model.pretransform.config.encoder.type", "taae"),
    "another decoder": ("model.pretransform.config.decoder.type", "oobleck"),
    "other rates": ("model.pretransform.config.decoder.config.rates", [2, 4]),
    "odd strides": ("model.pretransform.config.encoder.config.strides", [3, 4]),
    "mono": ("model.pretransform.config.io_channels", 1),
    "a quantizer": ("model.pretransform.config.bottleneck.type", "rvq"),
    "part of a frame": ("sample_size", 257),
    "another kind": ("model_type", "lm"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_configs_that_cannot_be_represented_are_refused_by_name(run, capsys, change: str) -> None:
    """Before the weights are read."""
    key, value = CHANGES[change]
    config = copy.deepcopy(SYSTEM)
    *path, last = key.split(".")
    at: Any = config
    for name in path:
        at = at[int(name)] if isinstance(at, list) else at[name]
    at[last] = value
    Path("model_config.json").write_text(json.dumps(config))
    line = refusal(run, capsys, "import", *FILES, "new")
    named = {"odd strides": "strides", "mono": "audio_channels", "last layer": "prompt.config.feature_layer_ix"}
    assert "model_config.json" in line and named.get(change, last) in line, line


def test_a_missing_key_and_a_broken_config_are_refused(run, capsys) -> None:
    for name in ("factors", "resnet_groups", "in_channels"):
        config = copy.deepcopy(SYSTEM)
        del config["model"]["diffusion"]["config"][name]
        Path("model_config.json").write_text(json.dumps(config))
        assert f"missing key 'model.diffusion.config.{name}'" in refusal(run, capsys, "import", *FILES, "new")
    for text, words in (("{", "not valid JSON"), ("[]", "no model config"), ('{"_class_name": "A"}', "'_class_name'")):
        Path("model_config.json").write_text(text)
        assert words in refusal(run, capsys, "import", *FILES, "new")
    Path("model_config.json").unlink()
    assert "can't be read" in refusal(run, capsys, "import", *FILES, "new")


def test_export_refuses_what_the_reference_cannot_do(run, tiny_bundle: Path, capsys) -> None:
    line = refusal(run, capsys, "export", tiny_bundle, "-o", "new", "--config", "a.json")
    assert ".safetensors or .ckpt" in line
    line = refusal(run, capsys, "export", tiny_bundle, "-o", "new.ckpt", "--config", "a.json")
    assert "vae.tanh" in line and not Path("new.ckpt").exists() and not Path("a.json").exists()


def test_a_unet_with_statistics_by_channel_is_not_exported(run, whole: dict[str, Tensor], capsys) -> None:
    write(whole, SYSTEM)
    assert run("import", *FILES, "ours") == 0
    config, parts = load_model_config("ours"), {n: bundle.read_part("ours", n) for n in ("vae", "unet", "conditioner")}
    parts["unet"]["latent_mean"][3] = 0.1
    bundle.save_bundle("ours", config, parts)
    line = refusal(run, capsys, "export", "ours", "-o", "new.ckpt", "--config", "a.json")
    assert "channel by channel" in line


def test_nothing_is_written_over_unasked(run, whole: dict[str, Tensor], capsys) -> None:
    write(whole, SYSTEM)
    assert run("import", *FILES, "ours") == 0
    before = Path("ours/config.yaml").stat().st_mtime_ns
    assert "--overwrite" in refusal(run, capsys, "import", *FILES, "ours")
    assert "--overwrite" in refusal(run, capsys, "export", "ours", "-o", "model.ckpt", "--config", "new.json")
    assert "written twice" in refusal(run, capsys, "export", "ours", "-o", "new.ckpt", "--config", "new.ckpt")
    own = ("export", "ours", "-o", "ours/vae.safetensors", "--config", "new.json", "--overwrite")
    assert "vae.safetensors: is the file that is read" in refusal(run, capsys, *own)
    for name in FILES:
        if Path(name).is_file():
            shutil.copy(name, "ours")
    within = [f"ours/{name}" if Path(name).is_file() else name for name in FILES]
    assert "which is read; write to another place" in refusal(run, capsys, "import", *within, "ours", "--overwrite")
    assert Path("ours/config.yaml").stat().st_mtime_ns == before and not Path("new.json").exists()
