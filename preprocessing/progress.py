"""The progress bar of all long work: on stderr, with rate and time left."""
from __future__ import annotations

from tqdm import tqdm


class ProgressBar(tqdm):
    """tqdm's bar, in which a Ctrl-C may fall at any line: one that is half made is deleted in silence."""

    def __del__(self):
        try:
            super().__del__()
        except AttributeError:   # of those that the constructor did not come to
            pass
