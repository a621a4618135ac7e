"""The `model_config.json` of stable-audio-tools, and the `config.json` of diffusers' AutoencoderOobleck, as ours.

What ours can't express shows by going back: each entry of the file must be what our config would be written as.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from stable_audio_lite.clap.config import MAX_TOKENS, ClapConfig
from stable_audio_lite.errors import UserError
from stable_audio_lite.models.conditioner import TimingConfig
from stable_audio_lite.models.unet import UNetConfig
from stable_audio_lite.models.waveform_vae import WaveformVAEConfig
from stable_audio_lite.systems import TIMING_TOKENS, GenerationDefaults, StableAudioConfig

VAE_PREFIX = "pretransform.model."
"""Prefix of the VAE's tensors in a system."""
_WINDOW = 4194304  # samples of the paper's window, for a VAE that comes without a U-Net
_SECONDS = ("seconds_start", "seconds_total")
_TEXT_WIDTH = 768  # of RoBERTa, the only text tower of stable-audio-tools' CLAPs
_GROUPS = 16  # half of the groups in its transformers' norms
_GENERATION = GenerationDefaults(cfg=6.0, rescale=0.4, sampler="dpmpp-3m-sde", sigma_min=0.03, sigma_max=500.0)
# LAION's HTSAT sizes, and two numbers in which its CLAPs differ from transformers'.
_CLAPS = {
    name: ClapConfig(audio_width=width, audio_depths=(2, 2, depth, 2), text_norm_eps=1e-5, mel_lowest=50.0)
    for name, width, depth in (("HTSAT-tiny", 96, 6), ("HTSAT-base", 128, 12))
}
# Entries that change no result, and the values of those that a file may leave out.
_IGNORED = {"training", "iterate_batch", "chunked", "model_half", "enable_grad", "requires_grad", "clap_ckpt_path"}
_DEFAULTS: dict[str, Any] = {
    **{"audio_channels": 2, "scale": 1.0, "soft_clip": False, "config": {}},
    **{"final_tanh": True, "antialias_activation": False},
    **{"audio_model_type": "HTSAT-base", "enable_fusion": True, "project_out": False, "finetune": False},
    **{"min_val": 0, "max_val": 512, "default_keys": {}, "pre_encoded_keys": []},
    **{"diffusion_objective": "v", "global_cond_ids": [], "input_concat_ids": [], "prepend_cond_ids": []},
    **{"kernel_multiplier_downsample": 2, "use_nearest_upsample": False, "use_skip_scale": True, "patch_size": 1},
    **{"use_context_time": True, "use_xattn_time": False, "use_stft": False, "context_features_multiplier": 4},
}


class Described(NamedTuple):
    """A foreign config as ours.

    Attributes:
        config: of the whole system; of a VAE alone with the paper's other parts.
        layout: whose names the tensors have.
        scale: by which latents are divided for the U-Net, or None for a VAE alone.
        prefix: of the VAE's tensors.
    """

    config: StableAudioConfig
    layout: Literal["stable-audio-tools", "diffusers"] = "stable-audio-tools"
    scale: float | None = None
    prefix: str = ""


def read_model_config(path: str | Path, *, vae_only: bool = False) -> Described:
    """Read the config of a system, or of a VAE alone; with `vae_only` that of the VAE in a system of any kind.

    Raises:
        UserError: no such file, no JSON, or an entry is missing, wrong, or has a value that ours can't do.
    """
    data = _read(path)
    try:
        if "_class_name" in data:
            return _diffusers(data)
        if vae_only and isinstance(data.get("model"), dict) and "pretransform" in data["model"]:
            return _alone(data, "model.pretransform.config", VAE_PREFIX)
        kind = _get(data, "model_type", str)
        if kind not in ("autoencoder", "diffusion_cond"):
            raise ValueError(f"key 'model_type' is {kind!r}; autoencoder and diffusion_cond can be imported")
        return _whole(data) if kind == "diffusion_cond" else _alone(data, "model", "")
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def write_model_config(path: str | Path, described: Described) -> None:
    """Write a config that `check_expressible` let pass as stable-audio-tools'."""
    config = described.config
    assert isinstance(config.vae, WaveformVAEConfig)
    if described.scale is None:
        data: dict[str, Any] = {"model_type": "autoencoder", "sample_size": 65536, "sample_rate": config.sample_rate}
        data |= {"audio_channels": config.vae.audio_channels, "model": _autoencoder_json(config.vae)}
    else:
        data = _system_json(config, described.scale)
        conditioning = data["model"]["conditioning"]
        conditioning["configs"] = list(conditioning["configs"].values())
    Path(path).write_text(json.dumps(data, indent=4) + "\n", encoding="utf-8")


