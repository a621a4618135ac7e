"""Captioned music with known ground truth: General-MIDI pieces, composed here and rendered with FluidSynth.

`instruments` and `styles` are data, `harmony` and `parts` write the notes, `compose` makes a whole `Piece`, `captions`
describes it, `render` turns it into sound and `build` writes the corpus. Nothing is imported here.
"""
