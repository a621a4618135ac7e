"""A progress bar for commands that sample."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from tqdm import tqdm


class ProgressBar:
    """A bar on stderr over all items, after what `notes` returns; a refused request, without a step, shows neither."""

    def __init__(self, items: int, notes: Callable[[], list[str]] = list) -> None:
        self._items, self._notes = items, notes
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

                for note in self._notes():
                    print(f"note: {note}", file=sys.stderr)
                layout = "{l_bar}{bar}| {n:.2f}/{total} [{elapsed}<{remaining}]"
                self._bar = tqdm(total=self._items, leave=False, bar_format=layout)
            self._bar.update(first + (stop - first) * done / total - self._bar.n)

        return update

    def clear(self) -> None:
        """Make room for other lines; the next step shows the bar again."""
        if self._bar is not None:
            self._bar.clear()
