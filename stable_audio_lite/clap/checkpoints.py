"""Reading a CLAP from any source, and the two parts that bundles store it in.

A source is the name of a shipped bundle, a bundle's folder, a folder in transformers' format, the id of either on the
Hugging Face hub, or a LAION-CLAP `.pt`, whose tokenizer is the `tokenizer.json` beside it, else RoBERTa's from the hub.

The parts are `text_encoder`, which is all that a generator needs, under the names of `TextEncoder`; and
`audio_encoder`, which holds everything else, the last layer of the text tower included, under transformers' names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from stable_audio_lite import bundle
from stable_audio_lite.clap import laion
from stable_audio_lite.clap.config import MAX_TOKENS, ClapConfig, config_from_transformers
from stable_audio_lite.clap.model import Clap
from stable_audio_lite.clap.text_encoder import TextEncoder
from stable_audio_lite.clap.tokenizer import load_tokenizer
from stable_audio_lite.config import from_dict
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import replacing_folder
from stable_audio_lite.weights import fetch_from_hub, load_state, read_weights

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LAION_SUFFIXES = (".pt", ".pth", ".ckpt")

_PARTS = ("text_encoder", "audio_encoder")
_CONFIG_FILE, _FEATURES_FILE = "config.json", "preprocessor_config.json"
_WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")
_HUB_FILES = (
    *(bundle.CONFIG_FILE, bundle.TOKENIZER_FILE, *(f"{part}.safetensors" for part in _PARTS)),
    *(_CONFIG_FILE, _FEATURES_FILE, *_WEIGHTS_FILES),
)
_ROBERTA = "FacebookAI/roberta-base"
_CONSTANTS = ("position_ids", "token_type_ids", "relative_position_index")  # absent from some files
# From transformers' names to those in `text_encoder`, to be applied in this order.
_TEXT_ENCODER_NAMES = (
    ("text_model.embeddings.word_embeddings.", "tower.tokens."),
    ("text_model.embeddings.position_embeddings.", "tower.positions."),
    ("text_model.embeddings.token_type_embeddings.", "tower.types."),
    ("text_model.embeddings.LayerNorm.", "tower.norm."),
    ("text_model.encoder.layer.", "tower.layers."),
    (".attention.self.", "."),
    (".attention.output.dense.", ".out."),
    (".attention.output.LayerNorm.", ".attention_norm."),
    (".intermediate.dense.", ".up."),
    (".output.dense.", ".down."),
    (".output.LayerNorm.", ".feed_forward_norm."),
)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A CLAP as read from its `source`.

    Its `parts` are the state dicts of `text_encoder` and, where the source has both towers, `audio_encoder`, in the
    floating types that they are stored in.

    Raises:
        UserError: the tokenizer has more tokens than the text tower.
    """

    source: str
    config: ClapConfig
    tokenizer: Tokenizer
    parts: Mapping[str, dict[str, Tensor]]

    def __post_init__(self) -> None:
        if (tokens := self.tokenizer.get_vocab_size()) > self.config.vocab_size:
            raise UserError(
                f"{self.source}: its tokenizer knows {tokens} tokens, but clap.vocab_size is {self.config.vocab_size}; "
                "use the one that the text encoder was trained with"
            )

    @classmethod
    def of(cls, clap: Clap, source: str) -> Checkpoint:
        """Make the checkpoint that `clap` could have been read from; it shares the memory of `clap`."""
        return cls(source=source, config=clap.config, tokenizer=clap.tokenizer, parts=split_clap(clap))

    def text_encoder(self) -> TextEncoder:
        """The text encoder in float32, made without importing transformers.

        Raises:
            UserError: a weight is missing, unexpected or of another shape.
        """
        with bundle.WithoutInitialisation():
            encoder = TextEncoder(self.config, self.tokenizer)
        state = self.parts["text_encoder"]
        load_state(encoder, state, str(bundle.part_path(self.source, "text_encoder")), "the config", assign=True)
        return encoder.float()

    def clap(self, dropout: float = 0.1) -> Clap | None:
        """Both towers in float32 and eval mode, or None where the source lacks the audio tower.

        Raises:
            UserError: a weight is missing or of another shape.
        """
        if "audio_encoder" not in self.parts:
            return None
        clap = Clap(self.config, self.tokenizer, dropout)
        state = dict(self.parts["audio_encoder"])
        for name in clap.model.state_dict():
            if (ours := text_encoder_name(name, self.config)) in self.parts["text_encoder"]:
                state[name] = self.parts["text_encoder"][ours]
        return _fill(clap, state, self.source)


def read_checkpoint(source: str | Path, config: ClapConfig | None = None, *, text_only: bool = False) -> Checkpoint:
    """Read the CLAP at `source`: those parts that a bundle has, or only the text encoder with `text_only`.

    Raises:
        UserError: there is no such source, a file is missing or damaged, it is no CLAP, or its sizes aren't `config`.
    """
    path = _locate(source)
    if (path / bundle.CONFIG_FILE).is_file():
        checkpoint = _read_bundle(path, text_only)
    else:
        checkpoint = _read_transformers(path) if path.is_dir() else _read_laion(path)
    if config is not None:
        _check_sizes(checkpoint.config, config, source)
    return checkpoint


def load_clap(source: str | Path, config: ClapConfig | None = None, dropout: float = 0.1) -> Clap:
    """Load both towers of the CLAP at `source`, in float32 and eval mode; `dropout` only matters in training.

    Raises:
        UserError: as `read_checkpoint`, or the bundle has no audio tower.
    """
    if (clap := read_checkpoint(source, config).clap(dropout)) is None:
        raise UserError(f"{source}: has no audio_encoder.safetensors; give a bundle with both CLAP towers")
    return clap


