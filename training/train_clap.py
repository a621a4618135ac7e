"""Train a CLAP: python -m training.train_clap --config configs/stable_audio/train_clap.yaml.

Symmetric contrastive loss with learned temperatures on pairs of a 10 s crop and one of its captions.
Besides the bundle it writes `transformers/`, which `transformers.ClapModel.from_pretrained` loads.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from stable_audio_lite.audio.io import read_audio
from stable_audio_lite.bundle import resolve, save_bundle
from stable_audio_lite.clap.mel import CLIP_FRAMES, SAMPLE_RATE
from stable_audio_lite.clap.model import UNKNOWN_TOKEN, Clap, ClapConfig, clap_mel, clap_views, retrieval, tokenize
from stable_audio_lite.clap.text import in_text_encoder, load_whole_clap, split_clap
from stable_audio_lite.clap.tokenizer import train_tokenizer
from stable_audio_lite.config import load_config
from stable_audio_lite.data.manifest import Item, read_items
from stable_audio_lite.data.unreadable import Unreadable
from stable_audio_lite.errors import UserError
from stable_audio_lite.systems import StableAudioConfig, load_model_config
from training.command import main
from training.frozen import compare_claps
from training.loop import fit
from training.noise import generator
from training.task import OptimizerConfig, RunConfig, Task
from training.update import Update, unwrap


@dataclass(frozen=True, kw_only=True)
class TrainClapConfig:
    """Training of a CLAP.

    Attributes:
        model: path of the model's YAML file; its `clap` part sets the sizes.
        data: folders of captioned audio to train on; the tokenizer learns from all their captions.
        held_out: folder of captioned audio for retrieval figures, or null.
        held_out_items: how many of those to use; 0 for all.
        initial: bundle whose CLAP, tokenizer included, to go on from, or null.
        freeze_text: keep the text features that a U-Net sees as they are, so that U-Nets trained with them stay valid;
            the last text layer, the projections and the audio tower learn. With `initial`.
        max_unreadable: share of the data's files that may be unreadable; others take their place, and
            `unreadable.jsonl` beside the checkpoints lists them.
        gain_db: the level of each crop is changed by up to this many dB either way.
        dropout: of hidden units in both towers; with few steps it drowns what the text tower learns from.
        masked: each of two stripes in time and in frequency that are silenced covers up to this share of a
            crop.
        main_caption: share of the draws that take an item's first caption; the others take any of its captions.
        language: weight of the masked language model's loss on the text features that a U-Net sees; 0 for a contrast
            alone, where the text tower was such a model before.
        corrupted: share of the tokens that the language model has to guess.
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


class Mels:
    """Log-mel spectrograms of items, computed once and kept in memory in half precision (128 kB for 10 s)."""

    def __init__(self, items: list[Item], clap: ClapConfig):
        self.pieces, self.clap = items, clap
        self.kept: dict[int, Tensor] = {}

    def __call__(self, index: int) -> Tensor:
        """Of item `index`: (frames, mel_bins) in dB, at least 10 s, shorter sounds repeated."""
        if index not in self.kept:
            mono = read_audio(self.pieces[index].path, SAMPLE_RATE).mean(0)
            self.kept[index] = clap_mel(self.clap, mono).half()
        return self.kept[index].float()


