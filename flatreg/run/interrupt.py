"""Signals that end a run: held back while a training would lose steps by it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

_GRACE = 8.0  # seconds: a step that is not over by then is given up, as schedulers kill after 10
_AGAIN = 1.0  # seconds: the same key press may arrive twice, from the terminal and a launcher


class Interrupted(KeyboardInterrupt):
    """A signal, such as SIGTERM, has ended the run; `number` is the signal's."""

    def __init__(self, number: int, saved: str = "") -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}{saved}")
        self.number = number


def raise_interrupted(number: int, frame: FrameType | None) -> None:
    """Handler of a signal that may end the run wherever it is."""
    raise Interrupted(number)


@contextmanager
def handled(
    handler: Callable[[int, FrameType | None], Any] | signal.Handlers,
    numbers: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT),
) -> Iterator[None]:
    """Let `handler` have these signals; Python allows it in the main thread alone.

    A signal that the program was started to ignore, as a shell does for what it runs in the
    background, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [n for n in numbers if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old or signal.SIG_DFL)


class HeldSignals:
    """SIGTERM and SIGINT, held back within `with HeldSignals() as held` until they are asked for.

    A step that does not end within 8 s of the signal is given up, and so is one at which the user
    presses Ctrl-C again: `Interrupted` is raised where the program is. It is also raised at the end
    of the block, for a signal that nobody asked for.

    Attributes:
        number: of the first signal that came, 0 before.
    """

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0
        self._raises, self._writes = False, False
        self._timer: threading.Timer | None = None

    def __enter__(self) -> HeldSignals:
        self._handling = handled(self._arrived)
        self._handling.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._timer:
            self._timer.cancel()
        self._handling.__exit__(None, None, None)
        if self.number and kind is None:
            raise Interrupted(self.number)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise within this block where the program is: nothing is lost by it."""
        if self.number:
            raise Interrupted(self.number)
        self._raises = True
        try:
            yield
        finally:
            self._raises = False

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Never raise within this block."""
        self._writes = True
        try:
            yield
        finally:
            self._writes = False

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        now, first = time.monotonic(), not self.number
        if first:
            self.number, self._since = number, now
            self._timer = threading.Timer(_GRACE, signal.raise_signal, [number])
            self._timer.daemon = True
            self._timer.start()
        again = not first and now - self._since >= _AGAIN
        if (self._raises or again) and not self._writes:
            raise Interrupted(self.number)
