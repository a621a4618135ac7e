"""A progress bar for commands that sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from tqdm import tqdm


class ProgressBar:
    """A bar on stderr over all items; it appears with the first step, so a refused request shows none."""

    def __init__(self, items: int) -> None:
        self._items = items
        self._bar: tqdm[NoReturn] | None = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def within(self, first: int, stop: int) -> Callable[[int, int], None]:
        """Return a callback (steps done, steps in all) for the batch of items first..stop."""

        def update(done: int, total: int) -> None:
            if self._bar is None:
                from tqdm import tqdm

                layout = "{l_bar}{bar}| {n:.2f}/{total} [{elapsed}<{remaining}]"
                self._bar = tqdm(total=self._items, leave=False, bar_format=layout)
            self._bar.update(first + (stop - first) * done / total - self._bar.n)

        return update

    def print(self, text: str) -> None:
        """Print to stdout without breaking the bar."""
        if self._bar is not None:
            self._bar.clear()
        print(text, flush=True)
