"""The card of a trained model for the Hugging Face Hub: what it is, and how far to believe it.

https://huggingface.co/docs/hub/model-cards
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

import flatreg.report.tables as tables
from flatreg.data.sources import source_name
from flatreg.data.text import counted
from flatreg.evaluation.results import CurvePoint, Evaluation, OtherThreat, spot_checks
from flatreg.measures.estimate import Estimate
from flatreg.report.rows import Report, Row
from flatreg.report.tables import code, escaped, percent
from flatreg.run.checkpoints import Built

IMAGES = "attacked_images.safetensors"
WEIGHTS_DIGEST = re.compile(r"`model\.safetensors` with the SHA-256 `([0-9a-f]{64})`")
_MOST_NAMES = 50  # of classes that the card lists; config.json has all
_LOAD = """\
# where this card lies; huggingface_hub.snapshot_download("OWNER/NAME") fetches it
folder = "."
model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
mean, std = (
    torch.tensor(model.pretrained_cfg[key]).view(-1, 1, 1) for key in ("mean", "std")
)
"""
_SCORE = """\
attacked, right = load_file(f"{folder}/attacked_images.safetensors"), 0
with torch.no_grad():
    for x, y in zip(attacked["inputs"].split(256), attacked["labels"].split(256)):
        right += int((model((x - mean) / std).argmax(1) == y).sum())
print(f"{right} of {len(attacked['labels'])} attacked images are classified right")"""


@dataclass(frozen=True, kw_only=True)
class Details:
    """What a card says besides the report.

    Attributes:
        name: of the model.
        built: which images it takes, and its classes.
        license: as the Hub spells it, such as apache-2.0.
        trained_on: what a table calls the data that it was trained on.
        datasets: names on the Hub of these data.
        base_model: name on the Hub of the weights that the training started from.
        has_images: whether the attacked images lie beside the card.
        weights: SHA-256 of `model.safetensors` beside the card.
        recipe: of the training, as YAML.
        evaluation: data and settings of the evaluation, as YAML, where they are not the recipe's.
        environment: versions and machine of the training.
    """

    name: str
    built: Built
    license: str | None
    trained_on: str
    datasets: Sequence[str]
    base_model: str | None
    has_images: bool
    weights: str
    recipe: str
    evaluation: str | None
    environment: Mapping[str, str]


def model_card(report: Report, row: Row, details: Details) -> str:
    """Markdown of the card of the arm `row`, with the Hub's metadata as YAML at its head."""
    parts = (
        f"---\n{_metadata(report, row, details).to_yaml()}\n---",
        f"# {escaped(details.name)}",
        _introduction(report, row, details),
        _numbers(report, row),
        f"## What the attacked accuracy is\n\n{_cascade(row)}",
        f"## Findings\n\n{_findings(row)}",
        f"## Use\n\n{_use(details)}",
        f"## Score the attacked images again\n\n{_score(row, details)}",
        f"## Recipe\n\n{_recipe(row, details)}",
    )
    return "\n\n".join(parts) + "\n"


def _metadata(report: Report, row: Row, details: Details) -> ModelCardData:
    """Clean and attacked accuracy, each as a share in [0, 1], in the form of the Hub."""
    result, data = row.evaluation, source_name(report.recipe["data"])
    cascade = [stage.attack for stage in result.stages]
    flagged = [finding.name for finding in row.flagged_findings]

    def metric(kind: str, name: str, found: Estimate, **args: Any) -> EvalResult:
        about = {"n": found.n, "interval_95": [round(found.low, 4), round(found.high, 4)]}
        return EvalResult(
            task_type="image-classification",
            task_name="Image classification",
            dataset_type="-".join(data.lower().split()),
            dataset_name=data,
            dataset_split="test",
            metric_type=kind,
            metric_name=name,
            metric_value=round(found.value, 4),
            metric_args=about | args,
        )

    metrics = [metric("accuracy", "Clean accuracy", result.clean)]
    for threat in _threats(result):
        ball = {"norm": threat.norm, "eps": threat.eps}
        name = f"Attacked accuracy ({_ball(threat)}), an upper bound on robust accuracy"
        found = {"cascade": cascade, "flagged_findings": flagged}
        metrics.append(metric("attacked_accuracy", name, threat.attacked, **ball, **found))
    if (check := row.adaptive_check) is not None:
        ball = {"norm": result.norm, "eps": result.eps}
        name = f"Attacked accuracy ({_ball(result)}) after the adaptive attack check"
        metrics.append(metric("attacked_accuracy", name, check.attacked, **ball, adaptive=True))
    return ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "adversarial-robustness", "flatreg"],
        license=details.license,
        datasets=list(details.datasets) or None,
        base_model=details.base_model,
        model_name=details.name,
        eval_results=metrics,
    )


