"""Checkpoints of a training, whole or not there: after an epoch with its history, or within it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import field
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from flatreg.data.configuration import first_mistake
from flatreg.data.files import (
    ELSEWHERE,
    PARTIAL,
    check_file,
    read_json,
    sync,
    write_digests,
    write_json,
    write_whole,
)
from flatreg.data.images import Splits
from flatreg.data.streamed import DEFAULT_CROP_PCT, StreamedImages
from flatreg.data.text import one_line
from flatreg.evaluation.findings import Finding
from flatreg.evaluation.resume import digest
from flatreg.measures.estimate import Estimate
from flatreg.run.recipe_sections import Model
from flatreg.terms.memory import Memory

T = TypeVar("T")
MODEL, TRAINING, AVERAGE = "model.safetensors", "training.safetensors", "average.safetensors"
_OPTIMIZER, _SCALER, _POSITION = "optimizer.pt", "scaler.pt", "position.pt"
_MEMORY = "memory.pt"
_BUILT = "model.json"


@dataclass(frozen=True)
class Epoch:
    """One epoch of a training's history, counted from 0.

    Attributes:
        lr: learning rate of its last step, the greatest of the parameter groups.
        seconds: wall-clock of its steps, without monitoring and checkpoint.
        loss: mean of the objective.
        parts: mean of each term; they sum to `loss`.
        monitored: attacked accuracy on the validation images, in the epochs of the monitor.
        fgsm: accuracy on the same images under one step of size eps, in the same epochs.
        findings: about the training up to this epoch, in the same epochs.
        monitor_seconds: wall-clock of the monitoring.
        skipped: steps that were skipped because their gradient was not finite.
        skipped_last: so many of them, in a row, were the last steps.
        waiting_seconds: seconds of `seconds` in which the training waited for a batch.
    """

    epoch: int
    lr: float
    seconds: float
    loss: float
    parts: dict[str, float]
    monitored: Estimate | None = None
    fgsm: Estimate | None = None
    findings: list[Finding] = field(default_factory=list)
    monitor_seconds: float = 0.0
    skipped: int = 0
    skipped_last: int = 0
    waiting_seconds: float = 0.0


_HISTORY = TypeAdapter(list[Epoch])


class Position(NamedTuple):
    """Where a training is within an epoch, on all its processes.

    Attributes:
        epoch: counted from 0.
        taken: micro-batches of it that were taken.
        seconds: wall-clock of their steps.
        skipped, in_a_row: steps that were skipped, and how many of them were the last ones.
        totals: sums of the loss and of its parts so far, of each process.
        streams: states of the random streams, of each process (`RandomStreams.plain`).
        waiting_seconds: see `Epoch`.
    """

    epoch: int
    taken: int
    seconds: float
    skipped: int
    in_a_row: int
    totals: list[dict[str, Any]]
    streams: list[dict[str, Any]]
    waiting_seconds: float = 0.0


class Continued(NamedTuple):
    """What a training continues from, besides its history: the objects whose state is kept."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: nn.Module | None = None
    scaler: GradScaler | None = None
    memory: Memory | None = None


