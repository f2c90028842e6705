"""Files that are there whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from glob import escape
from itertools import product
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch
from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flatreg.data.configuration import first_mistake
from flatreg.data.sharing import gather
from flatreg.data.text import one_line, shown

T = TypeVar("T")
PARTIAL = ".flatreg-partial"  # as no other program names what it writes
_DIGESTS = "digests.json"
_ABOUT, _DIGEST = "flatreg", "sha256"
_LARGEST_JSON = 2**30  # bytes; a report of 100,000 samples has 2**25
_LOCK = ".lock"
_LEFT = 3600  # seconds after which no one writes to a file any more
ELSEWHERE = "write another folder: output=DIR, in Python folder=DIR"
AGAIN = ": delete it, and run what wrote it again"


def write_whole(path: Path, text: str) -> None:
    """Replace a text file; what UTF-8 cannot write, such as half a surrogate pair, is escaped.

    Raises:
        OSError: it could not be written; a file that was there is left as it was.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(
    path: Path, value: Any, adapter: TypeAdapter[Any] | None = None, *, indent: int | None = 1
) -> None:
    """Replace a JSON file by `value`, of the type of `adapter` or plain dicts and lists.

    JSON has no nan and no infinity: they are written as the strings "NaN", "Infinity" and
    "-Infinity", which `read_json` reads as numbers where the type has a number.

    `indent` counts spaces a level; None writes one line without spaces.
    """
    plain = value if adapter is None else adapter.dump_python(value, mode="json")
    separators = None if indent else (",", ":")
    text = json.dumps(_in_words(plain), indent=indent, separators=separators, allow_nan=False)
    write_whole(path, text + "\n")