def _threats(result: Evaluation) -> list[Evaluation | OtherThreat]:
    return [result, *result.other_threats]


def _ball(threat: Evaluation | OtherThreat) -> str:
    return f"{tables.NORM_NAMES.get(threat.norm, threat.norm)} eps {threat.eps:.4g}"


def _introduction(report: Report, row: Row, details: Details) -> str:
    kinds = [row.criterion["kind"], *(penalty["kind"] for penalty in row.penalties)]
    wrapper = f", with {code(row.wrapper['kind'])} around the optimizer" if row.wrapper else ""
    built, data = details.built, source_name(report.recipe["data"])
    other = f" The numbers below are of other data, {escaped(data)}."
    shape = "x".join(map(str, built.shape))
    return (
        f"A classifier of images: {code(built.model.name)} of timm, {built.num_classes} classes, "
        f"images of {shape} (channels x height x width). flatreg trained it on "
        f"{escaped(details.trained_on)} for {counted(len(row.history), 'epoch')}. Its loss was "
        f"{' + '.join(map(code, kinds))}{wrapper}.{other if data != details.trained_on else ''}"
    )


def _numbers(report: Report, row: Row) -> str:
    """The accuracies of the model and of the plain arm, under every threat."""
    threats = _threats(row.evaluation)
    heads = ["", "clean %", *(f"attacked %, {_ball(threat)}" for threat in threats)]
    arms = [(tables.strong("this model"), row)]
    if row.comparison and row.name != "plain":  # with the plain arm of the same network
        plain = next(one for one in report.rows if one.name == "plain")
        name = f"plain: same network, data and seed, on {plain.criterion['kind']} alone"
        arms.append((escaped(name), plain))
    cells = [
        [name, percent(one.evaluation.clean)]
        + [percent(threat.attacked) for threat in _threats(one.evaluation)]
        for name, one in arms
    ]
    images = f"{row.evaluation.n} test images of {escaped(source_name(report.recipe['data']))}"
    seeds = f"n = {images}, one training (seed {report.recipe['seed']})"
    lines = [
        tables.markdown(heads, cells),
        f"{seeds}. [..] is Wilson's 95% interval over the images; another seed moves the numbers "
        "too. eps is in [0,1] pixel units.",
    ]
    if row.adaptive_check is not None:
        lines.append(
            "A longer search on the survivors, with images made against the plain arm among its "
            f"starts, leaves an attacked accuracy of {percent(row.adaptive_check.attacked)} %."
        )
    if row.evaluation.curve:
        own = CurvePoint(row.evaluation.eps, row.evaluation.attacked)
        points = {point.eps: point for point in (own, *row.evaluation.curve)}
        curve = [[f"{eps:.4g}", percent(points[eps].accuracy)] for eps in sorted(points)]
        norm = tables.NORM_NAMES.get(row.evaluation.norm, row.evaluation.norm)
        lines.append(tables.markdown([f"eps, {norm}", "attacked %"], curve))
        lines.append(
            "Away from the eps of the first table the search is shorter, and its bound looser."
        )
    return "\n\n".join(lines)


