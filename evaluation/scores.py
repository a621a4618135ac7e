"""Means over sounds: KL of PaSST and CLAP score, as Evans et al. 2024 (arXiv 2402.04825) define them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.bootstrap import interval
from evaluation.case import Case, Measured, halves
from evaluation.embedders import Embedder
from evaluation.embedders.clap import ClapEmbedder
from evaluation.result import Figure, Missing
from evaluation.sounds import Clip

_EPSILON = 1e-6  # added to the reference's probabilities, by definition


def kl_passt(embedder: Embedder, case: Case) -> Measured:
    """KL(generated || recording + 1e-6) of an AudioSet tagger's softmax over its mean logits, over pairs.

    Raises:
        Missing: there are no pairs.
    """
    pairs = case.pairs()
    if not case.reference:
        raise Missing("needs recordings; give REFERENCE, their folder or list")
    if not pairs:
        raise Missing("no generated sound has the prompt or the name of a recording; give both the same")

    def heard(clips: Sequence[Clip]) -> Tensor:
        return case.means(clips, embedder, "logits").double().log_softmax(1)

    generated, recorded = ([pair[side] for pair in pairs] for side in (0, 1))
    made, own = heard(generated), heard(recorded)
    beside = {}
    if len(case.reference) >= 2:
        first, second = halves(case.reference)
        beside["real halves"] = _divergence(heard(first[: len(second)]), heard(second))
    if case.noise:
        beside["noise"] = _divergence(heard(case.noise), heard(case.reference))
    if len({clip.key for clip in recorded}) > 1:
        beside["shuffled captions"] = _mean_divergence(made, own, [clip.key for clip in recorded])
    if case.vae:
        beside["vae"] = _divergence(heard(case.vae), heard(case.reference))
    known = {name: values.numpy() for name, values in beside.items()}
    return _means("kl_passt", _divergence(made, own).numpy(), known, higher_is_better=False, least=0.0)


def _divergence(made: Tensor, real: Tensor) -> Tensor:
    """KL(made || real + 1e-6), (B,), of log-probabilities (B, classes)."""
    return (made.exp() * (made - (real.exp() + _EPSILON).log())).sum(1)


def _mean_divergence(made: Tensor, real: Tensor, keys: Sequence[str]) -> Tensor:
    """As `_divergence`, of each sound the mean over recordings of other keys than its own."""
    table = (made.exp() * made).sum(1)[:, None] - made.exp() @ (real.exp() + _EPSILON).log().T
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    which = torch.tensor([numbers[key] for key in keys])
    other = which[:, None] != which
    return (table * other).sum(1) / other.sum(1)


def clap_score(embedder: ClapEmbedder, case: Case) -> Measured:
    """Cosine between a prompt's embedding and its sound's.

    Raises:
        Missing: no generated sound has a prompt.
    """

    def scores(clips: Sequence[Clip], captions: Sequence[str], shuffled: bool = False) -> np.ndarray:
        told = [(clip, caption) for clip, caption in zip(clips, captions, strict=True) if caption]
        if not told:
            return np.zeros(0)
        sounds = case.means([clip for clip, _ in told], embedder).double()
        texts = embedder.embed_text([caption for _, caption in told]).double()
        if shuffled:
            texts = _mean_of_others(texts, [caption for _, caption in told])
        return (sounds * texts).sum(1).numpy()

    prompts = [clip.sound.prompt for clip in case.generated]
    if not any(prompts):
        raise Missing("no prompts; list them in GENERATED's metadata.jsonl, or name the files as the recordings are")
    captions = [clip.sound.prompt for clip in case.reference]
    beside = {
        "real": scores(case.reference, captions),
        "noise": scores(case.noise, _as_many(captions if any(captions) else prompts, len(case.noise))),
        "shuffled captions": scores(case.generated, prompts, True)
        if len(set(filter(None, prompts))) > 1
        else np.zeros(0),
        "vae": scores(case.vae, captions[: len(case.vae)]),
    }
    return _means("clap_score", scores(case.generated, prompts), beside, higher_is_better=True)


def _as_many(captions: Sequence[str], count: int) -> list[str]:
    """`count` of the captions that are there, from the beginning again where they are fewer."""
    return list(captions if len(captions) == count else islice(cycle(filter(None, captions)), count))


def _mean_of_others(texts: Tensor, prompts: Sequence[str]) -> Tensor:
    """For each prompt, the mean embedding (B, D) of those that are other texts."""
    same = {prompt: [i for i, other in enumerate(prompts) if other == prompt] for prompt in set(prompts)}
    own = torch.stack([texts[same[prompt]].sum(0) for prompt in prompts])
    others = torch.tensor([len(prompts) - len(same[prompt]) for prompt in prompts])
    return (texts.sum(0) - own) / others[:, None]


def _means(
    metric: str, values: np.ndarray, beside: dict[str, np.ndarray], *, higher_is_better: bool, least: float = -np.inf
) -> Measured:
    """The mean of what every sound has; what lies below `least`, as rounding or an epsilon may, is that."""
    known = {name: others for name, others in beside.items() if len(others)}
    rows: list[dict[str, Any]] = []
    for name, others in {"": values, **known}.items():
        mean, (low, high) = float(others.mean()), interval(others)
        value, low, high = np.maximum((mean, low, high), least).tolist()  # leaves NaN what it is
        rows.append({"metric": metric, "beside": name, "value": value, "low": low, "high": high, "n": len(others)})
    figure = Figure(
        name=metric,
        value=rows[0]["value"],
        low=rows[0]["low"],
        high=rows[0]["high"],
        n=len(values),
        higher_is_better=higher_is_better,
        beside={row["beside"]: row["value"] for row in rows[1:]},
    )
    return Measured(figure, rows[1:])