def _in_words(value: Any) -> Any:
    """Plain dicts and lists with numbers that are not finite as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _in_words(inner) for key, inner in value.items()}
    return [_in_words(inner) for inner in value] if isinstance(value, list | tuple) else value


def read_json(path: Path, adapter: TypeAdapter[T], *, what: str, schema: int | None = None) -> T:
    """Read a JSON file as the type of `adapter`; messages call it `what`, such as "a report".

    Where `schema` is given, the file must have that number under "schema". A bare NaN is read too.

    Raises:
        ValueError: the file is no JSON, has another schema, or is not what `adapter` expects; in
            one line, with the first place that is wrong. It is no ordinary file, or a huge one.
        OSError: there is no such file.
    """
    check_ordinary(path)
    if (size := path.stat().st_size) > _LARGEST_JSON:
        raise ValueError(f"{path}: not {what}: it has {size / 2**30:.1f} GiB{AGAIN}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {one_line(error)}{AGAIN}") from error
    found = raw.get("schema") if isinstance(raw, dict) else None
    if schema is not None and found != schema:
        raise ValueError(f"{path}: expected schema {schema}, got {one_line(found)}{AGAIN}")
    try:
        return adapter.validate_python(raw)
    except (ValidationError, RecursionError) as error:
        reason = first_mistake(error) if isinstance(error, ValidationError) else str(error)
        raise ValueError(f"{path}: not {what}: {one_line(reason)}{AGAIN}") from error


def check_ordinary(path: Path) -> None:
    """Refuse what is there and no ordinary file: to read from a pipe is to wait for ever.

    Raises:
        ValueError: it is a folder, a pipe, a socket or a device.
        OSError: there is nothing, or it cannot be looked at.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kinds = ((stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket"))
        kind = next((name for is_one, name in kinds if is_one(mode)), "device")
        raise ValueError(f"{shown(path)}: expected a file, got a {kind}: move it away")


def check_apart(train: Sequence[str | Path], test: Sequence[str | Path]) -> None:
    """Refuse a test split with files, folders or a name of the training split.

    Raises:
        ValueError: there is one, by a link or not.
    """
    if both := set(map(os.path.realpath, train)) & set(map(os.path.realpath, test)):
        called = shown(os.path.basename(min(both)))
        raise ValueError(
            f"data: expected other images for test than for training, got {called} for both: a "
            "part of the training images is data.validation"
        )


def check_rows_apart(splits: Mapping[str, Any], train: str, test: str) -> None:
    """Refuse splits of Hugging Face's `datasets` with rows in common: train and train[:10%].

    `splits` is what `datasets` knows of the whole splits, by name.

    Raises:
        ValueError: they have some.
    """
    from datasets import ReadInstruction  # type: ignore[import-untyped] # seconds to import

    lengths = {name: about.num_examples for name, about in splits.items()}
    one, two = (ReadInstruction.from_spec(spec).to_absolute(lengths) for spec in (train, test))
    for a, b in product(one, two):
        if a.splitname == b.splitname and max(a.from_, b.from_) < min(a.to, b.to):
            raise ValueError(
                "data: expected other images for test than for training, got rows of "
                f"{a.splitname} in both {one_line(train, 60)} and {one_line(test, 60)}"
            )


def save_whole(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Replace a safetensors file; a digest beside its metadata tells whether it is damaged.

    Raises:
        OSError: it could not be written; a file that was there is left as it was.
    """
    on_cpu = {name: values.detach().cpu().contiguous() for name, values in tensors.items()}
    told = dict(metadata or {})
    with replacing(path) as partial:
        # One entry: safetensors writes several in another order each time.
        about = json.dumps(told | {_DIGEST: _sha256(on_cpu, told)})
        save_file(on_cpu, str(partial), metadata={_ABOUT: about})


def load_whole(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of what `save_whole` wrote, on the CPU.

    Raises:
        ValueError: the file is damaged, or of another program.
        OSError: there is none.
    """
    check_ordinary(path)
    try:
        with safe_open(str(path), "pt") as file:
            told = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if _ABOUT in told:
            told = {key: str(value) for key, value in json.loads(told[_ABOUT]).items()}
    except (SafetensorError, ValueError, RuntimeError, MemoryError, AttributeError) as error:
        raise ValueError(f"{path}: damaged: {one_line(error)}{AGAIN}") from error
    written = told.pop(_DIGEST, None)
    if written != _sha256(tensors, told):
        raise ValueError(f"{path}: damaged: other bytes than flatreg wrote{AGAIN}")
    return tensors, told


def write_digests(folder: Path, files: Iterable[Path] | None = None) -> None:
    """Write the SHA-256 of the files of a folder, of all by default, into its `digests.json`."""
    paths = sorted(folder.iterdir()) if files is None else files
    found = {path.name: file_digest(path) for path in paths if path.is_file()}
    write_json(folder / _DIGESTS, found)


def check_file(path: Path) -> None:
    """Refuse a file that is not the one of which `write_digests` took the digest.

    A folder without digests is trusted.

    Raises:
        ValueError: it has other bytes, or is no file; another file of the folder is missing; the
            digests are damaged, or do not name it.
        OSError: there is none.
    """
    check_ordinary(path)
    digests = path.with_name(_DIGESTS)
    if not digests.exists():
        return
    known = read_json(digests, TypeAdapter(dict[str, str]), what="a list of digests")
    if missing := sorted(name for name in known if not path.with_name(name).exists()):
        raise ValueError(f"{path.parent}: expected the file {missing[0]} too, found none")
    if path.name not in known:
        raise ValueError(f"{digests}: damaged: expected the digest of {path.name}, found none")
    if known[path.name] != file_digest(path):
        raise ValueError(f"{path}: damaged: other bytes than flatreg wrote")


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    whole = hashlib.sha256()
    with path.open("rb") as stream:
        while part := stream.read(2**20):
            whole.update(part)
    return whole.hexdigest()


def _sha256(tensors: Mapping[str, Tensor], told: Mapping[str, str]) -> str:
    whole = hashlib.sha256(repr(sorted(told.items())).encode())
    for name, values in sorted(tensors.items()):
        whole.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        whole.update(values.flatten().view(torch.uint8).numpy().data)
    return whole.hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield where to write: beside the file, so that the move stays within a file system.

    What a killed process has left of it there is removed once it is an hour old: a younger one may
    still be written.

    Raises:
        OSError: it could not be written; a file that was there is left as it was.
    """
    partial = path.with_name(f".{path.name}.{uuid4().hex[:12]}{PARTIAL}")
    for left in path.parent.glob(f".{escape(path.name)}.*{PARTIAL}"):
        with suppress(OSError):  # another has removed it
            if time.time() - left.stat().st_mtime > _LEFT:
                left.unlink()
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:  # which name no file where the disk is full
        reason = "a folder is in its place: move it away" if path.is_dir() else error
        raise OSError(f"{path}: could not be written: {reason}") from error
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
    """Remove what a killed run has left half written; only the one that holds the folder may.

    What lies in a folder with a lock of its own is left to those who hold that.
    """
    for path in list(folder.rglob(f".*{PARTIAL}")):
        within = path.relative_to(folder).parents
        if any((folder / place / _LOCK).exists() for place in within if place.name):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Hold `folder` by a lock, and remove what a killed run has left half written there.

    Raises:
        ValueError: another run holds it.
        OSError: it is no folder, or cannot be written.
    """
    lock = FileLock(folder / _LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(NotImplementedError):  # a network file system without locks: nobody holds it
            lock.acquire(timeout=0)
            sweep_partials(folder)
    except Timeout:
        reason = "another run is writing there: wait for it, or"
        raise ValueError(f"{folder}: {reason} {ELSEWHERE}") from None
    except OSError as error:
        reason = f"expected a folder that can be written, got {one_line(error)}"
        raise OSError(f"{folder}: {reason}: {ELSEWHERE}") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def alone_in(folder: Path, is_main_process: bool) -> Iterator[None]:
    """Hold `folder` for a launch, by its main process; every process must call it.

    Raises:
        ValueError, OSError: as `holding`, on every process.
    """
    refused = list[Exception]()
    with ExitStack() as held:
        if is_main_process:
            try:
                held.enter_context(holding(folder))
            except (ValueError, OSError) as error:
                refused.append(error)
        for refusal in gather({"refused": refused})["refused"]:
            raise refusal
        yield
