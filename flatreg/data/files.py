"""Files that are there whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

T = TypeVar("T")
_PARTIAL = ".partial"


def write_whole(path: Path, text: str) -> None:
    """Replace a text file."""
    with _replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(
    path: Path, value: Any, adapter: TypeAdapter[Any] | None = None, *, indent: int | None = 1
) -> None:
    """Replace a JSON file by `value`, of the type of `adapter` or plain dicts and lists.

    `indent` counts spaces a level; None writes one line without spaces.
    """
    if adapter is not None:
        text = adapter.dump_json(value, indent=indent).decode()
    else:
        text = json.dumps(value, indent=indent, separators=None if indent else (",", ":"))
    write_whole(path, text + "\n")


def read_json(path: Path, adapter: TypeAdapter[T], *, what: str, schema: int | None = None) -> T:
    """Read a JSON file as the type of `adapter`; messages call it `what`, such as "a report".

    Where `schema` is given, the file must have that number under "schema".

    Raises:
        ValueError: the file is no JSON, has another schema, or is not what `adapter` expects; in
            one line, with the first place that is wrong.
        OSError: there is no such file.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    found = raw.get("schema") if isinstance(raw, dict) else None
    if schema is not None and found != schema:
        raise ValueError(f"{path}: expected schema {schema}, got {found}")
    try:
        return adapter.validate_python(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path}: not {what}: {place}: {first['msg']}") from error


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
    partial = path.with_name(f".{path.name}.{uuid4().hex[:12]}{_PARTIAL}")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have the system write a file, or a folder with its files, to the disk, and wait for it."""
    for part in (*path.iterdir(), path) if path.is_dir() else (path,):
        with suppress(OSError) if part.is_dir() else nullcontext():  # not every system can
            descriptor = os.open(part, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def sweep_partials(folder: Path) -> None:
    """Remove what a killed run has left half written; only the one that holds the folder may."""
    for path in folder.rglob(f".*{_PARTIAL}"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def alone_in(folder: Path, is_main_process: bool) -> Iterator[None]:
    """Hold `folder` for this run, the main process for all of a launch; the lock ends with it.

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