def check_expressible(config: StableAudioConfig, whole: bool, where: str) -> None:
    """Refuse a config that stable-audio-tools can't compute; if not `whole`, only its VAE counts.

    Raises:
        UserError: it names the key.
    """
    wanted: dict[str, Any] = {"vae.kind": "waveform"}
    if getattr(config.vae, "blocks", "dac") == "dac":
        wanted["vae.tanh"] = True
    if whole:
        wanted |= {"unet.attend_padding": True, "unet.rotary": False, "unet.groups": _GROUPS}
        wanted |= {"unet.pooled_context": False, "unet.pulse": False, "unet.guidance": 0}
        wanted |= {"clap.text_width": _TEXT_WIDTH, "clap.max_tokens": MAX_TOKENS}
    for key, value in wanted.items():
        part, name = key.split(".")
        if (own := getattr(getattr(config, part), name)) != value:
            raise UserError(f"{where}: key '{key}' is {own!r}; stable-audio-tools has {value!r}, and nothing else")


def _diffusers(data: dict[str, Any]) -> Described:
    if (name := data["_class_name"]) != "AutoencoderOobleck":
        raise ValueError(f"key '_class_name' is {name!r}; AutoencoderOobleck can be imported")
    vae = WaveformVAEConfig(
        audio_channels=_get(data, "audio_channels", int),
        encoder_width=_get(data, "encoder_hidden_size", int),
        decoder_width=_get(data, "decoder_channels", int) * _get(data, "channel_multiples", list)[-1],
        strides=tuple(_get(data, "downsampling_ratios", list)),
        latent_channels=_get(data, "decoder_input_channels", int),
        blocks="oobleck",
    )
    plain = {key: value for key, value in data.items() if not key.startswith("_")}
    # Its encoder's first width is also the number of means and scales that it ends in.
    ours = {"channel_multiples": list(vae.multipliers[1:]), "encoder_hidden_size": 2 * vae.latent_channels}
    _check_same(plain, plain | ours, "")
    return Described(_with_vae(vae, _get(data, "sampling_rate", int)), "diffusers")


def _alone(data: dict[str, Any], key: str, prefix: str) -> Described:
    vae = _vae(data, key)
    config = _with_vae(vae, _get(data, "sample_rate", int))
    _check_same(_get(data, key, dict), _autoencoder_json(vae), key)
    return Described(config, prefix=prefix)


