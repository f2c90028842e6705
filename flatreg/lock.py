"""One run at a time writes into a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def alone_in(folder: Path, is_main_process: bool) -> Iterator[None]:
    """Hold `folder` for this run; the lock goes with the process, however that ends.

    Of a launch the main process holds it for all.

    Raises:
        ValueError: another run holds it.
    """
    if not is_main_process:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"{folder}: another run is writing there: wait for it, or choose output=DIR"
        ) from None
    try:
        yield
    finally:
        lock.release()