def _cascade(row: Row) -> str:
    stages = [[code(stage.attack), percent(stage.accuracy)] for stage in row.evaluation.stages]
    checked = spot_checks(row.evaluation)
    partly = (
        "; a spot check runs on some of these, drawn at random, and on all where it fools one or a "
        "finding is flagged"
    )
    lines = [
        "The share of test images that are classified right and that no attack below fooled. Each "
        f"attack runs on the images that survived those before it{partly if checked else ''}. The "
        "attacked accuracy is an upper bound on robust accuracy: a stronger attack can only lower "
        "it. It holds for this norm and this eps alone.",
        tables.markdown(["after the attack", "accuracy %"], stages),
        *(f"{_ball(threat)}: {code(attack)} {check}." for threat, attack, check in checked),
    ]
    return "\n\n".join(lines)


def _findings(row: Row) -> str:
    flagged = row.flagged_findings
    looked = (
        "flatreg looks for signs that an attacked accuracy is too high, such as gradients that "
        "hide from the attack."
    )
    if not flagged:
        return f"{looked} None was found."
    meanings = {
        f"{f.name} ({f.value:.2f}, threshold {f.threshold:.2f}, n = {f.n})": (
            f"{f.meaning} ({f.reference})"
        )
        for f in flagged
    }
    bullets = tables.bullets(meanings)
    return f"{looked} Each of these may make the attacked accuracy above too high:\n\n{bullets}"


def _use(details: Details) -> str:
    shape = ", ".join(map(str, ("batch", *details.built.shape)))
    logits = f"logits = model((images - mean) / std)  # images in [0,1], ({shape})"
    text = tables.fenced(f"{_imports(details.built)}\n\n{_LOAD}{logits}", "python")
    names = details.built.class_names
    if not names:
        return f"{text}\n\nThe classes have numbers and no names."
    listed = ", ".join(map(escaped, names[:_MOST_NAMES]))
    rest = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return (
        f"{text}\n\nThe classes, in the order of the logits, are {listed}{rest}. "
        '`model.pretrained_cfg["label_names"]` has their names.'
    )


def _imports(built: Built) -> str:
    """What has to be imported before timm can load the network."""
    ours = built.model.name in ("cifar_resnet18", "wide_resnet28_10")
    own = "import flatreg.models.cifar  # timm lacks this network; it is registered here\n" * ours
    return f"{own}import timm\nimport torch"


def _score(row: Row, details: Details) -> str:
    if not details.has_images:
        return (
            "The attacked images are not beside this card. `evaluation.save_inputs: true` in the "
            "recipe would have kept them."
        )
    attacked = row.evaluation.attacked
    imports = f"{_imports(details.built)}\nfrom safetensors.torch import load_file"
    return (
        f"{code(IMAGES)} has the {attacked.n} test images as the cascade left them (`inputs`), "
        "their true classes (`labels`) and their places in the test split (`index`). The code "
        f"below counts {attacked.count} of {attacked.n}. On another machine an image that lies on "
        "the boundary between two classes may count otherwise.\n\n"
        + tables.fenced(f"{imports}\n\n{_LOAD}{_SCORE}", "python")
    )


def _recipe(row: Row, details: Details) -> str:
    machine = ", ".join(f"{key} {value}" for key, value in details.environment.items())
    made = f" It was run with {escaped(machine)}." if machine else ""
    again = "trains it again" if details.evaluation else "trains and attacks it again"
    text = (
        f"The arm {code(row.name)} of this recipe; {code('flatreg run recipe.yaml')} {again}."
        f"{made} This training gave `model.safetensors` with the SHA-256 `{details.weights}`.\n\n"
        f"{tables.fenced(details.recipe.rstrip(), 'yaml')}"
    )
    if details.evaluation is None:
        return text
    other = tables.fenced(details.evaluation.rstrip(), "yaml")
    return f"{text}\n\nThe numbers of this card are of another evaluation:\n\n{other}"
