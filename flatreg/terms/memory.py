"""What a criterion keeps from batch to batch, and how it knows of epochs and other processes."""

from __future__ import annotations

import copy
import math
import os
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from flatreg.data.configuration import whole
from flatreg.models.pass_start import is_second_pass
from flatreg.terms.protocol import Forwards

_BLOCK = 2**24  # bytes written at a time


@dataclass(kw_only=True, eq=False)
class Memory:
    """What a criterion keeps from batch to batch, for `Objective(..., memory=)`.

    A loop calls `start_epoch` at the start of each epoch, and stores `state_dict()` with its
    checkpoints.

    Args:
        gather: concatenates a tensor of every process along its first dimension, as
            `accelerator.gather` does; needed where several processes train one model. Each of them
            then evaluates the objective as often as the others.
        samples: number of training images, where a criterion stores an image of each.
        folder: where stored images are memory-mapped; left out, they are in memory.
        seed: of what is drawn for stored images, the same on all processes.

    Attributes:
        epoch: counted from 0; None until `start_epoch` is called.
        batches: how many batches were attacked in this epoch.
        kept: numbers and tensors, by name.
        stored: by name, a row of each training image.
        writes: whether batches change what is kept.
    """

    gather: Callable[[Tensor], Tensor] | None = None
    samples: int | None = None
    folder: str | Path | None = None
    seed: int = 0
    epoch: int | None = field(default=None, init=False)
    batches: int = field(default=0, init=False)
    kept: dict[str, Any] = field(default_factory=dict, init=False)
    stored: dict[str, Tensor] = field(default_factory=dict, init=False)
    writes: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        if self.samples is not None:
            self.samples = whole("samples", self.samples, 1)
        self.seed = whole("seed", self.seed, 0)
        if self.folder is not None and not str(self.folder):
            raise ValueError("folder: expected the name of a folder, got ''")

    def start_epoch(self, epoch: int) -> None:
        """Say that an epoch begins, counted from 0; a second call for the same one does nothing.

        Raises:
            ValueError: an epoch after it has begun already, or it is no whole number.
        """
        if not isinstance(epoch, int) or epoch < 0:
            raise ValueError(f"epoch: expected a whole number from 0, got {epoch!r}")
        if epoch == self.epoch:
            return
        if epoch < (self.epoch or 0):
            raise ValueError(
                f"epoch: expected {self.epoch} or a later one, got {epoch}: a training that starts "
                "anew takes a new flatreg.Memory()"
            )
        self.epoch, self.batches = epoch, 0

    def read_only(self) -> Memory:
        """The same for a batch that is evaluated and not trained on: it leaves no trace here."""
        copied = copy.copy(self)
        copied.kept, copied.stored, copied.writes = dict(self.kept), dict(self.stored), False
        return copied

    def epoch_for(self, reader: str) -> int:
        """The epoch, for a criterion that compares epochs.

        Raises:
            ValueError: `start_epoch` was not called.
        """
        if self.epoch is None:
            raise ValueError(
                f"{reader} needs to know the epoch: keep memory = flatreg.Memory(), give "
                "Objective(..., memory=memory), and call memory.start_epoch(epoch) in each epoch"
            )
        return self.epoch

    def gathered(self, rows: Tensor) -> Tensor:
        """Rows of all processes, without a graph.

        Raises:
            ValueError: there are several processes and no `gather`, or their batches differ in
                size.
        """
        rows = rows.detach()
        if self.gather is None:
            there = torch.distributed.is_available() and torch.distributed.is_initialized()
            if there and torch.distributed.get_world_size() > 1:
                raise ValueError(
                    "several processes train one model, and this criterion needs what all of them "
                    "have: give Objective(..., memory=flatreg.Memory(gather=accelerator.gather))"
                )
            return rows
        sizes = self.gather(torch.tensor([len(rows)], device=rows.device)).tolist()
        if len(set(sizes)) > 1:
            raise ValueError(
                f"this criterion needs as many images on each process, got {sizes}: set "
                "drop_last=True"
            )
        return self.gather(rows)

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a 0-d number over the processes, without a graph."""
        return self.gathered(value[None]).mean()

    def state_dict(self) -> dict[str, Any]:
        """What is kept, as numbers and tensors: the tensors themselves, no copies."""
        own = {"epoch": self.epoch, "batches": self.batches}
        return own | {"kept": dict(self.kept), "stored": dict(self.stored)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            ValueError: it is no such state, or holds an image of each of another number of samples.
            OSError: as `store`.
        """
        kinds = {"epoch": int | None, "batches": int, "kept": dict, "stored": dict}
        if (
            not isinstance(state, dict)
            or set(state) != set(kinds)
            or not all(isinstance(state[name], kind) for name, kind in kinds.items())
            or not all(isinstance(one, Tensor) and one.ndim for one in state["stored"].values())
        ):
            raise ValueError("state: expected what Memory.state_dict() returned, got another one")
        for images in state["stored"].values():
            if len(images) != self.samples:
                raise ValueError(
                    f"state: expected {self.samples} stored samples, got {len(images)}: it is of "
                    "another data set"
                )
        self.forget_samples()  # what is not in the state would be of another training
        for name, images in state["stored"].items():
            self.store(name, images.shape[1:], images.dtype).copy_(images)
        self.epoch, self.batches = state["epoch"], state["batches"]
        self.kept = dict(state["kept"])

    def store(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Zeros `(samples, *shape)` under `name`, memory-mapped where there is a folder.

        Raises:
            ValueError: the number of samples is not known.
            OSError: the disk has no room for them.
        """
        if self.samples is None:
            raise ValueError(
                "this criterion stores something of each training image: give Objective(..., "
                "memory=flatreg.Memory(samples=len(dataset)))"
            )
        whole = (self.samples, *shape)
        count = math.prod(whole)
        if self.folder is None:
            self.stored[name] = torch.zeros(whole, dtype=dtype)
        else:
            file = _taken(self._file(name), count * dtype.itemsize)
            mapped = torch.from_file(str(file), shared=True, size=count, dtype=dtype)
            self.stored[name] = mapped.reshape(whole)
        return self.stored[name]

    def forget_samples(self) -> None:
        """Drop what is stored of each training image, and its files."""
        for name in self.stored if self.folder is not None else ():
            self._file(name).unlink(missing_ok=True)
            with suppress(OSError):  # it holds other files
                self._file(name).parent.rmdir()
        self.stored.clear()

    def _file(self, name: str) -> Path:
        return Path(self.folder or ".") / f"{name}.bin"


def _taken(file: Path, size: int) -> Path:
    """A file of `size` zero bytes that the disk has room for.

    The room is taken now: a write into a mapping of a full disk would kill the process.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)  # a mapping of before keeps its own
        with file.open("wb") as opened:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(opened.fileno(), 0, size)
            else:  # macOS, Windows
                for start in range(0, size, _BLOCK):
                    opened.write(bytes(min(_BLOCK, size - start)))
    except OSError as error:
        needed = f"{size / 2**20:.0f} MiB for what is stored of each training image"
        raise OSError(f"{file}: {needed}: {error.strerror}") from error
    return file


