"""What a command line names: an arm of a run, and data; mistakes are told without torch."""

from __future__ import annotations

from pathlib import Path

from flatreg.data.text import did_you_mean, one_line

DATA_FORMS = "digits, FILE.npz, FOLDER (of images), cifar10:ROOT (of torchvision) or hfds/OWNER/SET"
"""The forms of `--data`, which `flatreg.run.brought.short_form` reads."""


def arm_folder(arm: str | Path, *, or_run: bool = False) -> Path:
    """The folder of an arm's checkpoints: `RUN/ARM` is short for `RUN/checkpoints/ARM`.

    Args:
        arm: one of both.
        or_run: whether the message says that RUN is taken too.

    Raises:
        ValueError: there is no such arm; the message names those of the run.
    """
    path = Path(arm)
    arms = path.parent if path.parent.name == "checkpoints" else path.parent / "checkpoints"
    for place in (path, arms / path.name):
        if (place / "model.json").is_file():
            return place
    if path.exists():
        known = f"found no {'recipe.yaml or ' if or_run else ''}model.json in it"
    else:
        beside = path.parent.iterdir() if path.parent.is_dir() else []
        known = f"found none{did_you_mean(path.name, (one_line(one.name) for one in beside))}"
    near = (path / "checkpoints", path, *([arms] if path.name != ".." else []))
    for place in near:
        if names := sorted(one.parent.name for one in place.glob("*/model.json")):
            known = f"ARM is one of {', '.join(map(one_line, names))}"
            break
    forms = f"expected {'a run or ' if or_run else ''}an arm, {'RUN, ' if or_run else ''}"
    raise ValueError(f"{one_line(path)}: {forms}RUN/ARM or RUN/checkpoints/ARM: {known}")


def run_of(folder: Path) -> Path | None:
    """The run that the checkpoints of an arm lie in, RUN/checkpoints/ARM; None where they do not.

    A link to the folder leads to its run.
    """
    run = folder.resolve().parent.parent
    return run if (run / "recipe.yaml").is_file() else None