class Built(BaseModel):
    """Content of `model.json`: what a trained model is of, and which images it takes.

    Attributes:
        model: as in the recipe.
        num_classes, channels: of the data.
        class_names: by class number, where the data have names.
        training_labels: digest of the labels of the training images, in their order.
        image_size: height and width in pixels.
        mean, std: of the normalisation, per channel.
        interpolation, crop_pct: in timm's words, how images in files are cut to `image_size`.
    """

    model_config = ConfigDict(extra="forbid")

    model: Model
    num_classes: int
    channels: int
    class_names: tuple[str, ...] | None = None
    image_size: tuple[int, int]
    mean: list[float]
    std: list[float]
    interpolation: str
    crop_pct: float
    training_labels: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height and width of the images."""
        return (self.channels, *self.image_size)


def flagged(history: list[Epoch]) -> list[Finding]:
    """Flagged findings of a training, each by name where its value was greatest."""
    worst: dict[str, Finding] = {}
    for finding in (f for epoch in history for f in epoch.findings if f.verdict == "flagged"):
        if finding.name not in worst or finding.value > worst[finding.name].value:
            worst[finding.name] = finding
    return list(worst.values())


def save_checkpoint(
    folder: Path, continued: Continued, history: list[Epoch], *, keep: bool = False
) -> None:
    """Write `folder/epoch-N` whole or not at all, then drop the checkpoints before it.

    `model.safetensors` holds the weights to evaluate: their average where there is one, else the
    weights themselves; with `keep`, those of the checkpoint before. Where training continues from
    other weights, these are in `training.safetensors` and `average.safetensors`.

    Raises:
        OSError: it could not be written; the checkpoint before stays.
        ValueError: the weights that `keep` keeps are damaged.
    """
    model, average = continued.model, continued.average
    # None: the weights to evaluate are those of the epoch before.
    best = None if keep else average or model
    kept = _epochs(folder)[-1] / MODEL if keep else None
    if kept is not None:
        _load(kept, str)  # a damaged file would be given a new digest
    target = folder / f"epoch-{len(history):04d}"
    with _replacing(target, model) as place:
        if kept is not None:
            shutil.copyfile(kept, place / MODEL)
        elif best is not None:
            save_model(best, str(place / MODEL))
        _save_training(continued, place, best)
        write_json(place / "history.json", history, _HISTORY)
    for old in (*_epochs(folder)[:-1], *_positions(folder)):
        shutil.rmtree(old)


def save_position(folder: Path, continued: Continued, position: Position) -> None:
    """Write `folder/within-N-M`, after M micro-batches of epoch N, whole or not at all.

    The checkpoint of the epoch before stays beside it, and is what `load_checkpoint` evaluates.

    Raises:
        OSError: it could not be written; the checkpoint before stays.
    """
    target = folder / f"within-{position.epoch + 1:04d}-{position.taken:07d}"
    if target.exists():  # no step was taken since this training went on from it
        return
    with _replacing(target, continued.model) as place:
        _save_training(continued, place)
        torch.save(position._asdict(), place / _POSITION)
    for old in _positions(folder):
        if old != target:
            shutil.rmtree(old)


def _save_training(continued: Continued, place: Path, saved: nn.Module | None = None) -> None:
    for module, name in ((continued.model, TRAINING), (continued.average, AVERAGE)):
        if module is not None and module is not saved:
            save_model(module, str(place / name))
    torch.save(continued.optimizer.state_dict(), place / _OPTIMIZER)
    if continued.scaler is not None:
        torch.save(continued.scaler.state_dict(), place / _SCALER)
    if continued.memory is not None:
        torch.save(continued.memory.state_dict(), place / _MEMORY)


@contextmanager
def _replacing(target: Path, model: nn.Module) -> Iterator[Path]:
    """Yield a folder to write into, which is then moved to `target` once it is on the disk."""
    place = target.with_name(f".{target.name}{PARTIAL}")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        yield place
        write_digests(place)
        sync(place)
    except (OSError, RuntimeError, SafetensorError) as error:  # what these make of a full disk
        raise OSError(f"{place}: could not be written: {_reason(error, place, model)}") from error
    os.replace(place, target)
    sync(target.parent)


def _reason(error: Exception, place: Path, model: nn.Module) -> str:
    """What went wrong; that the disk is full, where it is: not every library says so."""
    needed = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    free = shutil.disk_usage(place).free
    if free < needed:
        return (
            f"the disk is full: {free / 2**20:.0f} MiB are free, the weights alone take "
            f"{needed / 2**20:.0f} MiB"
        )
    return one_line(error, None)


def load_checkpoint(folder: Path, model: nn.Module) -> list[Epoch]:
    """Load the weights to evaluate of the last complete epoch; its history, empty without one."""
    complete = _epochs(folder)
    if complete:
        _load(complete[-1] / MODEL, lambda file: load_model(model, file))
    return read_history(folder)


def _load(file: Path, load: Callable[[str], T]) -> T:
    """Read a file of a checkpoint.

    Raises:
        ValueError: it is damaged, or of another training; with what to do.
        OSError: it could not be read.
    """
    within = file.parent.name.startswith("within")
    again = "go on from the epoch before" if within else "train this arm again"
    try:
        check_file(file)
        return load(str(file))
    except (
        *(FileNotFoundError, SafetensorError, UnpicklingError, RuntimeError),
        *(EOFError, KeyError, ValueError, TypeError, AttributeError, IndexError),
    ) as error:
        raise ValueError(
            f"{file}: damaged, or of another training ({one_line(error)}): "
            f"delete {file.parent} to {again}"
        ) from error
    except OSError as error:  # of another user, or of a disk that is away: nothing to delete
        raise OSError(f"{file}: could not be read: {one_line(error)}") from error


def resume(folder: Path, continued: Continued) -> tuple[list[Epoch], Position | None]:
    """Load what training continues from, in place; the history, and where within the next epoch.

    Without a checkpoint nothing is loaded, and the history is empty.

    Raises:
        ValueError: a file of the checkpoint is damaged.
    """
    history = read_history(folder)
    within = [path for path in _positions(folder) if _epoch_of(path) == len(history) + 1]
    complete = _epochs(folder)
    if not (within or complete):
        return [], None
    place = (within or complete)[-1]
    if complete:  # the weights to evaluate, which are no others' where an earlier epoch's are kept
        _load(complete[-1] / MODEL, str)
    for module, name in ((continued.model, TRAINING), (continued.average, AVERAGE)):
        if module is not None:
            own = place / name
            _load(own if own.exists() else place / MODEL, partial(load_model, module))
    _load(place / _OPTIMIZER, lambda file: continued.optimizer.load_state_dict(_plain(file)))
    scaler, kept = continued.scaler, place / _SCALER
    if scaler is not None and kept.exists():
        _load(kept, lambda file: scaler.load_state_dict(_plain(file)))
    if continued.memory is not None:
        state = _load(place / _MEMORY, _plain)
        continued.memory.load_state_dict(state)  # apart: it may find the disk full
    return history, _load(place / _POSITION, lambda f: Position(**_plain(f))) if within else None


def _plain(file: str) -> Any:
    """Tensors, on the CPU, and plain objects: no code."""
    return torch.load(file, map_location="cpu", weights_only=True)


def read_history(folder: Path) -> list[Epoch]:
    """History at the last complete epoch, empty if there is none."""
    complete = _epochs(folder)
    if not complete:
        return []
    read = partial(read_json, adapter=_HISTORY, what="a history")
    return _load(complete[-1] / "history.json", lambda file: read(Path(file)))


def _epochs(folder: Path) -> list[Path]:
    """Checkpoints after epochs, the latest last."""
    return sorted(folder.glob("epoch-*"), key=_epoch_of)


def _positions(folder: Path) -> list[Path]:
    """Checkpoints within epochs, the latest last; the names have digits enough to be sorted."""
    return sorted(folder.glob("within-*"))


def _epoch_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def save_spec(spec: Model, model: nn.Module, splits: Splits, folder: Path) -> None:
    """Write what `load_model` builds the model from, beside the checkpoints in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    normalize, (channels, height, width) = model.get_submodule("normalize"), splits.train.shape
    mean, std = (_shortest(normalize.get_buffer(name)) for name in ("mean", "std"))
    cut = splits.train.cut if isinstance(splits.train, StreamedImages) else None
    built = Built(
        model=spec,
        num_classes=splits.num_classes,
        channels=channels,
        class_names=splits.class_names,
        image_size=(height, width),
        mean=mean,
        std=std,
        interpolation=cut.interpolation if cut else "bilinear",
        crop_pct=(cut.crop_pct or DEFAULT_CROP_PCT) if cut else 1.0,
        training_labels=digest(splits.train.labels.long()),
    )
    write_whole(folder / _BUILT, built.model_dump_json(indent=1))
    write_digests(folder, [folder / _BUILT])