class Moved(NamedTuple):
    """Images that a criterion moved, and its loss on this batch.

    Attributes:
        attacked: `(batch, ...)`.
        start: where the attack began `(batch, ...)`, if the loss reads the pass `"start"`.
        loss: loss per sample from the passes, if it is not the criterion itself.
    """

    attacked: Tensor
    start: Tensor | None = None
    loss: Callable[[Forwards], Tensor] | None = None


@runtime_checkable
class Remembers(Protocol):
    """An adversary whose attack or loss depends on earlier batches or on other processes."""

    def move(
        self,
        model: nn.Module,
        inputs: Tensor,
        labels: Tensor,
        memory: Memory,
        indices: Tensor | None = None,
    ) -> Moved:
        """Attack a batch; `indices` `(batch,)` are its places among the training images."""


# The objective whose batches a memory counts.
_READERS: weakref.WeakKeyDictionary[Memory, weakref.ref[Any]] = weakref.WeakKeyDictionary()


def check_one_reader(memory: Memory, objective: object, name: str) -> None:
    """Refuse batches that would count twice, or as those of another objective.

    Raises:
        RuntimeError: the batch had a pass before, in the same step.
        ValueError: another objective attacks with this memory in this epoch.
    """
    if is_second_pass.get():
        raise RuntimeError(
            f"{name} depends on earlier batches, and this closure attacks the batch in both "
            "passes of a step: write bound = objective.bind(...) before it, and bound() in it"
        )
    reader = _READERS.get(memory, lambda: None)()
    if memory.batches and reader is not None and reader is not objective:
        raise ValueError(
            f"{name} depends on earlier batches, and two objectives have one memory in one "
            "epoch: give each a flatreg.Memory() of its own"
        )
    _READERS[memory] = weakref.ref(objective)
