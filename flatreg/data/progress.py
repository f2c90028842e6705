"""Every progress bar: 80 columns in a terminal, elsewhere a plain line every 30 seconds."""

from __future__ import annotations

import io
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm.auto import tqdm as in_notebooks
from tqdm.std import tqdm

_COLUMNS = 80
_SECONDS = 30.0  # between two lines where no terminal redraws one


class _Shown(NamedTuple):
    """Whether bars are shown at all, and what all of them are about, such as an arm."""

    at_all: bool = True
    about: str = ""


_ALL = _Shown()
_SHOWN: ContextVar[_Shown] = ContextVar("shown", default=_ALL)


@contextmanager
def _changed(**change: Any) -> Iterator[None]:
    token = _SHOWN.set(_SHOWN.get()._replace(**change))
    try:
        yield
    finally:
        _SHOWN.reset(token)


def silent() -> AbstractContextManager[None]:
    """Show no bar within this block."""
    return _changed(at_all=False)


def about(name: str) -> AbstractContextManager[None]:
    """Write `name` into every bar that is made within this block."""
    return _changed(about=f" {name}")


def progress_bar(
    what: str,
    total: int | None = None,
    *,
    over: Iterable[Any] | None = None,
    unit: str = "images",
    shown: bool = True,
    counts: bool = True,
    done: int = 0,
) -> Any:
    """Bar on stderr that says how far something is, and about how long it still takes.

    Args:
        what: is done.
        total: of what there is to do.
        over: the bar is an iterator over it; left out, `update` moves it.
        unit: of `total`, in the plain lines.
        shown: False makes a bar that shows nothing.
        counts: whether the numbers of `total` say something to a reader.
        done: of `total`, in an earlier session.
    """
    terminal = sys.stderr.isatty()
    notebook = not issubclass(tqdm, in_notebooks) and in_notebooks.__name__ == "tqdm_notebook"
    kind: Any = in_notebooks if notebook else tqdm if terminal else _Lines
    count = "{n_fmt}/{total_fmt}"
    if terminal:
        form = f"{{desc}}: {{percentage:3.0f}}%|{{bar}}| {f'{count} ' * counts}"
        form += "[{elapsed}<{remaining}{postfix}]"
    else:
        form = f"{{desc}}: {{percentage:.0f}}%, {f'{count} {unit}, ' * counts}"
        form += "{elapsed} so far, about {remaining} to go{postfix}"
    now = _SHOWN.get()
    return kind(
        over,
        total=total,
        initial=done,
        desc=f"{what}{now.about}",
        leave=False,
        file=sys.stderr,
        disable=not (shown and now.at_all),
        nrows=20,  # some terminals say 0, where tqdm would draw nothing
        ncols=None if notebook else min(_COLUMNS, shutil.get_terminal_size().columns) - 1,
        bar_format=None if notebook else form,
    )


def write(line: str) -> None:
    """Write a line to stderr, above the bars."""
    tqdm.write(line, file=sys.stderr)


def tell(line: str) -> None:
    """Write a line to stderr that says what is done; it is shown where bars are."""
    if _SHOWN.get().at_all:
        write(line)


if TYPE_CHECKING:  # where alone it is generic
    _Base = tqdm[Any]
else:
    _Base = tqdm


class _Lines(_Base):
    """A line after 30 seconds, and then every 30."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._written = time.monotonic()
        # The default miniters may let minutes pass before the next look at the clock.
        options |= {"ncols": None, "miniters": 1, "mininterval": 1.0}
        super().__init__(*arguments, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        now = time.monotonic()
        if now - self._written >= _SECONDS:
            self._written = now
            self.fp.write(f"{msg or self}\n")
            self.fp.flush()

    def close(self) -> None:
        """End, and write nothing."""
        self.fp = io.StringIO()
        super().close()