def _whole(data: dict[str, Any]) -> Described:
    items = _get(data, "model.conditioning", dict).get("configs")
    if not isinstance(items, list) or not all(isinstance(item, dict) and "id" in item for item in items):
        raise ValueError("key 'model.conditioning.configs' must be a list of conditions, each with an 'id'")
    data["model"]["conditioning"]["configs"] = {item["id"]: item for item in items}
    conditions, unet = "model.conditioning.configs", "model.diffusion.config"
    clap, total = f"{conditions}.prompt.config", f"{conditions}.seconds_total.config"
    for part, wanted in (
        ("model.diffusion", "adp_cfg_1d"),
        ("model.pretransform", "autoencoder"),
        (f"{conditions}.prompt", "clap_text"),
        (f"{conditions}.seconds_total", "int"),
    ):
        if (found := _get(data, f"{part}.type", str)) != wanted:
            raise ValueError(f"key '{part}.type' is {found!r}; only {wanted!r} can be imported, or the VAE alone")
    vae, scale = _vae(data, "model.pretransform.config"), _get(data, "model.pretransform.scale", (int, float))
    if (htsat := _get(data, f"{clap}.audio_model_type", str)) not in _CLAPS:
        raise ValueError(f"key '{clap}.audio_model_type' is {htsat!r}; {' and '.join(_CLAPS)} can be imported")
    config = StableAudioConfig(
        kind="stable_audio",
        sample_rate=_get(data, "sample_rate", int),
        latent_frames=_get(data, "sample_size", int) // vae.hop,
        vae=vae,
        clap=replace(_CLAPS[htsat], audio_fusion=_get(data, f"{clap}.enable_fusion", bool)),
        timing=TimingConfig(max_seconds=_get(data, f"{total}.max_val", int)),
        unet=UNetConfig(
            width=_get(data, f"{unet}.channels", int),
            multipliers=tuple(_get(data, f"{unet}.multipliers", list)),
            factors=tuple(_get(data, f"{unet}.factors", list)),
            blocks=tuple(_get(data, f"{unet}.num_blocks", list)),
            attentions=tuple(_get(data, f"{unet}.attentions", list)),
            heads=_get(data, f"{unet}.attention_heads", int),
            feed_forward=_get(data, f"{unet}.attention_multiplier", int),
            attend_padding=True,
        ),
        generation=_GENERATION,
    )
    _check_same(data, _system_json(config, scale), "")
    return Described(config, scale=float(scale), prefix=VAE_PREFIX)


def _vae(data: dict[str, Any], key: str) -> WaveformVAEConfig:
    encoder, decoder = f"{key}.encoder.config", f"{key}.decoder.config"
    if (blocks := _get(data, f"{key}.encoder.type", str)) not in ("dac", "oobleck"):
        raise ValueError(f"key '{key}.encoder.type' is {blocks!r}; dac and oobleck can be imported")
    oobleck = blocks == "oobleck"
    return WaveformVAEConfig(
        audio_channels=_get(data, f"{key}.io_channels", int),
        encoder_width=_get(data, f"{encoder}.{'channels' if oobleck else 'd_model'}", int),
        decoder_width=_get(data, f"{decoder}.channels", int)
        * (_get(data, f"{decoder}.c_mults", list)[-1] if oobleck else 1),
        strides=tuple(_get(data, f"{encoder}.strides", list)),
        latent_channels=_get(data, f"{key}.latent_dim", int),
        blocks=cast("Literal['dac', 'oobleck']", blocks),
        tanh=_get(data, f"{decoder}.final_tanh", bool) if oobleck else True,
    )