class ClapTask(Task):
    """Both towers together."""

    averaged = ("clap",)

    def __init__(self, config: TrainClapConfig):
        self.config = config
        self.model = load_config(config.model, StableAudioConfig)
        self.batch_size = config.batch_size
        self.pieces = [item for folder in config.data for item in _captioned(folder)]
        self.items = len(self.pieces)
        self.mels = Mels(self.pieces, self.model.clap)
        self.unreadable = Unreadable(len(self.pieces), config.max_unreadable, config.run.output)
        torch.manual_seed(config.run.seed)
        clap = self._go_on_from(config.initial) if config.initial else self._new()
        self.tokenizer = clap.tokenizer
        if config.freeze_text:
            for name, parameter in clap.model.named_parameters():
                parameter.requires_grad_(not in_text_encoder(name, clap.config))
        self.modules: dict[str, nn.Module] = {"clap": clap}
        self.optimizers = {"clap": config.optimizer}

    def _new(self) -> Clap:
        captions = (caption for item in self.pieces for caption in item.captions)
        clap = Clap(self.model.clap, train_tokenizer(captions, self.model.clap.vocab_size), self.config.dropout)
        _unshrink(clap.model.text_model, self.model.clap.text_layers)
        return clap

    def _go_on_from(self, bundle: str) -> Clap:
        folder = resolve(bundle)
        compare_claps(load_model_config(folder).clap, self.model.clap, bundle)
        whole = load_whole_clap(folder)
        if whole is None:
            raise UserError(f"initial: {bundle} has no audio_encoder.safetensors; give a bundle with both CLAP towers")
        clap = Clap(self.model.clap, whole.tokenizer, self.config.dropout)
        clap.load_state_dict(whole.state_dict())
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
        own_places = range(rank * self.batch_size, (rank + 1) * self.batch_size)
        chosen, mels = zip(*(self._readable(order, place, world) for place in own_places), strict=True)
        own = [generator(seed, number, index) for index in chosen]
        main = self.config.main_caption
        captions = [_pick(self.pieces[i].captions, main, g) for i, g in zip(chosen, own, strict=True)]
        views = torch.stack([self._augment(self._views(mel, g), g) for mel, g in zip(mels, own, strict=True)])
        ids, mask = _tokens(self.tokenizer, captions, self.model.clap.max_tokens)
        longer = self._longer(list(mels))
        if self.model.clap.audio_fusion and longer.sum() < 2:
            longer[:2] = True  # the fusion weights need a gradient in every batch, and their batch norm two items
        batch = {"ids": ids, "mask": mask, "mels": views, "longer": longer}
        if self.config.language:
            guessed = torch.rand(ids.shape, generator=generator(seed, number, rank)) < self.config.corrupted
            batch["corrupted"] = torch.where(guessed & mask, UNKNOWN_TOKEN, ids)
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

    def step(self, batch: dict[str, Tensor], step: int, update: Update) -> dict[str, Tensor]:
        text, audio, language = self.modules["clap"](**batch)
        text, audio = _gather(text), _gather(audio)
        clap = self._plain
        losses = {"loss/contrastive": clap.loss(text, audio)}
        if language is not None:
            losses["loss/language"] = language
        update("clap", losses["loss/contrastive"] + self.config.language * losses.get("loss/language", 0.0))
        matched = (audio.float() @ text.float().T).argmax(1) == torch.arange(len(text), device=text.device)
        return losses | {"batch/accuracy": matched.float().mean(), "temperature/inverse": clap.scales[0].exp()}

    def evaluate(self, step: int) -> dict[str, float]:
        """Recall at 1 and 10 among the held-out items, both ways, as percentages."""
        if self.config.held_out is None:
            return {}
        clap = self._plain
        clap.eval()
        text, audio = [], []
        for part in self._held_out:
            on_device = {k: v.to(clap.device) for k, v in part.items()}
            t, a, _ = clap(**on_device)
            text.append(t.float())
            audio.append(a.float())
        clap.train()
        figures = retrieval(torch.cat(text), torch.cat(audio))
        print(f"\nstep {step + 1}: " + ", ".join(f"{k} {v:.1f} %" for k, v in figures.items()), flush=True)
        return {f"held_out/{k}": v for k, v in figures.items()}

    def export(self, folder: Path, modules: dict[str, nn.Module]) -> None:
        clap = modules["clap"]
        assert isinstance(clap, Clap)
        save_bundle(folder, self.model, split_clap(clap), self.tokenizer.to_str())
        clap.save(folder.parent / "transformers")

    @property
    def _plain(self) -> Clap:
        return cast("Clap", unwrap(self.modules["clap"]))

    @cached_property
    def _held_out(self) -> list[dict[str, Tensor]]:
        assert self.config.held_out is not None
        items = _captioned(self.config.held_out)[: self.config.held_out_items or None]
        mels = Mels(items, self.model.clap)

        def read(index: int) -> Tensor | None:
            try:
                return mels(index)
            except UserError as error:
                print(f"left out: {error}", file=sys.stderr)
                return None

        with ThreadPoolExecutor(2) as pool:
            found = [
                (i, mel) for i, mel in zip(items, pool.map(read, range(len(items))), strict=True) if mel is not None
            ]
        if not found:
            raise UserError(f"{self.config.held_out}: none of the {len(items)} items can be read")
        items, whole_mels = [item for item, _ in found], [mel for _, mel in found]
        views = torch.stack([clap_views(self.model.clap, mel) for mel in whole_mels])
        ids, mask = _tokens(self.tokenizer, [i.captions[0] for i in items], self.model.clap.max_tokens)
        whole = {"ids": ids, "mask": mask, "mels": views, "longer": self._longer(whole_mels)}
        parts = range(0, len(items), self.batch_size)
        return [{k: v[i : i + self.batch_size] for k, v in whole.items()} for i in parts]

    def _longer(self, mels: list[Tensor]) -> Tensor:
        """Which of B spectrograms a fusion model takes in several views: (B,) bool."""
        return torch.tensor([self.model.clap.audio_fusion and len(mel) > CLIP_FRAMES for mel in mels])

    def _views(self, mel: Tensor, own: torch.Generator) -> Tensor:
        """Random 10 s of (frames, bins), or for a fusion model one crop from each third -> (1 or 4, frames, bins)."""
        spare = len(mel) - CLIP_FRAMES
        if not self.model.clap.audio_fusion:
            start = _integer(spare + 1, own)
            return mel[None, start : start + CLIP_FRAMES]
        edges = [third * spare // 3 for third in range(4)]
        first, middle, last = (a + _integer(b - a + 1, own) for a, b in pairwise(edges))
        return clap_views(self.model.clap, mel, (first, middle, last))

    def _augment(self, views: Tensor, own: torch.Generator) -> Tensor:
        """The views (V, frames, bins) at another level, with stripes in time and frequency silenced."""
        views = views + (2 * float(torch.rand((), generator=own)) - 1) * self.config.gain_db
        floor = views.min()
        for axis in (1, 1, 2, 2):
            size = views.shape[axis]
            width = _integer(int(self.config.masked * size) + 1, own)
            views.narrow(axis, _integer(size - width + 1, own), width).fill_(floor)
        return views


@torch.no_grad()
def _unshrink(text_model: nn.Module, layers: int) -> None:
    """Give a new text tower's matrices a standard deviation of width^-1/2.

    transformers draws them sqrt(2 layers) times smaller. The pooled first token then sees so little of the text that
    all embeddings agree for the first hundreds of steps.
    """
    for module in text_model.modules():
        if isinstance(module, nn.Linear):
            module.weight.mul_((2 * layers) ** 0.5)


def _captioned(folder: str) -> list[Item]:
    items = [item for item in read_items(folder) if item.captions]
    if not items:
        raise UserError(f"{folder}: no item has a caption; CLAP needs 'text' or 'captions' in metadata.jsonl")
    return items


def _pick(captions: tuple[str, ...], main: float, own: torch.Generator) -> str:
    if main and float(torch.rand((), generator=own)) < main:
        return captions[0]
    return captions[_integer(len(captions), own)]


def _integer(below: int, own: torch.Generator) -> int:
    return int(torch.randint(below, (), generator=own))


def _tokens(tokenizer: Any, captions: list[str], max_tokens: int) -> tuple[Tensor, Tensor]:
    """As `tokenize`, without columns that are padding in all captions."""
    ids, mask = tokenize(tokenizer, captions, max_tokens)
    used = int(mask.sum(1).max())
    return ids[:, :used], mask[:, :used]


def _gather(vectors: Tensor) -> Tensor:
    """Vectors of all processes, so that each contrasts with the whole batch; gradients flow to each."""
    if not torch.distributed.is_initialized():
        return vectors
    from torch.distributed.nn.functional import all_gather

    return torch.cat(list(all_gather(vectors)))


def run(config: TrainClapConfig) -> Path:
    """Train as configured; returns the bundle's folder."""
    return fit(config.run, ClapTask(config), config)


if __name__ == "__main__":
    main(__doc__, TrainClapConfig, run)
