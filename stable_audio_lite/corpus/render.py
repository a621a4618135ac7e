"""Rendering of a `Piece` to stereo sound at 44.1 kHz with FluidSynth and a General-MIDI soundfont.

Every recording is brought to the same level (-20 dBFS RMS over its sounding parts, peaks no higher than -1 dBFS), so
that a solo harp is as audible as a rock band, and fades to silence over its last `FADE` seconds.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stable_audio_lite.corpus.instruments import INSTRUMENTS
from stable_audio_lite.corpus.piece import DRUMS, Piece
from stable_audio_lite.errors import UserError
from stable_audio_lite.files import expanded

CORPUS_SAMPLE_RATE = 44100
LEVEL_DBFS, PEAK_DBFS = -20.0, -1.0
FADE = 0.15
INSTALL = "install it with: apt-get install fluidsynth fluid-soundfont-gm (macOS: brew install fluid-synth)"
SOUNDFONTS = (
    "/usr/share/sounds/sf2/FluidR3_GM.sf2",
    "/usr/share/soundfonts/FluidR3_GM.sf2",
    "/usr/share/soundfonts/default.sf2",
    "/usr/share/sounds/sf2/default-GM.sf2",
    "/usr/local/share/soundfonts/default.sf2",
    "/opt/homebrew/share/soundfonts/default.sf2",
)
_TICKS_PER_SECOND = 1000
_DRUM_CHANNEL = 9


def find_synth() -> str:
    """Path of the `fluidsynth` program.

    Raises:
        UserError: it is not installed; the message gives the command that installs it.
    """
    found = shutil.which("fluidsynth")
    if found is None:
        raise UserError(f"fluidsynth was not found; {INSTALL}")
    return found


def find_soundfont(soundfont: str | os.PathLike[str] | None = None) -> Path:
    """The soundfont to play: the argument, else the environment variable SOUNDFONT, else the usual places.

    Raises:
        UserError: there is none; the message gives the command that installs one.
    """
    named = soundfont or os.environ.get("SOUNDFONT")
    if named:
        if not (path := expanded(named)).is_file():
            raise UserError(f"{named}: no such soundfont; give the path of a General-MIDI .sf2 file, or {INSTALL}")
        return path
    for place in SOUNDFONTS:
        if Path(place).is_file():
            return Path(place)
    raise UserError(f"no General-MIDI soundfont was found (set SOUNDFONT to a .sf2 file); {INSTALL}")


def to_midi(piece: Piece) -> bytes:
    """The piece as a standard MIDI file of one track, one tick a millisecond (so its tempo is nominal)."""
    try:
        import mido
    except ModuleNotFoundError as error:
        raise UserError("mido is missing; install it with: pip install -e '.[train]'") from error

    messages: list[tuple[int, int, mido.Message]] = []
    for number, part in enumerate(piece.parts):
        channel, program = _channel(number), INSTRUMENTS[part.instrument].program
        messages.append((0, 0, mido.Message("program_change", channel=channel, program=program)))
        for control, value in {7: part.volume, 10: round(64 + 63 * part.pan), 91: 40, 93: 0}.items():
            change = mido.Message("control_change", channel=channel, control=control, value=value)
            messages.append((0, 0, change))
    if piece.drums:
        messages.append((0, 0, mido.Message("control_change", channel=_DRUM_CHANNEL, control=7, value=110)))
    for note in piece.notes:
        channel = _channel(note.part)
        start, stop = round(note.start * 1000), round((note.start + note.duration) * 1000)
        on = mido.Message("note_on", channel=channel, note=note.pitch, velocity=note.velocity)
        messages.append((start, 2, on))
        messages.append((max(stop, start + 1), 1, mido.Message("note_off", channel=channel, note=note.pitch)))
    messages.sort(key=lambda row: row[:2])
    file = mido.MidiFile(type=0, ticks_per_beat=_TICKS_PER_SECOND // 2)
    track = mido.MidiTrack([mido.MetaMessage("set_tempo", tempo=500000, time=0)])
    now = 0
    for tick, _, message in messages:
        track.append(message.copy(time=tick - now))
        now = tick
    track.append(mido.MetaMessage("end_of_track", time=max(0, round(piece.seconds * 1000) - now)))
    file.tracks.append(track)
    buffer = io.BytesIO()
    file.save(file=buffer)
    return buffer.getvalue()


def _channel(part: int) -> int:
    return _DRUM_CHANNEL if part == DRUMS else part


def render(piece: Piece, soundfont: str | os.PathLike[str] | None = None) -> NDArray[np.float32]:
    """The piece as sound: [T, 2] float32 at 44.1 kHz with T = round(seconds * 44100), the same every time.

    Raises:
        UserError: the synthesizer or the soundfont is missing, or it failed (for want of disk space, say).
    """
    synth, font = find_synth(), find_soundfont(soundfont)
    with tempfile.TemporaryDirectory(prefix="stable-audio-lite-") as folder:
        midi, wav = Path(folder, "piece.mid"), Path(folder, "piece.wav")
        try:
            midi.write_bytes(to_midi(piece))
        except OSError as error:
            raise UserError(f"{folder}: can't be written ({error.strerror}); free some disk or set TMPDIR") from error
        sound = _play(synth, font, midi, wav, piece.seconds)
    return _levelled(_cut(sound, round(piece.seconds * CORPUS_SAMPLE_RATE)))


def _play(synth: str, font: Path, midi: Path, wav: Path, seconds: float) -> NDArray[np.float32]:
    import soundfile

    # Loading only the samples that the piece needs halves the start; floats can't clip before levelling.
    command = [synth, "-niq", "-T", "wav", "-O", "float", "-r", str(CORPUS_SAMPLE_RATE), "-g", "0.6", "-C", "0"]
    command += ["-o", "synth.dynamic-sample-loading=1", "-o", "synth.cpu-cores=1"]
    done = subprocess.run([*command, "-F", str(wav), str(font), str(midi)], capture_output=True, text=True, check=False)
    problem = " ".join(done.stderr.split())[-200:]
    # FluidSynth plays a default soundfont, and reports success, when it can't load the one it was given.
    if str(font) in done.stderr:
        raise UserError(f"{font}: FluidSynth can't load it ({problem}); give a General-MIDI .sf2 file, or {INSTALL}")
    try:
        sound, rate = soundfile.read(wav, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise UserError(
            f"fluidsynth wrote no sound ({problem or error}); is {font} a General-MIDI soundfont?"
        ) from error
    if rate != CORPUS_SAMPLE_RATE or len(sound) < (seconds - 1) * CORPUS_SAMPLE_RATE or not np.abs(sound).max() > 0:
        raise UserError(
            f"fluidsynth's recording is cut short or silent ({problem}); check {font} and {wav.parent}'s disk"
        )
    return sound


def _cut(sound: NDArray[np.float32], length: int) -> NDArray[np.float32]:
    """Exactly `length` samples, cut or filled with silence, the end faded out."""
    whole = np.zeros((length, 2), np.float32)
    whole[: len(sound)] = sound[:length]
    fade = round(FADE * CORPUS_SAMPLE_RATE)
    whole[-fade:] *= (0.5 + 0.5 * np.cos(np.linspace(0, np.pi, fade, dtype=np.float32)))[:, None]
    return whole


def _levelled(sound: NDArray[np.float32]) -> NDArray[np.float32]:
    """The sound at the common level; frames more than 40 dB under the loudest don't count."""
    frame = CORPUS_SAMPLE_RATE // 10
    whole = sound[: len(sound) // frame * frame].reshape(-1, frame * 2)
    power = np.mean(whole.astype(np.float64) ** 2, axis=1)
    loud = power[power > power.max() * 1e-4].mean() ** 0.5
    peak = float(np.abs(sound).max())
    gain = min(10 ** (LEVEL_DBFS / 20) / loud, 10 ** (PEAK_DBFS / 20) / peak)
    return (sound * np.float32(gain)).astype(np.float32)
