"""What `--help` of a command lists: its settings, each with its type, default and meaning.

Types and defaults are read off the classes and kept in `settings.json`, so that help needs no
torch; the meanings stand here. After a change of a setting, `python -m flatreg.run.help` writes the
file again; a test compares both with the classes.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from flatreg.run.catalogue import members

FILE = Path(__file__).with_name("settings.json")

WIDTH = 100
EXIT_CODES = (
    "exit codes: 0 done; 2 a mistake, told in one line on stderr; 130 interrupted (Ctrl-C); "
    "143 terminated (SIGTERM). After 130 and 143 the same command of run, sweep or evaluate "
    "continues."
)

# By group of settings: the name of each, and what it is, with its unit.
_MODEL = {
    "name": "network of timm, see timm.list_models(); hf-hub:OWNER/NAME or local-dir:FOLDER",
    "pretrained": "start from timm's pretrained weights",
    "weights": "file to start from: .safetensors, or a state dict of torch.save",
    "weights_key": "under which they lie, where the file holds several state dicts",
    "args": "arguments of the network for timm.create_model",
    "mean": "of the normalisation, one number a channel, images in [0,1]; timm's by default",
    "std": "of the normalisation, one number a channel; timm's by default",
    "freeze": "modules of the network that are not trained",
    "frozen_statistics": "BatchNorm keeps its statistics",
    "grad_checkpointing": "less memory, more time",
    "channels_last": "memory format of images and weights",
    "compile": "train by torch.compile",
    "lora": "train low-rank adapters of peft in place of the weights: rank, alpha, target",
}
_EVALUATION = {
    "eps": "radius of the ball, in [0,1] pixel units: 8/255",
    "norm": "of the ball",
    "attack": "the cascade: see `flatreg list attacks`",
    "samples": "images to attack, a fixed random subset; all by default",
    "curve": "other eps to report, in [0,1] pixel units",
    "other_threats": "other balls to report, as norm: eps",
    "seed": "of the subset and the random starts",
    "batch_size": "images at a time",
    "bfloat16": "search in bfloat16; verdicts stay float32",
    "save_inputs": "keep the attacked images",
    "bpda": "modules, or their classes, to search once more with the identity as backward pass",
    "adaptive_check": "attack the survivors once more, for long",
}
_MEASURE = {
    "eps": "radius of the attack that makes the attacked images, in [0,1] pixel units: 8/255",
    "norm": "of the attack",
    "samples": "images for what takes forward passes, a fixed random subset; null for all",
    "probed": "of them, images for what differentiates twice",
    "num_probes": "random directions an estimate",
    "radii": "of the bounds, L2 lengths in feature space; chosen from the images by default",
    "seed": "of the subset, the attack and the probes",
    "batch_size": "images at a time",
    "parts": "of the card to measure",
}
_TARGET = {
    "weights": "file with the weights of a timm model: .safetensors, or a state dict of torch.save",
    "weights_key": "under which they lie, where the file holds several state dicts",
    "pretrained": "timm's pretrained weights; true for hf-hub: and local-dir: by default",
    "args": "arguments of the network for timm.create_model",
    "mean": "of the normalisation, one number a channel, images in [0,1]; the file's or timm's",
    "std": "of the normalisation, one number a channel",
    "split": "which images",
    "size": "of digits and of image files, in pixels",
    "rank": "principal components of the training images that count as the manifold, 0 for none",
}
_RECIPE = {
    "seed": "of weights, order and random numbers",
    "arm": "name of the recipe's own arm",
    "data": "a kind of `flatreg list data`",
    "criterion": "a kind of `flatreg list criteria`; CrossEntropy by default",
    "penalties": "kinds of `flatreg list penalties`",
    "epochs": "passes over the training images",
    "batch_size": "images of a step, of all processes together",
    "accumulation": "micro-batches of a step",
    "skip_nonfinite": "steps in a row whose gradient is not finite that are skipped",
    "checkpoint_minutes": "minutes between checkpoints within an epoch",
    "mixed_precision": "of the training; Accelerate's by default",
    "ema": "decay of an average of the weights",
    "log_with": "trackers of Accelerate",
    "baseline": "train the plain arm too",
    "variants": "further arms: name to criterion, penalties, wrapper, model",
}
_AUGMENT = {
    "crop": "shift by at most so many pixels",
    "flip": "mirror half of the images",
    "mixup": "alpha of timm's Mixup",
    "cutmix": "alpha of timm's CutMix",
    "label_smoothing": "weight that is spread over all classes",
    "noise": "uniform noise of at most so much in every pixel, in [0,1] units",
    "scale": "[least, greatest] part of the area of a random crop",
    "ratio": "[least, greatest] width by height of a random crop",
    "auto_augment": "policy of timm, such as rand-m9-mstd0.5",
    "color_jitter": "strength, or a list of strengths",
    "re_prob": "probability that a rectangle is erased",
    "interpolation": "of crop and policy",
}
_OPTIMIZER = {
    "name": "of timm: adamw, sgd, ...",
    "lr": "learning rate after the warm-up",
    "weight_decay": "factor",
    "warmup_epochs": "epochs in which the learning rate rises from 0",
    "schedule": "of the learning rate after that",
    "min_lr": "at the end of cosine, tanh and poly",
    "decay_rate": "factor of step and multistep, power of poly",
    "decay_epochs": "epochs between two steps of step",
    "decay_milestones": "epochs of multistep",
    "head_epochs": "epochs in which the classifier alone is trained",
    "clip_norm": "bound of the gradient",
    "clip_mode": "how it is bounded",
    "args": "arguments of timm's optimizer",
    "wrapper": "a kind of `flatreg list wrappers`",
}
_MONITOR = {
    "every": "epochs between two evaluations",
    "samples": "validation images; all by default",
    "keep": "weights to report: of the last epoch, or of the best",
    "patience": "evaluations without a better one, after which the training ends",
}
_OF_RUN = {
    "": _RECIPE,
    "model": _MODEL,
    "optimizer": _OPTIMIZER,
    "augment": _AUGMENT,
    "monitor": _MONITOR,
    "evaluation": _EVALUATION,
}
_OF_TIMM = "of a timm model"
# By command, the groups of its settings; the names of a recipe's sections are prefixes.
GROUPS: dict[str, dict[str, dict[str, str]]] = {
    "run": _OF_RUN,
    "evaluate": {"": _EVALUATION, _OF_TIMM: {k: v for k, v in _TARGET.items() if k != "rank"}},
    "measure": {"": _MEASURE, _OF_TIMM: _TARGET},
}
_SAME = {"check": "run", "sweep": "run"}
_IN_WORDS = {"bool": "true|false", "int": "integer", "float": "number", "str": "text"}


def settings_text(command: str) -> str:
    """The settings of a command, at most `WIDTH` columns wide; "" where it has none."""
    command = _SAME.get(command, command)
    if command not in GROUPS:
        return ""
    types = json.loads(FILE.read_text(encoding="utf-8"))[command]
    lines = ["settings, as key=value; one without = is needed; with = alone, none is the default:"]
    for group, meanings in GROUPS[command].items():
        prefix = f"{group}." if command == "run" and group else ""
        lines += [f" {group}:"] if group and not prefix else []
        for name, (kind, default) in types[group].items():
            lines += _line(f"{prefix}{name}{default}", kind, meanings.get(name, ""))
    if command != "run":
        lines += _line("data.KEY", "", "of the data, as in a recipe: see `flatreg list data`")
    return "\n".join(lines)


def _line(setting: str, kind: str, meaning: str) -> Iterator[str]:
    """A setting, its type and its meaning, in columns."""
    start = f"  {setting}".ljust(32) + f" {kind}".ljust(18) + " "
    if len(start) > 51:  # the meaning begins a line of its own
        yield start.rstrip()
        start = ""
    wrapped = textwrap.wrap(meaning, WIDTH - 51, break_on_hyphens=False)
    for number, line in enumerate(wrapped or [""]):
        yield ((start if number == 0 else "").ljust(51) + line).rstrip()


def read_types() -> dict[str, dict[str, dict[str, Sequence[str]]]]:
    """Content of `settings.json`: by command, group and setting its type and "=default"."""
    from flatreg.evaluation.geometry.sharded import MeasureSettings
    from flatreg.run import recipe_sections as sections
    from flatreg.run.recipe import Recipe
    from flatreg.run.target import TargetSettings

    classes: dict[str, dict[str, Any]] = {
        "run": {
            "": Recipe,
            "model": sections.Model,
            "optimizer": sections.Optimizer,
            "augment": sections.Augment,
            "monitor": sections.Monitor,
            "evaluation": sections.EvaluationSettings,
        },
        "evaluate": {"": sections.EvaluationSettings, _OF_TIMM: TargetSettings},
        "measure": {"": MeasureSettings, _OF_TIMM: TargetSettings},
    }
    return {
        command: {
            group: {
                name: (_type(field.annotation), _default(field))
                for name, field in one.__pydantic_fields__.items()
                if field.repr and name not in _NOT_LISTED[command]
            }
            for group, one in groups.items()
        }
        for command, groups in classes.items()
    }


# Sections have groups of their own; an evaluation fits no manifold of a rank.
_NOT_LISTED = {"run": tuple(_OF_RUN), "evaluate": ("rank",), "measure": ()}


def _default(field: Any) -> str:
    """As the command line spells it: `=` alone of what is empty or a kind, nothing if needed."""
    if field.is_required():
        return ""
    value = field.get_default(call_default_factory=True)
    if isinstance(value, bool):
        return f"={str(value).lower()}"
    return f"={value}" if isinstance(value, int | float | str) else "="


def _type(annotation: Any) -> str:
    """In words of a recipe."""
    kinds = [_type_of_one(one) for one in members(annotation) if one is not NoneType]
    return " or ".join(dict.fromkeys(kinds))


def _type_of_one(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "|".join(map(str, inner))
    if origin is dict:
        return "mapping"
    if origin is not None and inner:
        return f"list of {_type(inner[0])}s" if inner[0] in (int, float) else "list"
    return "kind" if hasattr(annotation, "kind") else _IN_WORDS.get(annotation.__name__, "mapping")


if __name__ == "__main__":
    FILE.write_text(json.dumps(read_types(), indent=1) + "\n", encoding="utf-8")
