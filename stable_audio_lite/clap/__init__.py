"""CLAP: one space for texts and sounds; its features are what generators read. The one place that knows CLAPs."""
