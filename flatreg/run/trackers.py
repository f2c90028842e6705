"""Accelerate's trackers: they are told of every epoch and, at the end, of the report.

A tracker is never worth a run: one that fails is told no more, one line says so, and the run goes
on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from PIL import Image

from flatreg.data.text import did_you_mean, one_line
from flatreg.run.checkpoints import Epoch

if TYPE_CHECKING:
    from flatreg.report.rows import Report, Row


def check_trackers(names: Sequence[str]) -> None:
    """Refuse what Accelerate has no tracker for.

    Raises:
        ValueError: there is no such tracker, or its package is not installed.
    """
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = sorted(LOGGER_TYPE_TO_CLASS)
            near = did_you_mean(name, known)
            raise ValueError(
                f"log_with: expected one of {', '.join(known)}, got {name!r:.80}{near}"
            )
        if name not in map(str, get_available_trackers()):
            raise ValueError(f"log_with: {name} is not installed")


def try_tracker(name: str) -> None:
    """Start a tracker that writes files, in a folder that is then removed; import any other."""
    kind = LOGGER_TYPE_TO_CLASS[name]
    if kind.requires_logging_directory:
        with TemporaryDirectory() as folder:
            tracker = kind("flatreg", folder)
            tracker.start()
            tracker.store_init_configuration({"recipe": ""})
            tracker.finish()
    else:
        import_module(name)


def log_epoch(accelerator: Accelerator, arm: str, epoch: Epoch) -> None:
    """Tell of an epoch's loss, its parts, learning rate and seconds, as `ARM/loss` and so on."""
    spent = {"seconds": epoch.seconds, "waiting_seconds": epoch.waiting_seconds}
    values = {"loss": epoch.loss, "lr": epoch.lr, **spent, **epoch.parts}
    if epoch.monitored:
        values["validation_attacked_accuracy"] = epoch.monitored.value
        values["monitor_seconds"] = epoch.monitor_seconds
    _each(accelerator, partial(_log, arm=arm, values=values, step=epoch.epoch))


def log_report(accelerator: Accelerator, report: Report, folder: Path) -> None:
    """Tell of the evaluation of every arm, at the step after its last epoch, and of the figures.

    `ARM/clean_accuracy` and `ARM/attacked_accuracy` are shares of the `ARM/n` test images, the
    latter under the whole cascade at `ARM/eps`. It is told once more under a name with its norm and
    eps, as are those at other eps and under other threats.
    """
    for row in report.rows:
        values, step = dict(_final(row)), len(row.history)
        _each(accelerator, partial(_log, arm=row.name, values=values, step=step))
    figures = {f"report/{file.stem}": file for file in sorted((folder / "figures").glob("*.png"))}
    last = max(len(row.history) for row in report.rows)
    _each(accelerator, partial(_log_figures, figures=figures, step=last))


def close_trackers(accelerator: Accelerator) -> None:
    """Have every tracker write what it holds."""
    _each(accelerator, lambda tracker: tracker.finish())
    accelerator.trackers = []


def _final(row: Row) -> Iterator[tuple[str, float]]:
    """Names and values of what a report says about an arm."""
    result = row.evaluation
    yield "clean_accuracy", result.clean.value
    yield "attacked_accuracy", result.attacked.value
    yield "attacked_accuracy_low", result.attacked.low
    yield "attacked_accuracy_high", result.attacked.high
    yield "eps", result.eps
    yield "n", result.n
    yield "flagged_findings", len(row.flagged_findings)
    if (kappa := row.kappa()) is not None:
        yield "kappa", kappa.value
    if row.time_ratio is not None:
        yield "time_ratio", row.time_ratio
    under = [(result.norm, result.eps, result.attacked)]
    under += [(result.norm, point.eps, point.accuracy) for point in result.curve]
    under += [(other.norm, other.eps, other.attacked) for other in result.other_threats]
    for norm, eps, accuracy in under:
        yield f"attacked_accuracy_{norm}_eps_{eps:.4g}", accuracy.value


def _log(tracker: Any, *, arm: str, values: Mapping[str, float], step: int) -> None:
    named = {f"{arm}/{name}": value for name, value in values.items()}
    if tracker.name == "wandb":  # it drops what has a smaller step, and every arm begins at 0
        tracker.tracker.define_metric(f"{arm}/*", step_metric=f"{arm}/epoch")
        tracker.log(named | {f"{arm}/epoch": step})
    else:
        tracker.log(named, step=step)


def _log_figures(tracker: Any, *, figures: Mapping[str, Path], step: int) -> None:
    """As images where the tracker takes them, else as files."""
    if hasattr(tracker, "log_images"):
        images = {}
        for name, file in figures.items():
            with Image.open(file) as image:
                images[name] = np.asarray(image.convert("RGB"))[None]
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        where = {} if tracker.name == "wandb" else {"step": step}
        tracker.log_images(images, **where, **layout)
    elif hasattr(tracker, "log_artifact"):
        for file in figures.values():
            tracker.log_artifact(str(file), "figures")
    elif tracker.name == "trackio":
        image_of = import_module("trackio").Image
        tracker.log({name: image_of(str(file)) for name, file in figures.items()}, step=step)


def _each(accelerator: Accelerator, call: Callable[[Any], None]) -> None:
    """Call with every tracker, on the main process; one that fails is let go."""
    for tracker in list(accelerator.trackers) if accelerator.is_main_process else []:
        try:
            call(tracker)
        except Exception as error:  # of any kind: it depends on the tracker
            accelerator.trackers.remove(tracker)
            print(
                f"flatreg: log_with: {tracker.name} failed and is told no more; the run goes on: "
                f"{one_line(error)}",
                file=sys.stderr,
            )
            with suppress(Exception):
                tracker.finish()
