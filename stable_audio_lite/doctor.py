"""A check-up of an installation: packages, programs, the device, and whether a text encoder tells captions apart."""

from __future__ import annotations

import importlib.metadata
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from packaging.requirements import Requirement
from torch import Tensor

from stable_audio_lite.clap.checkpoints import read_checkpoint
from stable_audio_lite.corpus.render import find_soundfont, find_synth
from stable_audio_lite.devices import choose_device, choose_dtype
from stable_audio_lite.errors import UserError

CAPTIONS = (
    "A slow classical piece for solo piano",
    "Fast techno with a hard kick drum, 140 bpm",
    "Acoustic guitar and a warm male voice",
    "Rain on a tin roof",
    "Church organ",
    "A big band plays swing",
    "distorted electric guitar, heavy metal",
    "Ambient pad, dark, no drums",
    "A dog barks twice",
    "sad violin melody in D minor",
    "Reggae with bass and drums",
    "marimba, happy pop, 120 bpm",
)
"""Texts that nobody would confuse with one another."""

ALIKE_FEATURES, ALIKE_EMBEDDINGS = 0.99, 0.9
"""Mean pairwise cosine from which a text encoder is suspect: of RoBERTa's features, which share large constant parts,
and of CLAP embeddings, which training drives apart (0.2 to 0.3 in healthy checkpoints, 0.9993 in a broken one)."""


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        subject: the thing checked.
        state: "ok", "note" where only some commands need what is missing, or "bad".
        found: a version, a path or a figure.
        advice: what to do if it is not ok.
    """

    subject: str
    state: Literal["ok", "note", "bad"]
    found: str
    advice: str = ""

    def as_text(self) -> str:
        """One line."""
        return f"{self.state:5} {self.subject:22} {self.found}" + (f"; {self.advice}" if self.state != "ok" else "")


def run_checks(source: str | Path) -> list[Finding]:
    """Check this machine and the text encoder of `source`.

    Raises:
        UserError: as `text_encoder`.
    """
    return [*packages(), *programs(), device(), *text_encoder(source)]


def packages() -> list[Finding]:
    """Check the installed version of each package that this one requires against the range that it allows."""
    try:
        wanted = [Requirement(text) for text in importlib.metadata.requires("stable-audio-lite") or []]
    except importlib.metadata.PackageNotFoundError:
        return [Finding("stable-audio-lite", "bad", "not installed", "pip install -e . in its folder")]
    return [_package(r) for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]


def _package(requirement: Requirement) -> Finding:
    advice = f"pip install '{requirement}'"
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(requirement.name, "bad", "missing", advice)
    fits = requirement.specifier.contains(version, prereleases=True)
    return Finding(requirement.name, "ok" if fits else "bad", version, advice)


def programs() -> list[Finding]:
    """Check the programs that render a corpus and that encode MP3 and Opus."""
    findings = []
    for subject, find in (("fluidsynth", find_synth), ("soundfont", find_soundfont)):
        try:
            findings.append(Finding(subject, "ok", str(find())))
        except UserError as error:
            findings.append(Finding(subject, "note", "missing", f"needed to render a corpus: {error}"))
    if (path := shutil.which("ffmpeg")) is not None:
        return [*findings, Finding("ffmpeg", "ok", path)]
    advice = "needed to compare with MP3 and Opus (Debian, Ubuntu: apt-get install ffmpeg)"
    return [*findings, Finding("ffmpeg", "note", "missing", advice)]


def device() -> Finding:
    """Report the device that would generate sound, and its floating type."""
    where = choose_device("auto")
    kind = str(choose_dtype(None, where)).removeprefix("torch.")
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else f"{torch.get_num_threads()} threads"
    return Finding("device", "ok", f"{where.type}, {name}, {kind}")


def text_encoder(source: str | Path) -> list[Finding]:
    """Check that the text encoder of `source`, any source of a CLAP, tells captions apart.

    Raises:
        UserError: it can't be read.
    """
    checkpoint = read_checkpoint(source)
    condition = checkpoint.text_encoder().encode(list(CAPTIONS))
    features = condition.tokens.sum(1) / condition.mask.sum(1, keepdim=True)
    findings = [_alike("text features", features, ALIKE_FEATURES)]
    if (clap := checkpoint.clap()) is not None:
        findings.append(_alike("text embeddings", clap.embed_text(list(CAPTIONS)), ALIKE_EMBEDDINGS))
    return findings


def _alike(subject: str, vectors: Tensor, limit: float) -> Finding:
    cosine = mean_pairwise_cosine(vectors)
    found = f"mean cosine {cosine:.4f} between {len(CAPTIONS)} captions"
    advice = "different captions give nearly the same, so prompts can't be obeyed; choose another checkpoint"
    return Finding(subject, "ok" if cosine < limit else "bad", found, advice)


def mean_pairwise_cosine(vectors: Tensor) -> float:
    """Mean cosine similarity between different rows of (B, D)."""
    unit = F.normalize(vectors.float(), dim=1)
    count = len(unit)
    return float(((unit @ unit.T).sum() - count) / (count * (count - 1)))
