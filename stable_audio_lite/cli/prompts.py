"""Prompts of commands that generate: where they come from, and the tempo and key that they state."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from stable_audio_lite.errors import UserError
from stable_audio_lite.wording import states_tempo, tempo_of

_KEY = re.compile(r"(?<!\w)([A-G][#b]?) (major|minor)\b")
_TONICS = ("C", "C#", "Db", "D", "D#", "Eb", "E", "F", "F#", "Gb", "G", "G#", "Ab", "A", "A#", "Bb", "B")


def prompts_of(args: argparse.Namespace, sound: Path | None) -> list[str]:
    """List the prompts to generate from, with tempo and key: PROMPT, those of a file, or the one stored in `sound`.

    There may be none for a model that can do without.

    Raises:
        UserError: there is none, or too many; or tempo or key are no such thing, or the prompt states others.
    """
    file = getattr(args, "prompts", None)
    if args.prompt is not None and file is not None:
        raise UserError("give either a PROMPT or --prompts FILE")
    if args.prompt is not None:
        found = [args.prompt.strip()]
        if not found[0]:
            raise UserError("the prompt is empty; say what you want to hear")
    elif file is not None:
        found = _read_prompts(file)
    else:
        found, needed = _stored(args.model, sound)
        if not found and needed:
            inside = f"; {sound} has none inside" if sound else ""
            raise UserError(f"give {'a PROMPT' if sound else 'either a PROMPT or --prompts FILE'}{inside}")
    if not found and (args.bpm is not None or args.key is not None):
        raise UserError("--bpm and --key go into a prompt; give one, to a model that reads it")
    stored = f"the prompt inside {sound}" if args.prompt is None and file is None else None
    return [_worded(prompt, args.bpm, args.key, stored) for prompt in found]


def _worded(prompt: str, bpm: float | None, key: str | None, stored: str | None) -> str:
    """The prompt with a tempo and a key, in the words of captions; `stored` names one that the user didn't give."""
    where, instead = (stored, "leave it out, or give a PROMPT") if stored else (repr(prompt), "leave out one")
    said = [] if bpm is None and key is None else [prompt]
    if bpm is not None:
        if not 20 <= bpm <= 400:
            raise UserError(f"--bpm must lie in 20..400, got {bpm:g}")
        if (own := tempo_of(prompt)) not in (None, bpm) or (own is None and states_tempo(prompt)):
            said_tempo = f"{own:g} bpm" if own is not None else "several tempos"
            raise UserError(f"--bpm {bpm:g}: {where} says {said_tempo}; {instead}")
        said += [f"{bpm:g} bpm"] if own is None else []
    if key is not None:
        match = re.fullmatch(r"([A-Ga-g][#b]?) (major|minor)", key.strip())
        if match is None or (tonic := match[1][0].upper() + match[1][1:]) not in _TONICS:
            raise UserError(f"--key: {key!r} is not one of {', '.join(_TONICS)} and major or minor, as in 'A minor'")
        wanted = f"{tonic} {match[2]}"
        if (own_key := _KEY.search(prompt)) and own_key[0] != wanted:
            raise UserError(f"--key {wanted}: {where} says {own_key[0]}; {instead}")
        said += [] if own_key else [wanted]
    return ", ".join(said) or prompt


def _stored(model: str, sound: Path | None) -> tuple[list[str], bool]:
    """The prompt inside a sound, for a model that reads prompts, and whether the model needs one."""
    from stable_audio_lite.audio.io import read_metadata
    from stable_audio_lite.bundle import resolve
    from stable_audio_lite.systems import StableAudioConfig, load_system

    config = load_system(resolve(model))
    prompt = read_metadata(sound).settings.get("prompt") if sound and config.clap else None
    return [prompt] if isinstance(prompt, str) and prompt.strip() else [], isinstance(config, StableAudioConfig)


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text; give one prompt per line") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{path}: holds no prompts; write one per line")
    return prompts
