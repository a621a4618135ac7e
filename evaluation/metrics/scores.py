"""Means over sounds: KL of PaSST and CLAP score, as Evans et al. 2024 (arXiv 2402.04825) define them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from evaluation.metrics.inputs import CalibratedMetric, MetricInputs, halves, mean_metric
from evaluation.result import Missing
from evaluation.sounds import Clip
from evaluation.store import Embedder

if TYPE_CHECKING:
    from evaluation.embedders.clap import ClapEmbedder

_EPSILON = 1e-6  # added to the reference's probabilities, by definition


def kl_passt(embedder: Embedder, inputs: MetricInputs) -> CalibratedMetric:
    """KL(generated || recording + 1e-6) of an AudioSet tagger's softmax over its mean logits, over pairs.

    Raises:
        Missing: there are no pairs.
    """
    pairs = inputs.pairs()
    if not inputs.reference:
        raise Missing("needs recordings; give REFERENCE, their folder or list")
    if not pairs:
        raise Missing("no generated sound has the prompt or the name of a recording; give both the same")

    def log_probabilities(clips: Sequence[Clip]) -> Tensor:
        return inputs.means(clips, embedder, "logits").double().log_softmax(1)

    generated, recorded = ([pair[side] for pair in pairs] for side in (0, 1))
    made, own, all_real = (log_probabilities(clips) for clips in (generated, recorded, inputs.reference))
    baselines = {}
    if len(inputs.reference) >= 2:
        first, second = halves(inputs.reference)
        baselines["real halves"] = divergence(log_probabilities(first[: len(second)]), log_probabilities(second))
    if inputs.noise:
        baselines["noise"] = divergence(log_probabilities(inputs.noise), all_real)
    if len({clip.key for clip in recorded}) > 1:
        baselines["shuffled captions"] = divergence_of_others(made, own, [clip.key for clip in recorded])
    if inputs.vae:
        baselines["vae"] = divergence(log_probabilities(inputs.vae), all_real)
    known = {name: values.numpy() for name, values in baselines.items()}
    return mean_metric("kl_passt", divergence(made, own).numpy(), known, higher_is_better=False, least=0.0)


def divergence(made: Tensor, real: Tensor) -> Tensor:
    """KL(made || real + 1e-6), (B,), of log-probabilities (B, classes)."""
    return (made.exp() * (made - (real.exp() + _EPSILON).log())).sum(1)


def divergence_of_others(made: Tensor, real: Tensor, keys: Sequence[str]) -> Tensor:
    """The mean `divergence` of each sound to all recordings of other keys than its own, (B,)."""
    table = (made.exp() * made).sum(1)[:, None] - made.exp() @ (real.exp() + _EPSILON).log().T
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    which = torch.tensor([numbers[key] for key in keys])
    other = which[:, None] != which
    return (table * other).sum(1) / other.sum(1)


def clap_score(embedder: ClapEmbedder, inputs: MetricInputs) -> CalibratedMetric:
    """Cosine between a prompt's embedding and its sound's.

    Raises:
        Missing: no generated sound has a prompt.
    """

    def scores(clips: Sequence[Clip], captions: Sequence[str], shuffled: bool = False) -> np.ndarray:
        told = [(clip, caption) for clip, caption in zip(clips, captions, strict=True) if caption]
        if not told:
            return np.zeros(0)
        sounds = inputs.means([clip for clip, _ in told], embedder).double()
        texts = embedder.embed_text([caption for _, caption in told]).double()
        if shuffled:
            texts = _mean_of_others(texts, [caption for _, caption in told])
        return (sounds * texts).sum(1).numpy()

    prompts = [clip.record.prompt for clip in inputs.generated]
    if not any(prompts):
        raise Missing("no prompts; list them in GENERATED's metadata.jsonl, or name the files as the recordings are")
    captions = [clip.record.prompt for clip in inputs.reference]
    several = len(set(filter(None, prompts))) > 1
    baselines = {
        "real": scores(inputs.reference, captions),
        "noise": scores(inputs.noise, _as_many(captions if any(captions) else prompts, len(inputs.noise))),
        "shuffled captions": scores(inputs.generated, prompts, shuffled=True) if several else np.zeros(0),
        "vae": scores(inputs.vae, captions[: len(inputs.vae)]),
    }
    return mean_metric("clap_score", scores(inputs.generated, prompts), baselines, higher_is_better=True)


def _as_many(captions: Sequence[str], count: int) -> list[str]:
    """`count` of the captions that are there, from the beginning again where they are fewer."""
    return list(captions if len(captions) == count else islice(cycle(filter(None, captions)), count))


def _mean_of_others(texts: Tensor, prompts: Sequence[str]) -> Tensor:
    """For each prompt, the mean embedding (B, D) of those that are other texts."""
    same = {prompt: [i for i, other in enumerate(prompts) if other == prompt] for prompt in set(prompts)}
    own = torch.stack([texts[same[prompt]].sum(0) for prompt in prompts])
    others = torch.tensor([len(prompts) - len(same[prompt]) for prompt in prompts])
    return (texts.sum(0) - own) / others[:, None]
