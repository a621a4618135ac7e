"""Stable Audio Lite: text to music and sound with a latent diffusion model.

    from stable_audio_lite import StableAudio
    result = StableAudio.from_pretrained("starter").generate("warm slow piano", seconds=8)
    result.save("piano.wav")

Importing the package does no work; torch is loaded when `StableAudio` is first touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stable_audio_lite.errors import UserError

if TYPE_CHECKING:
    from stable_audio_lite.pipeline import Generated, StableAudio

__all__ = ["Generated", "StableAudio", "UserError"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name in ("Generated", "StableAudio"):
        from stable_audio_lite import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