def check_same_images(folder: Path, splits: Splits) -> None:
    """Refuse to go on from checkpoints in `folder` with other training images.

    Raises:
        ValueError: their number, their classes or their order is another one.
    """
    if not (_epochs(folder) or _positions(folder)):
        return
    try:
        before = read_built(folder).training_labels
    except (OSError, ValueError):  # damaged: it is written again
        return
    if before not in (None, digest(splits.train.labels.long())):
        raise ValueError(
            f"{folder}: expected the training images that its checkpoints were trained on, got "
            f"{len(splits.train)} of other classes, number or order: {ELSEWHERE}"
        )


def _shortest(values: Tensor) -> list[float]:
    """The values as decimals, the shortest that are read back as the same float32."""
    return [float(str(value)) for value in values.flatten().float().numpy(force=True)]


def read_built(folder: Path) -> Built:
    """What the model in `folder`, an arm's checkpoints, was built from.

    Raises:
        ValueError: there is no `model.json`, it is damaged or another file.
        OSError: it could not be read.
    """
    file = folder / _BUILT
    try:
        raw = file.read_bytes()
        check_file(file)
        return Built.model_validate_json(raw)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise ValueError(
            f"{folder}: expected a folder of checkpoints in a run, RUN/checkpoints/ARM; found no "
            f"{_BUILT} in it"
        ) from error
    except ValidationError as error:
        raise ValueError(
            f"{file}: expected what a run writes, got another file: {first_mistake(error)}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{error}: `flatreg run` of the same recipe writes it again") from error
