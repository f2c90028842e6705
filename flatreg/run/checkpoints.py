"""Checkpoints of a training: one folder an epoch, whole or not there, with the history."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import field
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from flatreg.data.files import read_json, sync, write_json
from flatreg.evaluation.findings import Finding
from flatreg.measures.estimate import Estimate

MODEL, TRAINING, AVERAGE = "model.safetensors", "training.safetensors", "average.safetensors"


@dataclass(frozen=True)
class Epoch:
    """One epoch of a training's history, counted from 0.

    Attributes:
        lr: learning rate of its last step.
        seconds: wall-clock of its steps, without monitoring and checkpoint.
        loss: mean of the objective.
        parts: mean of each term; they sum to `loss`.
        monitored: attacked accuracy on the validation images, in the epochs of the monitor.
        fgsm: accuracy on the same images under one step of size eps, in the same epochs.
        findings: about the training up to this epoch, in the same epochs.
        monitor_seconds: wall-clock of the monitoring.
        skipped: steps that were skipped because their gradient was not finite.
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


_HISTORY = TypeAdapter(list[Epoch])


def flagged(history: list[Epoch]) -> list[Finding]:
    """Flagged findings of a training, each by name where its value was greatest."""
    worst: dict[str, Finding] = {}
    for finding in (f for epoch in history for f in epoch.findings if f.verdict == "flagged"):
        if finding.name not in worst or finding.value > worst[finding.name].value:
            worst[finding.name] = finding
    return list(worst.values())


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    history: list[Epoch],
    *,
    average: nn.Module | None = None,
    keep: bool = False,
) -> None:
    """Write `folder/epoch-N` whole or not at all, then drop the epochs before it.

    `model.safetensors` holds the weights to evaluate: their average where there is one, else the
    weights themselves; with `keep`, those of the checkpoint before. Where training continues from
    other weights, these are in `training.safetensors` and `average.safetensors`.

    Raises:
        OSError: it could not be written; the checkpoint before stays.
    """
    # None: the weights to evaluate are those of the epoch before.
    best = None if keep else average or model
    target = folder / f"epoch-{len(history):04d}"
    place = folder / f".{target.name}.partial"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        if best is None:
            shutil.copyfile(_epochs(folder)[-1] / MODEL, place / MODEL)
        else:
            save_model(best, str(place / MODEL))
        if best is not model:
            save_model(model, str(place / TRAINING))
        if average is not None and best is not average:
            save_model(average, str(place / AVERAGE))
        torch.save(optimizer.state_dict(), place / "optimizer.pt")
        write_json(place / "history.json", history, _HISTORY)
    except (OSError, RuntimeError, SafetensorError) as error:  # what these make of a full disk
        raise OSError(f"{place}: could not be written: {_reason(error, place, model)}") from error
    sync(place)
    os.replace(place, target)
    sync(folder)
    for old in _epochs(folder)[:-1]:
        shutil.rmtree(old)


def _reason(error: Exception, place: Path, model: nn.Module) -> str:
    """What went wrong; that the disk is full, where it is: not every library says so."""
    needed = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    free = shutil.disk_usage(place).free
    if free < needed:
        return (
            f"the disk is full: {free / 2**20:.0f} MiB are free, the weights alone take "
            f"{needed / 2**20:.0f} MiB"
        )
    return " ".join(str(error).split())


def load_checkpoint(folder: Path, model: nn.Module) -> list[Epoch]:
    """Load the weights to evaluate of the last complete epoch; its history, empty without one."""
    complete = _epochs(folder)
    if complete:
        _load(complete[-1] / MODEL, lambda file: load_model(model, file))
    return read_history(folder)


def _load(file: Path, load: Callable[[str], Any]) -> Any:
    """Read a file of a checkpoint.

    Raises:
        ValueError: it is damaged, or of another training; with what to do.
    """
    try:
        return load(str(file))
    except (
        *(OSError, SafetensorError, UnpicklingError, RuntimeError),
        *(EOFError, KeyError, ValueError, TypeError, AttributeError, IndexError),
    ) as error:
        raise ValueError(
            f"{file}: damaged, or of another training ({' '.join(str(error).split())[:200]}): "
            f"delete {file.parent} to train this arm again"
        ) from error


def resume(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: nn.Module | None = None,
) -> list[Epoch]:
    """Load the weights that a training continues from; its history, empty without a checkpoint.

    Raises:
        ValueError: a file of the checkpoint is damaged.
    """
    complete = _epochs(folder)
    if not complete:
        return []
    for module, name in ((model, TRAINING), (average, AVERAGE)):
        if module is not None:
            own = complete[-1] / name
            _load(own if own.exists() else complete[-1] / MODEL, partial(load_model, module))

    def load_optimizer(file: str) -> None:
        # To the CPU; the optimizer moves it to where its parameters are.
        state = torch.load(file, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state)

    _load(complete[-1] / "optimizer.pt", load_optimizer)
    return read_history(folder)


def read_history(folder: Path) -> list[Epoch]:
    """History at the last complete epoch, empty if there is none."""
    complete = _epochs(folder)
    if not complete:
        return []
    history: list[Epoch] = _load(
        complete[-1] / "history.json",
        lambda file: read_json(Path(file), _HISTORY, what="a history"),
    )
    return history


def _epochs(folder: Path) -> list[Path]:
    """Complete checkpoints, the latest last."""
    return sorted(folder.glob("epoch-*"), key=lambda path: int(path.name.removeprefix("epoch-")))