def load_text_encoder(source: str | Path, config: ClapConfig | None = None) -> TextEncoder:
    """Load the text encoder of the CLAP at `source`, in float32.

    Raises:
        UserError: as `read_checkpoint`, or a weight is missing, unexpected or of another shape.
    """
    return read_checkpoint(source, config, text_only=True).text_encoder()


def split_clap(clap: Clap) -> dict[str, dict[str, Tensor]]:
    """Split `clap` into the state dicts of a bundle's two parts, which share its memory."""
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
    for name, value in clap.model.state_dict().items():
        ours = text_encoder_name(name, clap.config)
        parts["text_encoder" if ours else "audio_encoder"][ours or name] = value
    return parts


def text_encoder_name(name: str, config: ClapConfig) -> str | None:
    """Name in `text_encoder` of the weight that transformers calls `name`, or None for one in `audio_encoder`."""
    for theirs, ours in _TEXT_ENCODER_NAMES:
        name = name.replace(theirs, ours)
    last = f"tower.layers.{config.text_layers - 1}."  # not part of the features
    return name if name.startswith("tower.") and not name.startswith(last) else None


def save_transformers(clap: Clap, folder: str | Path) -> None:
    """Write `clap` in transformers' format, for `ClapModel.from_pretrained` and `load_clap`.

    Raises:
        UserError: `folder` can't be written.
    """
    from transformers import ClapFeatureExtractor

    config = clap.config
    tokens = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.max_tokens, **tokens}
    with replacing_folder(folder) as temporary:
        clap.model.save_pretrained(temporary)
        ClapFeatureExtractor(
            feature_size=config.mel_bins,
            frequency_min=config.mel_lowest,
            truncation="fusion" if config.audio_fusion else "rand_trunc",
        ).save_pretrained(temporary)
        clap.tokenizer.enable_truncation(config.max_tokens)
        clap.tokenizer.save(str(temporary / bundle.TOKENIZER_FILE))
        (temporary / "tokenizer_config.json").write_text(json.dumps(described, indent=2))


def _locate(source: str | Path) -> Path:
    """The folder of a source, fetched from the hub where it is an id, or the path of a LAION file."""
    path = Path(source).expanduser()
    if str(source) in bundle.SHIPPED:
        return bundle.resolve(source)
    return path if path.is_dir() or path.suffix in LAION_SUFFIXES else fetch_from_hub(str(source), _HUB_FILES)


def _read_bundle(folder: Path, text_only: bool) -> Checkpoint:
    file, data = bundle.read_config(folder)
    if not isinstance(data.get("clap"), dict):
        raise UserError(f"{file}: has no key 'clap', so this model reads no text; give one that does")
    parts = {"text_encoder": bundle.read_part(folder, "text_encoder")}
    if not text_only and bundle.part_path(folder, "audio_encoder").is_file():
        parts["audio_encoder"] = bundle.read_part(folder, "audio_encoder")
    return Checkpoint(
        source=str(folder),
        config=from_dict(ClapConfig, data["clap"], str(file)),
        tokenizer=load_tokenizer(folder / bundle.TOKENIZER_FILE),
        parts=parts,
    )


def _read_transformers(folder: Path) -> Checkpoint:
    if not (folder / _CONFIG_FILE).is_file():
        raise UserError(f"{folder}: no CLAP, it has neither {bundle.CONFIG_FILE} nor {_CONFIG_FILE}")
    tokenizer = load_tokenizer(folder / bundle.TOKENIZER_FILE)
    if (weights := next((folder / f for f in _WEIGHTS_FILES if (folder / f).is_file()), None)) is None:
        raise UserError(f"{folder}: no {' or '.join(_WEIGHTS_FILES)} there")
    clap = Clap(_transformers_sizes(folder, tokenizer), tokenizer)
    return Checkpoint.of(_fill(clap, read_weights(weights), str(folder)), str(folder))


def _read_laion(path: Path) -> Checkpoint:
    state = laion.read_laion(path)
    tokenizer = path.with_name(bundle.TOKENIZER_FILE)
    if not tokenizer.is_file():
        tokenizer = fetch_from_hub(_ROBERTA, (bundle.TOKENIZER_FILE,)) / bundle.TOKENIZER_FILE
    clap = Clap(laion.infer_config(state, path), load_tokenizer(tokenizer))
    return Checkpoint.of(_fill(clap, state, str(path)), str(path))


def _transformers_sizes(folder: Path, tokenizer: Tokenizer) -> ClapConfig:
    path, features = folder / _CONFIG_FILE, folder / _FEATURES_FILE
    limit = (tokenizer.truncation or {}).get("max_length", MAX_TOKENS)
    try:
        lowest = json.loads(features.read_text()).get("frequency_min", 0.0) if features.is_file() else 0.0
        return config_from_transformers(json.loads(path.read_text()), min(limit, MAX_TOKENS), float(lowest))
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise UserError(f"{path}: not a CLAP that can be read: {error}") from error


def _check_sizes(found: ClapConfig, expected: ClapConfig, source: str | Path) -> None:
    different = [
        f"clap.{name} is {value!r} there, {getattr(expected, name)!r} here"
        for name, value in vars(found).items()
        if value != getattr(expected, name)
    ]
    if different:
        raise UserError(f"{source}: another CLAP than the model config's: {'; '.join(different)}")


def _fill(clap: Clap, state: Mapping[str, Tensor], source: str) -> Clap:
    """Load weights under transformers' names; those that `clap` lacks are ignored."""
    own = clap.model.state_dict()
    found = {name: state[name] for name in own if name in state and not name.endswith(_CONSTANTS)}
    constants = {name: value for name, value in own.items() if name.endswith(_CONSTANTS)}
    load_state(clap.model, constants | found, source, "a CLAP of this size")
    return clap.eval()
