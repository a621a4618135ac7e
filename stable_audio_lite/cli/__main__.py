"""Run the command without an installation: `python -m stable_audio_lite.cli`."""

import sys

from stable_audio_lite.cli import main

sys.exit(main())
