"""Makes captioned music whose answers are known: composes General-MIDI pieces and renders them with FluidSynth.

`instruments` and `styles` are data, `harmony` and `parts` write the notes, `compose` makes a whole `Piece`, `captions`
words it, `render` turns it into sound and `build` writes the corpus. Nothing is imported here.
"""
