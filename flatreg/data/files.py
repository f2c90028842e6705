"""Files that are there whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write_whole(path: Path, text: str) -> None:
    """Replace a text file."""
    with _replacing(path) as partial:
        partial.write_text(text)


def save_whole(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Replace a safetensors file.

    Raises:
        OSError: it could not be written; a file that was there is left as it was.
    """
    on_cpu = {name: values.detach().cpu().contiguous() for name, values in tensors.items()}
    with _replacing(path) as partial:
        try:
            save_file(on_cpu, str(partial), metadata=dict(metadata) if metadata else None)
        except (OSError, SafetensorError) as error:
            raise OSError(f"{path}: could not be written: {error}") from error


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield where to write: beside the file, so that the move stays within a file system."""
    partial = path.with_name(f".{path.name}.{uuid4().hex[:12]}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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
