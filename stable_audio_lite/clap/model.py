"""CLAP: one embedding space for texts and sounds (HTSAT audio tower, RoBERTa text tower), at any size.

The network is transformers' `ClapModel`; this module gives it a strict configuration, mel features in
torch, a tokenizer, the contrastive loss, and files in transformers' format. Sources: Wu et al. 2023,
"Large-scale Contrastive Language-Audio Pretraining with Feature Fusion and Keyword-to-Caption
Augmentation"; Chen et al. 2022, "HTS-AT".
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stable_audio_lite.clap.mel import CLIP_FRAMES, CLIP_SAMPLES, SAMPLE_RATE, log_mel, repeat_pad
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import replacing_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_FILES = ("config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors", "pytorch_model.bin")
_MAY_BE_ZERO = ("audio_fusion", "mel_lowest")
PAD_TOKEN = 1  # RoBERTa's; positions are counted from PAD_TOKEN + 1
UNKNOWN_TOKEN = 3


@dataclass(frozen=True, kw_only=True)
class ClapConfig:
    """Sizes of both towers; the defaults are those of laion/clap-htsat-fused, the paper's size.

    Attributes:
        text_positions: rows of the position table; at least max_tokens + 2, for RoBERTa counts from 2.
        max_tokens: texts are cut and padded to this many tokens.
        audio_width: channels of the first HTSAT stage; they double with each stage.
        audio_patch: size and stride of the patches of the square image that the mel spectrogram is folded
            into.
        audio_fusion: whether sounds over 10 s enter as a shrunk whole plus three crops, fused by attention.
        mel_lowest: where the mel filters begin, in Hz: 0 in transformers' CLAPs, 50 in LAION's own.
        embedding: width of the shared space.
    """

    vocab_size: int = 50265
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    text_feed_forward: int = 3072
    text_positions: int = 514
    text_norm_eps: float = 1e-12
    max_tokens: int = 77
    audio_width: int = 96
    audio_patch: int = 4
    audio_depths: tuple[int, ...] = (2, 2, 6, 2)
    audio_heads: tuple[int, ...] = (4, 8, 16, 32)
    audio_window: int = 8
    audio_fusion: bool = True
    mel_bins: int = 64
    mel_lowest: float = 0.0
    image_size: int = 256
    embedding: int = 512

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            sizes = value if isinstance(value, tuple) else (value,)
            if field.name not in _MAY_BE_ZERO and (not sizes or min(sizes) <= 0):
                raise ValueError(f"{field.name} must be above 0, got {value}")
        if self.text_layers < 2:
            raise ValueError(f"text_layers must be at least 2 (the next-to-last is used), got {self.text_layers}")
        if self.text_width % self.text_heads:
            raise ValueError(f"text_width {self.text_width} must be a multiple of text_heads {self.text_heads}")
        if self.text_positions < self.max_tokens + PAD_TOKEN + 1:
            raise ValueError(f"text_positions must be at least max_tokens + 2, got {self.text_positions}")
        if len(self.audio_depths) != len(self.audio_heads):
            raise ValueError(f"audio_depths {self.audio_depths} and audio_heads {self.audio_heads} differ in length")
        widths = [self.audio_width * 2**i for i in range(len(self.audio_depths))]
        if any(width % heads for width, heads in zip(widths, self.audio_heads, strict=True)):
            raise ValueError(f"audio_heads must divide the stages' widths {widths}, got {self.audio_heads}")
        smallest = self.audio_patch * 2 ** (len(widths) - 1) * self.audio_window
        if self.image_size % smallest:
            raise ValueError(f"image_size must divide by {smallest} (patch, halvings, window): {self.image_size}")

    @property
    def audio_stage_width(self) -> int:
        """Channels of the last HTSAT stage."""
        return self.audio_width * 2 ** (len(self.audio_depths) - 1)


def transformers_config(config: ClapConfig, dropout: float = 0.1) -> Any:
    """The `transformers.ClapConfig` of the same network; `dropout` matters to training alone."""
    from transformers import ClapConfig as HubConfig

    text = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.text_width,
        "num_hidden_layers": config.text_layers,
        "num_attention_heads": config.text_heads,
        "intermediate_size": config.text_feed_forward,
        "max_position_embeddings": config.text_positions,
        "layer_norm_eps": config.text_norm_eps,
        "pad_token_id": PAD_TOKEN,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
    audio = {
        "patch_embeds_hidden_size": config.audio_width,
        "hidden_size": config.audio_stage_width,
        "patch_size": config.audio_patch,
        "patch_stride": [config.audio_patch, config.audio_patch],
        "depths": list(config.audio_depths),
        "num_attention_heads": list(config.audio_heads),
        "num_hidden_layers": len(config.audio_depths),
        "window_size": config.audio_window,
        "enable_fusion": config.audio_fusion,
        "fusion_type": "aff_2d" if config.audio_fusion else None,
        "num_mel_bins": config.mel_bins,
        "spec_size": config.image_size,
        "hidden_dropout_prob": dropout,
    }
    return HubConfig(text_config=text, audio_config=audio, projection_dim=config.embedding)


def config_from_transformers(data: dict[str, Any], max_tokens: int = 77, mel_lowest: float = 0.0) -> ClapConfig:
    """Our configuration of a transformers `config.json`; keys it leaves out have transformers' defaults.

    Raises:
        ValueError: it describes no CLAP, or one with parts that this project does not build.
    """
    if data.get("model_type") != "clap":
        raise ValueError(f"model_type is {data.get('model_type')!r}, expected 'clap'")
    text, audio = data.get("text_config") or {}, data.get("audio_config") or {}
    if text.get("hidden_act", "gelu") != "gelu" or text.get("pad_token_id", PAD_TOKEN) != PAD_TOKEN:
        raise ValueError("only text towers with gelu and padding token 1 are supported")
    patch = audio.get("patch_size", 4)
    return ClapConfig(
        vocab_size=text.get("vocab_size", 50265),
        text_width=text.get("hidden_size", 768),
        text_layers=text.get("num_hidden_layers", 12),
        text_heads=text.get("num_attention_heads", 12),
        text_feed_forward=text.get("intermediate_size", 3072),
        text_positions=text.get("max_position_embeddings", 514),
        text_norm_eps=text.get("layer_norm_eps", 1e-12),
        max_tokens=max_tokens,
        audio_width=audio.get("patch_embeds_hidden_size", 96),
        audio_patch=patch if isinstance(patch, int) else patch[0],
        audio_depths=tuple(audio.get("depths", (2, 2, 6, 2))),
        audio_heads=tuple(audio.get("num_attention_heads", (4, 8, 16, 32))),
        audio_window=audio.get("window_size", 8),
        audio_fusion=audio.get("enable_fusion", False),
        mel_bins=audio.get("num_mel_bins", 64),
        mel_lowest=mel_lowest,
        image_size=audio.get("spec_size", 256),
        embedding=data.get("projection_dim", 512),
    )


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a `tokenizer.json`.

    Raises:
        UserError: the file is missing or no tokenizer.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); a tokenizer.json is needed") from error
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{path}: not a tokenizer.json ({' '.join(str(error).split())[:120]})") from error
    if tokenizer.token_to_id("<pad>") != PAD_TOKEN:
        raise UserError(f"{path}: its <pad> must be token {PAD_TOKEN}, as RoBERTa's is; give the CLAP's own tokenizer")
    return tokenizer


def tokenize(tokenizer: Tokenizer, prompts: list[str], max_tokens: int) -> tuple[Tensor, Tensor]:
    """Prompts -> token ids (B, max_tokens) and their mask (B, max_tokens), True where a token is real.

    A text of more than `max_tokens` tokens is cut; its end token stays.
    """
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    ids = torch.full((len(prompts), max_tokens), PAD_TOKEN, dtype=torch.long)
    for row, encoding in zip(ids, tokenizer.encode_batch(list(prompts)), strict=True):
        row[: len(encoding.ids)] = torch.tensor(encoding.ids)
    return ids, ids != PAD_TOKEN


def clap_mel(config: ClapConfig, waveform: Tensor) -> Tensor:
    """48 kHz mono (T,) -> its whole log-mel spectrogram (frames, mel_bins); under 10 s it is repeated."""
    return log_mel(repeat_pad(waveform), config.mel_bins, config.mel_lowest, config.audio_fusion)


def clap_views(config: ClapConfig, mel: Tensor, starts: tuple[int, int, int] | None = None) -> Tensor:
    """A spectrogram of at least 10 s (frames, mel_bins) -> the audio tower's input (1 or 4, 1001, mel_bins).

    A fusion model takes the shrunk whole and the crops that begin at frames `starts`, by default at the start, middle
    and end. Another model takes the crop of the middle.
    """
    spare = len(mel) - CLIP_FRAMES
    first, middle, last = starts or (0, spare // 2, spare)
    if not config.audio_fusion:
        return mel[None, middle : middle + CLIP_FRAMES]
    shrunk = F.interpolate(mel[None, None], size=(CLIP_FRAMES, mel.shape[1]), mode="bilinear")[0, 0]
    return torch.stack([shrunk] + [mel[i : i + CLIP_FRAMES] for i in (first, middle, last)])


class Clap(nn.Module):
    """Both towers with their tokenizer; `model` is transformers' `ClapModel`, embeddings are of unit length."""

    def __init__(self, config: ClapConfig, tokenizer: Tokenizer, dropout: float = 0.1):
        super().__init__()
        from transformers import ClapModel

        self.config = config
        self.tokenizer = tokenizer
        self.model = ClapModel(transformers_config(config, dropout))

    def forward(
        self, ids: Tensor, mask: Tensor, mels: Tensor, longer: Tensor, corrupted: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Text and audio embeddings (B, embedding), and the language loss where `corrupted` ids are given.

        Takes token ids and mask (B, N), mels (B, 1 or 4, frames, bins), and whether a sound is over 10 s
        (B,).
        """
        language = None if corrupted is None else self._language_loss(ids, mask, corrupted)
        return self._texts(ids, mask), self._sounds(mels, longer), language

    def _language_loss(self, ids: Tensor, mask: Tensor, corrupted: Tensor) -> Tensor:
        """Cross-entropy (a scalar) of `ids` as the next-to-last text layer says them of `corrupted` ones.

        A masked language model as RoBERTa is before it becomes a CLAP's text tower (Liu et al. 2019), asked of all
        tokens: a contrast with sounds alone lets the layer that generators read forget what the audio tower can't hear.
        """
        hidden = self.model.text_model(
            input_ids=corrupted, attention_mask=mask.long(), output_hidden_states=True
        ).hidden_states[-2]
        logits = hidden[mask] @ self.model.text_model.get_input_embeddings().weight.T
        return F.cross_entropy(logits.float(), ids[mask])

    @torch.no_grad()
    def embed_text(self, prompts: list[str]) -> Tensor:
        """Prompts -> unit vectors (B, embedding)."""
        ids, mask = tokenize(self.tokenizer, prompts, self.config.max_tokens)
        return self._texts(ids.to(self.device), mask.to(self.device))

    @torch.no_grad()
    def embed_audio(self, waveform: Tensor, sample_rate: int = SAMPLE_RATE) -> Tensor:
        """Sounds (B, T) or (B, C, T), full scale 1 -> unit vectors (B, embedding).

        Channels are averaged, other rates resampled. Sounds under 10 s are repeated; over 10 s a fusion
        model takes the shrunk whole and crops at its start, middle and end, another model the middle 10 s.
        """
        import torchaudio.functional

        mono = waveform.mean(1) if waveform.ndim == 3 else waveform
        if sample_rate != SAMPLE_RATE:
            mono = torchaudio.functional.resample(mono.float(), sample_rate, SAMPLE_RATE)
        mels = torch.stack([self.features(row) for row in mono.to(self.device)])
        longer = torch.full((len(mels),), mono.shape[-1] > CLIP_SAMPLES, device=self.device)
        return self._sounds(mels, longer)

    @torch.no_grad()
    def embed_mel(self, mel: Tensor, longer: bool) -> Tensor:
        """Unit vector (1, embedding) of the spectrogram that `clap_mel` gives; `longer`: of a sound over 10 s."""
        views = clap_views(self.config, mel)[None].to(self.device)
        return self._sounds(views, torch.tensor([longer], device=self.device))

    def features(self, waveform: Tensor) -> Tensor:
        """48 kHz mono (T,) -> the audio tower's input (1 or 4, 1001, mel_bins)."""
        return clap_views(self.config, clap_mel(self.config, waveform))

    def loss(self, text: Tensor, audio: Tensor) -> Tensor:
        """Symmetric contrastive loss of matching unit vectors (B, embedding).

        Inverse temperatures are learned, one for each direction, and stay under 100.
        """
        labels = torch.arange(len(text), device=text.device)
        similarity = audio.float() @ text.float().T
        by_audio, by_text = (s.clamp(max=math.log(100.0)).exp() for s in self.scales)
        return (F.cross_entropy(by_audio * similarity, labels) + F.cross_entropy(by_text * similarity.T, labels)) / 2

    @property
    def scales(self) -> tuple[Tensor, Tensor]:
        """Logarithms of the inverse temperatures: sound to text, text to sound."""
        return self.model.logit_scale_a, self.model.logit_scale_t

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.logit_scale_a.device

    def _texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        pooled = self.model.text_model(input_ids=ids, attention_mask=mask.long()).pooler_output
        return F.normalize(self.model.text_projection(pooled), dim=-1)

    def _sounds(self, mels: Tensor, longer: Tensor) -> Tensor:
        pooled = self.model.audio_model(input_features=mels, is_longer=longer[:, None]).pooler_output
        return F.normalize(self.model.audio_projection(pooled), dim=-1)

    def save(self, folder: str | Path) -> None:
        """Write a folder in transformers' format: `ClapModel.from_pretrained` and `Clap.load` read it."""
        from transformers import ClapFeatureExtractor

        truncation = "fusion" if self.config.audio_fusion else "rand_trunc"
        with replacing_folder(folder) as temporary:
            self.model.save_pretrained(temporary)
            ClapFeatureExtractor(
                feature_size=self.config.mel_bins,
                frequency_min=self.config.mel_lowest,
                truncation=truncation,
            ).save_pretrained(temporary)
            self.tokenizer.enable_truncation(self.config.max_tokens)
            self.tokenizer.save(str(temporary / "tokenizer.json"))
            described = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": self.config.max_tokens,
            }
            tokens = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
            (temporary / "tokenizer_config.json").write_text(json.dumps(described | tokens, indent=2))

    @classmethod
    def load(cls, source: str | Path) -> Clap:
        """Read what `save` wrote, or any transformers-format CLAP, by folder or hub id.

        Raises:
            UserError: as `read_transformers`.
        """
        return cls.from_weights(read_transformers(source))

    @classmethod
    def from_weights(cls, weights: ClapWeights) -> Clap:
        """Both towers from weights in transformers' names.

        Raises:
            UserError: weights are missing or of another shape.
        """
        clap = cls(weights.config, weights.tokenizer)
        load_state(clap.model, weights.state, weights.source)
        return clap.eval()