def _with_vae(vae: WaveformVAEConfig, sample_rate: int) -> StableAudioConfig:
    """The paper's system around a VAE that comes alone."""
    return StableAudioConfig(
        kind="stable_audio",
        sample_rate=sample_rate,
        latent_frames=max(_WINDOW // vae.hop, 1),
        vae=vae,
        clap=ClapConfig(),
        unet=UNetConfig(),
    )


def _autoencoder_json(vae: WaveformVAEConfig) -> dict[str, Any]:
    audio, latents, strides = vae.audio_channels, vae.latent_channels, list(vae.strides)
    encoder: dict[str, Any] = {"in_channels": audio, "latent_dim": 2 * latents, "strides": strides}
    decoder: dict[str, Any] = {"out_channels": audio, "latent_dim": latents}
    if vae.blocks == "dac":
        encoder |= {"d_model": vae.encoder_width}
        decoder |= {"channels": vae.decoder_width, "rates": strides[::-1]}
    else:
        both = {"c_mults": list(vae.multipliers[1:]), "use_snake": True}
        encoder |= {"channels": vae.encoder_width, **both}
        decoder |= {"channels": vae.decoder_width // vae.multipliers[-1], "strides": strides, **both}
        decoder |= {"final_tanh": vae.tanh}
    return {
        "encoder": {"type": vae.blocks, "config": encoder},
        "decoder": {"type": vae.blocks, "config": decoder},
        "bottleneck": {"type": "vae"},
        "latent_dim": latents,
        "downsampling_ratio": vae.hop,
        "io_channels": audio,
    }


def _system_json(config: StableAudioConfig, scale: float) -> dict[str, Any]:
    """The JSON of a system, with the list of conditions by their ids."""
    assert isinstance(config.vae, WaveformVAEConfig)
    unet, latents, htsat = config.unet, config.vae.latent_channels, {c.audio_width: name for name, c in _CLAPS.items()}
    prompt = {
        "audio_model_type": htsat.get(config.clap.audio_width, "HTSAT-base"),
        "enable_fusion": config.clap.audio_fusion,
        "clap_ckpt_path": "clap.pt",
        "use_text_features": True,
        "feature_layer_ix": -2,
    }
    seconds = {"min_val": 0, "max_val": config.timing.max_seconds}
    network = {
        "in_channels": latents,
        "context_embedding_features": _TEXT_WIDTH,
        "context_embedding_max_length": MAX_TOKENS + TIMING_TOKENS,
        "channels": unet.width,
        "resnet_groups": _GROUPS,
        "multipliers": list(unet.multipliers),
        "factors": list(unet.factors),
        "num_blocks": list(unet.blocks),
        "attentions": list(unet.attentions),
        "attention_heads": unet.heads,
        "attention_multiplier": unet.feed_forward,
    }
    ids = {"cross_attention_cond_ids": ["prompt", *_SECONDS]}
    conditions = {"prompt": {"id": "prompt", "type": "clap_text", "config": prompt}}
    conditions |= {name: {"id": name, "type": "int", "config": seconds} for name in _SECONDS}
    return {
        "model_type": "diffusion_cond",
        "sample_size": config.window_samples,
        "sample_rate": config.sample_rate,
        "audio_channels": config.vae.audio_channels,
        "model": {
            "pretransform": {"type": "autoencoder", "scale": scale, "config": _autoencoder_json(config.vae)},
            "conditioning": {"configs": conditions, "cond_dim": _TEXT_WIDTH},
            "diffusion": {"type": "adp_cfg_1d", **ids, "config": network},
            "io_channels": latents,
        },
    }


def _read(path: str | Path) -> dict[str, Any]:
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); give the checkpoint's model_config.json") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(data, dict) or not {"model_type", "_class_name"} & data.keys():
        raise UserError(f"{path}: no model config of stable-audio-tools or diffusers, it has no 'model_type'")
    return data


def _get(data: Any, key: str, kind: type | tuple[type, ...]) -> Any:
    """The value at a dotted key, or its default; of the wrong type it is a ValueError."""
    for name in key.split("."):
        data = data.get(name, _DEFAULTS.get(name)) if isinstance(data, dict) else None
    if data is None:
        raise ValueError(f"missing key '{key}'")
    if kind is list and not (isinstance(data, list) and data and all(type(item) is int for item in data)):
        raise ValueError(f"key '{key}' must be a list of whole numbers, got {data!r}")
    if not isinstance(data, kind) or (kind is not bool and isinstance(data, bool)):
        raise ValueError(f"key '{key}' must be of type {getattr(kind, '__name__', 'float')}, got {data!r}")
    return data


def _check_same(found: Any, ours: Any, key: str) -> None:
    """Raise ValueError at the first entry that our config would be written with another value for."""
    if isinstance(found, dict) and isinstance(ours, dict):
        for name in [name for name in {**ours, **found} if name not in _IGNORED]:
            default = _DEFAULTS.get(name)
            _check_same(found.get(name, default), ours.get(name, default), f"{key}.{name}".lstrip("."))
    elif found is None and ours is not None:
        raise ValueError(f"missing key '{key}'; it would have to be {ours!r}")
    elif found != ours:
        wanted = "there is no such option here" if ours is None else f"only {ours!r} can be imported"
        raise ValueError(f"key '{key}' is {found!r}; {wanted}")
