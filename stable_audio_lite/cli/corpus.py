"""`stable-audio-lite corpus`: captioned music to train on."""

from __future__ import annotations

import argparse

from stable_audio_lite.command import Commands, file_path


def add_command(commands: Commands) -> None:
    """Add `corpus` to the command line."""
    about = "Compose and render captioned music to train on; the same seed gives the same corpus."
    parser = commands.add_parser("corpus", help="compose and render captioned music to train on", description=about)
    parser.set_defaults(run=_run)
    add = parser.add_argument
    add("output", metavar="OUT", type=file_path, help="the folder to write")
    add("--items", type=int, default=1000, help="pieces to train on (default: 1000)")
    add("--held-out", type=int, default=100, help="further pieces, kept apart (default: 100)")
    add("--seed", type=int, default=0, help="of the whole corpus (default: 0)")
    add("--workers", type=int, help="processes (default: one per core)")
    add("--min-seconds", type=float, default=4.0, help="shortest piece (default: 4)")
    add("--max-seconds", type=float, default=30.0, help="longest piece (default: 30)")
    add("--max-parts", type=int, default=4, help="most instruments in a piece, drums apart: 1 for solos (default: 4)")
    add("--tempo-step", type=int, default=1, help="tempos are multiples of it, in bpm (default: 1)")
    add("--instruments", metavar="A,B", type=_names, help="who may play, for instance 'piano, flute' (default: all)")
    add("--styles", metavar="A,B", type=_names, help="what may be played, for instance 'jazz, waltz' (default: all)")
    add("--no-drums", action="store_true", help="no piece has drums")
    add("--format", default="flac", choices=("flac", "wav"), help="of the audio files (default: flac)")
    add("--soundfont", metavar="FILE.sf2", type=file_path, help="General MIDI sounds (default: the system's)")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _run(args: argparse.Namespace) -> None:
    from stable_audio_lite.corpus.build import build_corpus

    report = build_corpus(
        args.output,
        items=args.items,
        held_out=args.held_out,
        seed=args.seed,
        workers=args.workers,
        min_seconds=args.min_seconds,
        max_seconds=args.max_seconds,
        max_parts=args.max_parts,
        tempo_step=args.tempo_step,
        instruments=args.instruments,
        styles=args.styles,
        drums=not args.no_drums,
        audio_format=args.format,
        soundfont=args.soundfont and str(args.soundfont),
    )
    hours = report.seconds / 3600
    print(f"{args.output}: {report.rendered} pieces rendered, {report.kept} kept, {hours:.2f} h in all")