def retrieval(text: Tensor, audio: Tensor) -> dict[str, float]:
    """Recall at 1 and 10 in percent of matching unit vectors (N, D), from text to audio and back.

    A match that is no nearer than others counts as found after them.
    """
    similarity = text @ audio.T  # N texts, N sounds
    figures: dict[str, float] = {}
    for name, scores in (("text_to_audio", similarity), ("audio_to_text", similarity.T)):
        rank = (scores >= scores.diag()[:, None]).sum(1) - 1
        figures |= {f"{name}/R@{k}": 100 * float((rank < k).float().mean()) for k in (1, 10)}
    return figures


@dataclass(frozen=True)
class ClapWeights:
    """A CLAP as read from files: `state` has transformers' `ClapModel` names; `source` is for messages."""

    config: ClapConfig
    state: dict[str, Tensor]
    tokenizer: Tokenizer
    source: str


def load_state(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load `state` into `module`; keys beyond the module's are ignored.

    Raises:
        UserError: weights are missing or of another shape.
    """
    for name, own in module.state_dict().items():
        if name.endswith(("position_ids", "token_type_ids", "relative_position_index")):
            continue  # constants, absent from some files
        if name not in state or state[name].shape != own.shape:
            got = f"shape {tuple(state[name].shape)}" if name in state else "nothing"
            raise UserError(
                f"{source}: weight '{name}' should be {tuple(own.shape)}, got {got}; is this file complete?"
            )
    module.load_state_dict({k: v for k, v in state.items() if k in module.state_dict()}, strict=False)


def read_transformers(source: str | Path) -> ClapWeights:
    """Read a transformers-format CLAP from a folder, or a hub id (fetched once, then from the cache).

    Raises:
        UserError: there is no such folder or id, a file is missing or broken, or it is no CLAP.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = fetch(str(source), _FILES)
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{source}: no config.json there; give a transformers-format CLAP folder or a hub id")
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    limit = (tokenizer.truncation or {}).get("max_length", 77)
    try:
        features = folder / "preprocessor_config.json"
        lowest = json.loads(features.read_text()).get("frequency_min", 0.0) if features.is_file() else 0.0
        config = config_from_transformers(json.loads(path.read_text()), min(limit, 77), float(lowest))
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a CLAP that can be read: {error}") from error
    return ClapWeights(config, _read_weights(folder), tokenizer, str(source))


def fetch(hub_id: str, files: tuple[str, ...]) -> Path:
    """The local folder of a hub repository's `files`, those of them that it has.

    Raises:
        UserError: there is no such repository, or neither the network nor the cache has it.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(files)))
    except Exception as error:  # the hub client has many, none of which the user can tell apart
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{hub_id}: neither a folder nor a hub id that could be fetched ({reason})") from error


def _read_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    path = folder / "model.safetensors"
    try:
        if path.is_file():
            return load_file(path)
        path = folder / "pytorch_model.bin"
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{folder}: no model.safetensors or pytorch_model.bin there") from error
    except Exception as error:
        raise UserError(f"{path}: broken or not a weights file ({' '.join(str(error).split())[:120]})") from error
