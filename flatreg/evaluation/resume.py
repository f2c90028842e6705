"""Resume cache: what an evaluation has found out so far, on disk, so that a killed one goes on.

One record is one piece of work (an attack of the cascade on some samples): a safetensors file with
a row for each sample, written whole or not at all. Rows are found by dataset index, so another
batch size or number of processes picks up where the killed run stopped.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flatreg.data.files import load_whole, save_whole, write_whole
from flatreg.data.sharing import Batch

Columns = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class CachedWork:
    """Result of one piece of work: columns with a row for each sample, and the passes it took."""

    columns: Columns
    forwards: int = 0
    backwards: int = 0


class ResumeCache:
    """Pieces of work by key and sample; kept in `folder`, if there is one, for the next object.

    Args:
        folder: where the records lie, those of each identity in a folder of their own.
        identity: what the records belong to, as JSON: model, threat, attacks, seed. Kept beside
            them as `state.json`.

    Attributes:
        forwards, backwards: passes of the work done by this object.
        read_forwards, read_backwards: passes of the work found in the folder.
    """

    def __init__(
        self, folder: Path | None = None, identity: Mapping[str, Any] | None = None
    ) -> None:
        text = json.dumps(dict(identity or {}), indent=1, sort_keys=True)
        # A folder for each identity: records of another model, threat or version are never read.
        self.folder = folder and folder / hashlib.sha256(text.encode()).hexdigest()[:12]
        self.forwards = self.backwards = 0
        self.read_forwards = self.read_backwards = 0
        self._known: dict[str, dict[int, tuple[Columns, int]]] = {}
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / "state.json", text)
        for file in sorted(self.folder.glob("*.safetensors")):
            self._read(file)

    def missing(self, key: str, indices: Sequence[int]) -> list[int]:
        """Positions in `indices` of the samples whose columns are still to be computed."""
        known = self._known.get(key, {})
        return [position for position, index in enumerate(indices) if index not in known]

    def rows(self, key: str, indices: Sequence[int], work: CachedWork | None = None) -> Columns:
        """Columns of the samples `indices`, in this order; keeps `work`.

        Args:
            key: names the piece of work.
            indices: dataset indices.
            work: of the samples that `missing` names, in its order; None where it names none.
        """
        if work is not None:
            self.keep(key, [indices[position] for position in self.missing(key, indices)], work)
        return self.joined(key, indices, None if work is None else work.columns)

    def keep(self, key: str, indices: Sequence[int], work: CachedWork) -> None:
        """Count the passes of a piece of work on the samples `indices`, and write its record."""
        self.forwards += work.forwards
        self.backwards += work.backwards
        if self.folder is not None:
            self._write(key, indices, work)

    def joined(self, key: str, indices: Sequence[int], columns: Columns | None) -> Columns:
        """Columns of the samples `indices`: those known, and those of `missing`, in its order."""
        if columns is not None:
            done = [indices[position] for position in self.missing(key, indices)]
            if len(done) == len(indices):
                # Nothing to put together, and nothing asks for it again: images would fill memory.
                return columns
            self._remember(key, done, columns)
        if not indices:
            return {}
        rows = [self._known[key][index] for index in indices]
        # Rows come from several records where the killed run had another batch size.
        return {
            name: torch.stack([columns[name][row] for columns, row in rows]) for name in rows[0][0]
        }

    def _remember(self, key: str, indices: Sequence[int], columns: Columns) -> None:
        known = self._known.setdefault(key, {})
        known.update({index: (columns, row) for row, index in enumerate(indices)})

    def _write(self, key: str, indices: Sequence[int], record: CachedWork) -> None:
        assert self.folder is not None
        short = re.sub("[^a-z0-9.]+", "-", key)[:80]  # file systems take 255 bytes
        # Processes write at once: samples are shared out, so the least index tells them apart.
        which = hashlib.sha256(key.encode()).hexdigest()[:8]
        name = f"{short}-{which}-{min(indices)}-{len(indices)}.safetensors"
        about = {"key": key, "forwards": str(record.forwards), "backwards": str(record.backwards)}
        about["of"] = self.folder.name
        save_whole(self.folder / name, record.columns | {"index": torch.tensor(indices)}, about)

    def _read(self, file: Path) -> None:
        """Take in a record; damaged, of another identity or program, it is work to do again."""
        try:
            columns, about = load_whole(file)
            if about["of"] != file.parent.name:  # copied here from the folder of another identity
                return
            index = columns.pop("index").tolist()
            spent = int(about["forwards"]), int(about["backwards"])
            self._remember(about["key"], index, columns)
        except (ValueError, OSError, KeyError):
            return
        self.read_forwards += spent[0]
        self.read_backwards += spent[1]


def digest(value: Any) -> str:
    """What tells a value from others, 16 hexadecimal digits: weights, or the settings of an attack.

    Of tensors it depends on every byte, of functions on their code, defaults and closures, of other
    objects on their attributes.

    Raises:
        ValueError: there is an object in it that cannot be told from others.
    """
    whole = hashlib.sha256()
    for part in _parts(value, {}):
        whole.update(part)
    return whole.hexdigest()[:16]


def sample_digests(block: Batch) -> Tensor:
    """Hash of each sample, image and label, `(n,)`."""
    found = []
    for image, label in zip(block.inputs.cpu().numpy(), block.labels.tolist(), strict=True):
        content = hashlib.sha256(image.tobytes() + b"label" + str(label).encode()).digest()
        found.append(int.from_bytes(content[:7], "big"))
    return torch.tensor(found)


def level_digests(block: Batch) -> Tensor:
    """The same of images in 256 levels, as a file holds them: float32 and float64 have one."""
    return sample_digests(replace(block, inputs=(255 * block.inputs).round().byte()))


def forward_digest(model: nn.Module) -> str:
    """What tells the forward of a model from others of the same weights and layers.

    Of every module it depends on the code of `forward`, on the public attributes and on the buffers
    that its state lacks. A private attribute may count passes. What cannot be told from others is
    left out.
    """
    known = []
    for module in model.modules():
        public = [item for item in vars(module).items() if not item[0].startswith("_")]
        unsaved = getattr(module, "_non_persistent_buffers_set", ())
        buffers = [item for item in module.named_buffers(recurse=False) if item[0] in unsaved]
        for part in (getattr(type(module), "forward", None), *public, *buffers):
            with suppress(ValueError, RuntimeError):  # no value, or too deep a one
                known.append(digest(part))
    return digest(known)


_PLAIN = (
    *(bool, int, float, complex, str, bytes, range, slice, type(None), type(...)),
    *(torch.dtype, torch.device, np.generic),
)


def _parts(value: Any, seen: dict[int, tuple[int, Any]]) -> Iterator[bytes]:
    """Bytes of a value; of an object that was met before, which may be one it lies in, the number.

    `seen` holds the objects, whose ids would otherwise be given to others.
    """
    yield f"{type(value).__name__}(".encode()
    inner: Any = ()
    if isinstance(value, Tensor):
        plain = value.detach().cpu()
        plain = plain.dequantize() if plain.is_quantized else plain.to_dense()
        yield f"{value.dtype} {tuple(value.shape)} ".encode()
        yield plain.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        yield f"{value.dtype} {value.shape} ".encode() + value.tobytes()
    elif isinstance(value, _PLAIN):
        yield repr(value).encode()
    elif id(value) in seen:
        yield f"met as {seen[id(value)][0]}".encode()
    elif isinstance(value, ModuleType):
        yield value.__name__.encode()
    elif isinstance(value, set | frozenset):
        yield repr(sorted(map(repr, value))).encode()
    elif isinstance(value, type | BuiltinFunctionType):
        yield f"{value.__module__}.{value.__qualname__}".encode()
    elif isinstance(value, nn.Module):
        inner = value.state_dict(), re.sub("0x[0-9a-f]+", "", repr(value))
    elif isinstance(value, Mapping):
        inner = value.items()
    elif isinstance(value, list | tuple):
        inner = value
    elif isinstance(value, partial):
        inner = value.func, value.args, value.keywords
    elif isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        inner = value.__qualname__, value.__code__, value.__defaults__, value.__kwdefaults__, cells
    elif isinstance(value, CodeType):
        inner = value.co_code, value.co_consts, value.co_names
    elif isinstance(value, MethodType):
        inner = value.__func__, value.__self__
    elif hasattr(value, "__dict__"):
        inner = vars(value).items()
    else:
        raise ValueError(
            "folder: expected a model and attacks that can be told from others, got one with a "
            f"{type(value).__name__}: leave folder out"
        )
    if not isinstance(value, _PLAIN):
        seen.setdefault(id(value), (len(seen), value))
    for part in inner:
        yield from _parts(part, seen)
    yield b")"
