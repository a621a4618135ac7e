"""Train a CLAP: python -m training.train_clap --config configs/stable_audio/train_clap.yaml.

The loss is the symmetric contrastive one with learned temperatures, on pairs of a 10 s crop and one of its captions.
Besides the bundle the run writes `transformers/`, which `transformers.ClapModel.from_pretrained` loads.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from stable_audio_lite.audio.io import read_audio
from stable_audio_lite.bundle import save_bundle
from stable_audio_lite.clap.checkpoints import load_clap, save_transformers, split_clap, text_encoder_name
from stable_audio_lite.clap.config import ClapConfig
from stable_audio_lite.clap.mel import CLIP_FRAMES, SAMPLE_RATE, log_mel, mel_views, repeat_pad
from stable_audio_lite.clap.model import Clap, retrieval
from stable_audio_lite.clap.tokenizer import UNKNOWN_TOKEN, tokenize, train_tokenizer
from stable_audio_lite.config import load_config, to_dict
from stable_audio_lite.data.manifest import Item, read_items
from stable_audio_lite.data.unreadable import Unreadable
from stable_audio_lite.errors import UserError
from stable_audio_lite.systems import StableAudioConfig
from training.command import main
from training.frozen import check_stage
from training.loop import fit
from training.noise import generator
from training.task import OptimizerConfig, RunConfig, TrainingTask, say_unread
from training.update import Update, unwrap


@dataclass(frozen=True, kw_only=True)
class TrainClapConfig:
    """Training of a CLAP.

    Attributes:
        model: path of the model's YAML file; its `clap` part sets the sizes.
        data: folders of captioned audio to train on; the tokenizer learns from all their captions.
        held_out: folder of captioned audio for retrieval metrics, or null.
        held_out_items: number of those items to use; 0 for all.
        initial: bundle whose CLAP, tokenizer included, to continue from, or null.
        freeze_text: keep the text features that a U-Net sees as they are, so that U-Nets trained with them stay valid;
            only the last text layer, the projections and the audio tower are trained. Needs `initial`.
        max_unreadable: share of the data's files that may be unreadable; others take their place, and
            `unreadable.jsonl` beside the checkpoints lists them.
        gain_db: the level of each crop is changed by up to this many dB either way.
        dropout: of hidden units in both towers; in short runs it drowns the signal that the text tower learns from.
        masked: largest share of a crop that each of two stripes in time and two in frequency silences.
        main_caption: share of the draws that take an item's first caption; the others take any of its captions.
        language: weight of the masked language model's loss on the text features that a U-Net sees; 0 for the
            contrastive loss alone, where the text tower was such a model before.
        corrupted: share of the tokens that the language model has to predict.
    """

    model: str
    data: tuple[str, ...]
    held_out: str | None = None
    held_out_items: int = 0
    initial: str | None = None
    freeze_text: bool = False
    max_unreadable: float = 0.01
    batch_size: int = 64
    dropout: float = 0.1
    gain_db: float = 6.0
    masked: float = 0.1
    main_caption: float = 0.0
    language: float = 0.0
    corrupted: float = 0.15
    run: RunConfig
    optimizer: OptimizerConfig

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("data is empty; list the folders to train on")
        if self.batch_size < 2:
            raise ValueError(f"batch_size must be at least 2: a contrast needs two pairs, got {self.batch_size}")
        if self.freeze_text and not self.initial:
            raise ValueError("freeze_text needs initial: the bundle whose text features are to stay")
        if self.gain_db < 0:
            raise ValueError(f"gain_db must be at least 0, got {self.gain_db}")
        for name in ("main_caption", "corrupted"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in 0..1, got {getattr(self, name)}")
        if self.language < 0:
            raise ValueError(f"language must be at least 0, got {self.language}")
        if not (0 <= self.masked < 1 and 0 <= self.dropout < 1):
            raise ValueError(f"masked and dropout must be in [0, 1), got {self.masked}, {self.dropout}")


class MelCache:
    """Log-mel spectrograms of items, computed once and kept in memory in half precision (128 kB for 10 s)."""

    def __init__(self, items: Sequence[Item], config: ClapConfig):
        self.items, self.config = items, config
        self._cache: dict[int, Tensor] = {}

    def __call__(self, index: int) -> Tensor:
        """Spectrogram of item `index`: (frames, mel_bins) in dB, at least 10 s, shorter sounds repeated.

        Raises:
            UserError: it can't be read.
        """
        if index not in self._cache:
            mono = read_audio(self.items[index].path, SAMPLE_RATE).mean(0)
            self._cache[index] = log_mel(self.config, repeat_pad(mono)).half()
        return self._cache[index].float()


class ClapTask(TrainingTask):
    """Contrastive training of both towers."""

    averaged = ("clap",)

    def __init__(self, config: TrainClapConfig):
        self.config = config
        check_stage("initial", config.initial, "training.train_clap", hub=True)
        self.model = load_config(config.model, StableAudioConfig)
        self.batch_size = config.batch_size
        self.pieces = [item for folder in config.data for item in _captioned(folder)]
        self.items = len(self.pieces)
        self.mels = MelCache(self.pieces, self.model.clap)
        self.unreadable = Unreadable(len(self.pieces), config.max_unreadable, config.run.output)
        torch.manual_seed(config.run.seed)
        clap = load_clap(config.initial, self.model.clap, config.dropout) if config.initial else self._new()
        self.tokenizer = clap.tokenizer
        captions = [caption for item in self.pieces for caption in item.captions]
        say_unread(self.tokenizer, captions, self.model.clap.max_tokens)
        if config.freeze_text:
            for name, parameter in clap.model.named_parameters():
                parameter.requires_grad_(text_encoder_name(name, clap.config) is None)
        self.modules: dict[str, nn.Module] = {"clap": clap.train()}
        self.optimizers = {"clap": config.optimizer}

    def _new(self) -> Clap:
        captions = (caption for item in self.pieces for caption in item.captions)
        clap = Clap(self.model.clap, train_tokenizer(captions, self.model.clap.vocab_size), self.config.dropout)
        _enlarge_weights(clap.model.text_model, self.model.clap.text_layers)
        return clap

    def batch(self, number: int, rank: int, world: int) -> dict[str, Tensor]:
        if len(self.pieces) < self.batch_size * world:
            raise UserError(
                f"batch_size: {self.batch_size} on {world} processes needs that many items, "
                f"{', '.join(self.config.data)} has {len(self.pieces)}"
            )
        # One permutation for all processes, so that no item meets itself as a negative.
        seed = self.config.run.seed
        order = torch.randperm(len(self.pieces), generator=generator(seed, number)).tolist()
        places = range(rank * self.batch_size, (rank + 1) * self.batch_size)
        chosen, mels = zip(*(self._readable(order, place, world) for place in places), strict=True)
        draws = [generator(seed, number, index) for index in chosen]
        captions = [self._caption(self.pieces[i], draw) for i, draw in zip(chosen, draws, strict=True)]
        views = [self._augment(self._crop(mel, draw), draw) for mel, draw in zip(mels, draws, strict=True)]
        batch = self._collate(captions, mels, views)
        if self.model.clap.audio_fusion and batch["longer"].sum() < 2:
            # The fusion weights need a gradient in every batch, and their batch norm two items.
            batch["longer"][:2] = True
        if self.config.language:
            ids = batch["ids"]
            guessed = torch.rand(ids.shape, generator=generator(seed, number, rank)) < self.config.corrupted
            batch["corrupted"] = torch.where(guessed & batch["mask"], UNKNOWN_TOKEN, ids)
        return batch

    def _readable(self, order: list[int], place: int, world: int) -> tuple[int, Tensor]:
        """Number and spectrogram of the item at `place`, or of the first readable one that no process has drawn."""
        rest = order[world * self.batch_size :]
        for index in (order[place], *rest[place:], *rest[:place]):
            try:
                return index, self.mels(index)
            except UserError as error:
                self.unreadable.add(self.pieces[index].path, error)
        raise UserError(
            f"{', '.join(self.config.data)}: no further item can be read in the place of "
            f"{self.pieces[order[place]].path}"
        )

    def _collate(self, captions: Sequence[str], mels: Sequence[Tensor], views: Sequence[Tensor]) -> dict[str, Tensor]:
        """Stack what belongs to B whole spectrograms into arguments of `Clap.forward`."""
        ids, mask = tokenize(self.tokenizer, captions, self.model.clap.max_tokens)
        longer = torch.tensor([len(mel) > CLIP_FRAMES for mel in mels])
        return {"ids": ids, "mask": mask, "mels": torch.stack(list(views)), "longer": longer}

    def _caption(self, item: Item, draw: torch.Generator) -> str:
        main = self.config.main_caption
        if main and float(torch.rand((), generator=draw)) < main:
            return item.captions[0]
        return item.captions[_integer(len(item.captions), draw)]

    def _crop(self, mel: Tensor, draw: torch.Generator) -> Tensor:
        """Random 10 s of (frames, bins), or for a fusion model one crop from each third -> (1 or 4, frames, bins)."""
        spare = len(mel) - CLIP_FRAMES
        if not self.model.clap.audio_fusion:
            start = _integer(spare + 1, draw)
            return mel[None, start : start + CLIP_FRAMES]
        edges = [third * spare // 3 for third in range(4)]
        first, middle, last = (a + _integer(b - a + 1, draw) for a, b in pairwise(edges))
        return mel_views(self.model.clap, mel, (first, middle, last))

    def _augment(self, views: Tensor, draw: torch.Generator) -> Tensor:
        """Change the level of views (V, frames, bins) and silence stripes in time and frequency."""
        views = views + (2 * float(torch.rand((), generator=draw)) - 1) * self.config.gain_db
        floor = views.min()
        for axis in (1, 1, 2, 2):
            size = views.shape[axis]
            width = _integer(int(self.config.masked * size) + 1, draw)
            views.narrow(axis, _integer(size - width + 1, draw), width).fill_(floor)
        return views

    def step(self, batch: dict[str, Tensor], step: int, update: Update) -> dict[str, Tensor]:
        text, audio, language = self.modules["clap"](**batch)
        text, audio = _gather(text), _gather(audio)
        clap = self._unwrapped
        losses = {"loss/contrastive": clap.loss(text, audio)}
        if language is not None:
            losses["loss/language"] = language
        update("clap", losses["loss/contrastive"] + self.config.language * losses.get("loss/language", 0.0))
        matched = (audio.float() @ text.float().T).argmax(1) == torch.arange(len(text), device=text.device)
        return losses | {"batch/accuracy": matched.float().mean(), "temperature/inverse": clap.logit_scales[0].exp()}

    def evaluate(self, step: int) -> dict[str, float]:
        """Compute recall at 1 and 10 among the held-out items, both ways, in percent."""
        if self.config.held_out is None:
            return {}
        clap = self._unwrapped
        clap.eval()
        embeddings = [clap(**{k: v.to(clap.device) for k, v in batch.items()})[:2] for batch in self._held_out]
        clap.train()
        text, audio = (torch.cat(parts).float() for parts in zip(*embeddings, strict=True))
        recalls = retrieval(text, audio)
        print(f"\nstep {step + 1}: " + ", ".join(f"{k} {v:.1f} %" for k, v in recalls.items()), flush=True)
        return {f"held_out/{k}": v for k, v in recalls.items()}

    def export(self, folder: Path, modules: dict[str, nn.Module]) -> None:
        clap = modules["clap"]
        assert isinstance(clap, Clap)
        save_bundle(folder, self.model, split_clap(clap), self.tokenizer.to_str())
        save_transformers(clap, folder.parent / "transformers")

    def fingerprint(self) -> dict[str, Any]:
        return {"model": {"clap": to_dict(self.model.clap)}, "freeze_text": self.config.freeze_text}

    def keep(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer.to_str()}

    def take(self, kept: dict[str, Any]) -> None:
        if "tokenizer" in kept:
            from tokenizers import Tokenizer

            self.tokenizer = self._unwrapped.tokenizer = Tokenizer.from_str(kept["tokenizer"])

    @property
    def _unwrapped(self) -> Clap:
        return cast("Clap", unwrap(self.modules["clap"]))

    @cached_property
    def _held_out(self) -> list[dict[str, Tensor]]:
        """Batches of the held-out items that can be read, each with its main caption."""
        assert self.config.held_out is not None
        items = _captioned(self.config.held_out)[: self.config.held_out_items or None]
        mels, found = MelCache(items, self.model.clap), []
        for index, item in enumerate(items):
            try:
                found.append((item.captions[0], mels(index)))
            except UserError as error:
                print(f"left out: {error}", file=sys.stderr)
        if not found:
            raise UserError(f"{self.config.held_out}: none of the {len(items)} items can be read")
        batches = []
        for start in range(0, len(found), self.batch_size):
            captions, whole = zip(*found[start : start + self.batch_size], strict=True)
            batches.append(self._collate(captions, whole, [mel_views(self.model.clap, mel) for mel in whole]))
        return batches


@torch.no_grad()
def _enlarge_weights(text_model: nn.Module, layers: int) -> None:
    """Give a new text tower's matrices a standard deviation of width^-1/2.

    transformers draws them sqrt(2 layers) times smaller. The pooled first token then depends so little on the text that
    all embeddings agree for the first few hundred steps.
    """
    for module in text_model.modules():
        if isinstance(module, nn.Linear):
            module.weight.mul_((2 * layers) ** 0.5)


def _captioned(folder: str) -> list[Item]:
    items = [item for item in read_items(folder) if item.captions]
    if not items:
        raise UserError(f"{folder}: no item has a caption; CLAP needs 'text' or 'captions' in metadata.jsonl")
    return items


def _integer(below: int, draw: torch.Generator) -> int:
    return int(torch.randint(below, (), generator=draw))


def _gather(vectors: Tensor) -> Tensor:
    """Gather the vectors of all processes, so that each contrasts with the whole batch; gradients flow to each."""
    if not torch.distributed.is_initialized():
        return vectors
    from torch.distributed.nn.functional import all_gather

    return torch.cat(list(all_gather(vectors)))


def run(config: TrainClapConfig) -> Path:
    """Train as configured; returns the bundle's folder."""
    return fit(config.run, ClapTask(config), config)


if __name__ == "__main__":
    main(__doc__, TrainClapConfig, run)
