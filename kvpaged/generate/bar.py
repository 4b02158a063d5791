"""A progress bar."""

from collections.abc import Callable
from typing import Any


class Bar:
    """A progress bar over replies, if wanted."""

    def __init__(self, total: int, wanted: bool) -> None:
        self._bar: Any = None
        if wanted:
            from tqdm.auto import tqdm

            self._bar = tqdm(total=total, unit="reply")

    def __enter__(self) -> Callable[[int], None]:
        return self._move

    def _move(self, done: int) -> None:
        if self._bar is not None:
            self._bar.update(done - self._bar.n)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
