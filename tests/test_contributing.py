"""CONTRIBUTING.md: each row of "Where things are added" is followed with a toy, in a copy."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text()


def table():
    """Row heading to the text of the whole row."""
    section = PAGE.split("## Where things are added")[1].split("\n## ")[0]
    lines = [line for line in section.split("\n") if line.startswith("| ")]
    return {line.split("|")[1].strip(): line for line in lines[1:]}


def append(text):
    """Write a new file, or add to the end of one."""
    return lambda old: f"{old}\n\n{text}" if old else text


def imports(line):
    """Add an import before the first one of flatreg."""
    return lambda old: re.sub(r"(?m)^(?=from flatreg|from \.)", f"{line}\n", old, count=1)


def before(place, text):
    """Put text before the one line that begins with `place`."""
    assert not text.startswith(" ")
    return lambda old: insert(rf"(?m)^(?={place})", text, old)


def into(place, text):
    """Put text after what `place` matches: the opening of a table, a union, a list."""
    return lambda old: insert(rf"(?m)(?<!\w)(?:{place})()", text, old)


def insert(pattern, text, old):
    matches = list(re.finditer(pattern, old))
    assert len(matches) == 1, (pattern, len(matches))
    return old[: matches[0].end()] + text + old[matches[0].end() :]


MEASURE = '''\
"""How large logits are."""

from torch import Tensor


def logit_size(logits: Tensor) -> Tensor:
    """Mean square of the logits `(batch,)`."""
    return logits.square().mean(1)
'''
PENALTY = '''\
@configuration
class LogitSize:
    """strength * mean square of the logits.

    Args:
        strength: factor.
    """

    strength: Amount = 1.0
    kind: Literal["LogitSize"] = "LogitSize"
    requires: ClassVar[frozenset[Requirement]] = frozenset({"clean"})

    def __call__(self, passes: Forwards) -> Tensor:
        """Penalty per sample `(batch,)`."""
        return self.strength * passes["clean"].logits.square().mean(1)
'''
CRITERION = '''\
@configuration
class CornerTraining(AttackedLoss):
    """Cross-entropy at a random corner of the Linf ball.

    Args:
        eps, step_size, inner_mode: as in `AttackedLoss`.
    """

    kind: Literal["CornerTraining"] = "CornerTraining"

    def attack(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """A random corner."""
        return (inputs + self.eps * torch.randn_like(inputs).sign()).clamp(0, 1)
'''
ASCENT = '''\
@configuration
class Signed:
    """One Linf ball over all weights: e = rho sign(g)."""

    needs_layout: ClassVar[bool] = False

    def __call__(self, states: States, gradients: Vector, loss_scale: Scale) -> list[Tensor]:
        """Sign of the gradient: see `Ascent`."""
        return [torch.ones_like(g.sign_()).amax() for g in gradients]
'''
METHOD = '''\
def SignSAM(
    base: Optimizer, *, rho: Amount = 0.01, **options: Unpack[Interval]
) -> SharpnessAware:
    """SAM in a Linf ball of the weights: `Signed`."""
    return SharpnessAware(base, rho=rho, ascent=Signed(), **options)


'''
ATTACK = '''\
"""Corners: random corners of the Linf ball."""

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from flatreg.attacks.options import AttackOptions, AttackResult
from flatreg.threat import per_sample


def corners(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    **options: Unpack[AttackOptions],
) -> AttackResult:
    """Try one random corner of the ball. Arguments, result and errors as in `pgd`."""
    moved = (inputs + per_sample(eps, inputs) * torch.randn_like(inputs).sign()).clamp(0, 1)
    with torch.no_grad():
        fooled = model(moved).argmax(1) != labels
    return AttackResult(moved, torch.where(fooled, 0, -1), len(inputs), 0)
'''
MANIFOLD = '''\
@configuration
class BrightnessManifold:
    """The tangent space is the image that is the same everywhere: brightness."""

    kind: Literal["BrightnessManifold"] = "BrightnessManifold"
    tangent_dimension: ClassVar[int] = 1
    explained_variance: ClassVar[float] = 0.5

    def split(self, inputs: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Split `vectors` at `inputs` (both `(batch, ...)`) into (tangent, normal) parts."""
        means = vectors.flatten(1).mean(1).reshape(-1, *[1] * (vectors.ndim - 1))
        return means.expand_as(vectors), vectors - means


'''
SOURCE = '''\
"""Stripes."""

from typing import Literal

import torch

from flatreg.data.configuration import configuration
from flatreg.data.images import ImageArrays, Source, Splits, unread_arrays


@configuration
class Stripes(Source):
    """Noise of 16x16 pixels with one of four stripes brightened.

    Args:
        validation, limit, test_limit: see `flatreg.data.Source`.
    """

    kind: Literal["stripes"] = "stripes"

    def load(self) -> Splits:
        """Draw the images, the same ones every time."""
        pixels = torch.rand(400, 1, 16, 16, generator=torch.Generator().manual_seed(0)) / 2
        labels = torch.arange(400) % 4
        for label in range(4):
            pixels[labels == label, :, :, 4 * label : 4 * label + 4] += 0.5
        images = (255 * pixels).to(torch.uint8)
        train, test = (ImageArrays(images[p], labels[p]) for p in (slice(300), slice(300, 400)))
        return self.splits(unread_arrays(train), unread_arrays(test))
'''
FIGURE = '''\
@styled
def sizes(report: Report) -> Figure:
    """Number of images, one bar an arm."""
    figure, ((axes,),) = panels(1, 1, (4, 3))
    axes.bar([row.name for row in report.rows], [row.evaluation.n for row in report.rows])
    return figure
'''
DRAWN = '\n        "figures/sizes.png": (partial(sizes, report), "Images of each arm."),'
PART_RECORD = '''\
@dataclass(frozen=True)
class SizePart:
    """Mean square of the logits over the samples."""

    clean: float


'''
PART = '''\
def size_part(on: ShardedMeasurement) -> SizePart:
    """Mean square of the logits."""
    return SizePart(float(on.passes.clean.logits.square().mean()))


'''
PART_LINES = """\
def _size(part: SizePart, card: GeometryCard) -> list[str]:
    return [f"SIZE  of the logits, mean square {part.clean:.3g}"]


"""
CHECKED = '\n        "fooled_by_one_draw": fooled(partial(noise, draws=1), survived),'
JUDGED = """
        _of_share(
            "one draw wins",
            checks["fooled_by_one_draw"],
            0.02,
            "one random image of the ball fools survivors",
            "nobody",
        ),"""
CLAIM = '''\
"""Claim: logits are finite. Condition, fixed beforehand: all of those of the samples are."""

from typing import ClassVar

from claim import STRICT, Check, ClaimResult, Findings, Trained, main, result_of
from matplotlib.figure import Figure
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass
from torch import nn

from flatreg import Estimate
from flatreg.report.figures.style import panels


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Finite:
    """Logits are finite."""

    samples: PositiveInt = 20
    statement: ClassVar[str] = "Logits are finite."
    caption: ClassVar[str] = "The share of finite logits."

    def __call__(self, trained: Trained) -> ClaimResult:
        """Judge the claim."""
        return result_of(self, trained, trained.each(self.on_arm))

    def on_arm(self, title: str, model: nn.Module, trained: Trained) -> Findings:
        """Count the finite logits of one arm."""
        finite = model(trained.test_batch(self.samples, model)[0]).isfinite()
        check = Check(title, "all are finite", str(bool(finite.all())), bool(finite.all()))
        share = Estimate.share(int(finite.sum()), finite.numel())
        return Findings([check], {"finite": share}, {})

    def figure(self, result: ClaimResult) -> Figure:
        """Nothing but a title."""
        figure, ((axes,),) = panels(1, 1, (6.4, 4.8))
        axes.set_title(result.statement)
        return figure


if __name__ == "__main__":
    main(Finite, __file__)
'''
RECIPE = """\
# Every toy at once: one epoch on 80 images.
seed: 0
data: {kind: stripes, limit: 80, test_limit: 40}
model:
  name: vit_tiny_patch16_224
  mean: [0.5]
  std: [0.5]
  args: {img_size: 16, patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2}
criterion: {kind: CornerTraining, eps: 0.1}
penalties:
  - {kind: LogitSize, strength: 0.01}
  - {kind: InputGradient, strength: 0.1, eps: 0.1, manifold: {kind: BrightnessManifold}}
optimizer: {lr: 3.0e-2, wrapper: {kind: SignSAM, rho: 0.001}}
epochs: 1
batch_size: 20
evaluation: {eps: 0.02, attack: corners}
"""

# Row of the table to the files that it changes, each with what is done there.
STEPS = {
    "a measure": {
        "flatreg/measures/logit_size.py": [append(MEASURE)],
        "flatreg/measures/__init__.py": [
            imports("from flatreg.measures.logit_size import logit_size")
        ],
    },
    "a penalty": {
        "flatreg/terms/flatness.py": [append(PENALTY)],
        "flatreg/terms/__init__.py": [
            imports("from flatreg.terms.flatness import LogitSize"),
            into(r"Penalty = Annotated\[", " LogitSize |"),
        ],
        "flatreg/__init__.pyi": [imports("from .terms.flatness import LogitSize as LogitSize")],
    },
    "a criterion": {
        "flatreg/terms/criteria.py": [append(CRITERION)],
        "flatreg/terms/__init__.py": [
            imports("from flatreg.terms.criteria import CornerTraining"),
            into(r"Criterion = Annotated\[", " CornerTraining |"),
        ],
        "flatreg/__init__.pyi": [
            imports("from .terms.criteria import CornerTraining as CornerTraining")
        ],
    },
    "a manifold": {
        "flatreg/measures/manifold.py": [
            before("Manifold = ", MANIFOLD),
            into(r"Manifold = Annotated\[", "BrightnessManifold | "),
        ],
    },
    "a sharpness-aware method": {
        "flatreg/optimizers/ascent.py": [append(ASCENT)],
        "flatreg/optimizers/methods.py": [
            imports("from flatreg.optimizers.ascent import Signed"),
            before("METHODS", METHOD),
            into(r"METHODS: .* = \(", "\n    SignSAM,"),
        ],
        "flatreg/__init__.pyi": [imports("from .optimizers.methods import SignSAM as SignSAM")],
    },
    "an attack": {
        "flatreg/attacks/corners.py": [append(ATTACK)],
        "flatreg/attacks/__init__.py": [imports("from flatreg.attacks.corners import corners")],
        "flatreg/attacks/cascade.py": [
            imports("from flatreg.attacks.corners import corners"),
            into(r"PRESETS: .* = \{", '\n    "corners": (corners,),'),
        ],
    },
    "a data source": {
        "flatreg/data/stripes.py": [append(SOURCE)],
        "flatreg/data/sources.py": [
            imports("from flatreg.data.stripes import Stripes"),
            into(r"Data = Annotated\[", "Stripes | "),
        ],
        "flatreg/data/__init__.pyi": [imports("from .stripes import Stripes as Stripes")],
    },
    "a check for masked gradients": {
        "flatreg/evaluation/findings.py": [
            into(r"    return checks \| \{", CHECKED),
            into(r"def _attack_findings.*\n    return \[", JUDGED),
        ],
    },
    "a part of the geometry card": {
        "flatreg/evaluation/geometry/card.py": [
            into(r"Part = Literal\[", '"size", '),
            before("@dataclass.*\nclass GeometryCard", PART_RECORD),
            into(r"    norm: Norm$", "\n    size: SizePart | None = None"),
        ],
        "flatreg/evaluation/geometry/parts.py": [
            imports("from flatreg.evaluation.geometry.card import SizePart"),
            before("MEASURE_PART", PART),
            into(r"MEASURE_PART: .* = \{", '\n    "size": size_part,'),
        ],
        "flatreg/report/card.py": [
            imports("from flatreg.evaluation.geometry.card import SizePart"),
            before("_LINES", PART_LINES),
            into(r"_LINES: .* = \{", '\n    "size": _size,'),
        ],
    },
    "a figure of a report": {
        "flatreg/report/figures/report.py": [append(FIGURE), into(r"    figures = \{", DRAWN)],
    },
    "an experiment": {"recipes/toys.yaml": [append(RECIPE)]},
    "a claim of a paper": {
        "recipes/paper/toys.py": [append(CLAIM)],
        "recipes/paper/toys.yaml": [append(RECIPE)],
    },
}

PROOFS = """
import json, runpy, sys, traceback
from pathlib import Path

import torch
import flatreg
from flatreg.run.cli import main

runpy.run_module("flatreg.run.catalogue", run_name="__main__")
listed = json.loads(Path(flatreg.__file__).with_name("run").joinpath("catalogue.json").read_text())
x, y, model = torch.rand(4, 1, 16, 16), torch.arange(4), torch.nn.Linear(256, 4)
flat = torch.nn.Sequential(torch.nn.Flatten(), model)


def a_measure():
    assert flatreg.measures.logit_size(torch.ones(3, 2)).tolist() == [1, 1, 1]

def a_penalty():
    loss = flatreg.Objective(flat, flatreg.CrossEntropy(), [flatreg.LogitSize(strength=2)])(x, y)
    assert torch.isclose(loss.parts["LogitSize"], 2 * flat(x).square().mean())

def a_criterion():
    loss = flatreg.Objective(flat, flatreg.CornerTraining(eps=0.1))(x, y)
    assert loss.total > 0

def a_manifold():
    tangent, normal = flatreg.measures.manifold.BrightnessManifold().split(x, x)
    assert torch.allclose(tangent + normal, x) and abs(normal.mean()) < 1e-6

def a_sharpness_aware_method():
    before = model.weight.clone()
    optimizer = flatreg.SignSAM(torch.optim.SGD(model.parameters(), lr=0.1))
    flatreg.backward(optimizer, lambda: flat(x).square().mean(), model=flat)
    optimizer.step()
    assert not torch.equal(before, model.weight)

def an_attack():
    assert flatreg.attacks.corners(flat, x, y, eps=0.1).inputs.sub(x).abs().max() <= 0.1 + 1e-6
    flatreg.attacks.cascade(flat, x, y, eps=0.1, attacks="corners")

def a_data_source():
    assert flatreg.data.Stripes().load().num_classes == 4

def a_check_for_masked_gradients():
    report = flatreg.read_report(run)
    assert "one draw wins" in [f.name for f in report.rows[0].evaluation.findings]

def a_part_of_the_geometry_card():
    overrides = ["eps=0.1", "samples=8", "parts=[size]", f"output={run / 'geometry'}"]
    assert main(["measure", str(run / "checkpoints" / "flatreg"), *overrides]) == 0
    assert "SIZE  of the logits" in (run / "geometry" / "card.md").read_text()
    assert json.loads((run / "geometry" / "card.json").read_text())["size"]["clean"] > 0

def a_figure_of_a_report():
    assert (run / "figures" / "sizes.png").stat().st_size > 1000
    assert "Images of each arm." in (run / "report.md").read_text()

def an_experiment():
    assert main(["check", "recipes/toys.yaml"]) == 0

def a_claim_of_a_paper():
    sys.argv = ["recipes/paper/toys.py", f"output={run}"]
    sys.path.insert(0, "recipes/paper")
    runpy.run_path("recipes/paper/toys.py", run_name="__main__")
    assert "reproduced" in (run / "claim.md").read_text()


run = Path("run")
ran = main(["run", "recipes/toys.yaml", f"output={run}"])
found = {}
for row in json.loads(sys.argv[1]):
    try:
        globals()[row.replace(" ", "_").replace("-", "_")]()
        found[row] = ""
    except (Exception, SystemExit):
        found[row] = traceback.format_exc()
main(["list"])
print(json.dumps({"file": flatreg.__file__, "listed": listed, "ran": ran, "rows": found}))
"""


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """What a process finds in a copy of the package in which every row was followed."""
    copy = tmp_path_factory.mktemp("copy")
    for part in ("flatreg", "recipes"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    for steps in STEPS.values():
        for name, edits in steps.items():
            file = copy / name
            text = file.read_text() if file.exists() else ""
            for edit in edits:
                text = edit(text)
            file.write_text(text)
    command = [sys.executable, "-c", PROOFS, json.dumps(list(STEPS))]
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    *printed, last = done.stdout.splitlines()
    found = json.loads(last)
    assert Path(found["file"]).is_relative_to(copy) and found["ran"] == 0, done.stderr
    return found | {"printed": "\n".join(printed)}


def test_the_table_is_followed_row_by_row(followed):
    failed = [f"{row}: {error}" for row, error in followed["rows"].items() if error]
    assert not failed, "\n".join(failed)
    assert list(followed["rows"]) == list(table())


def test_every_kind_is_listed(followed):
    toys = {
        "criteria": "CornerTraining",
        "penalties": "LogitSize",
        "manifolds": "BrightnessManifold",
        "wrappers": "SignSAM",
        "data": "stripes",
        "attacks": "corners",
    }
    for topic, kind in toys.items():
        assert kind in followed["listed"][topic] and f"\n  {kind} " in followed["printed"]


def test_a_row_names_what_it_changes_and_three_places_at_most():
    """Files and the tables in them; and the tables of the tests exist."""
    assert list(STEPS) == list(table())
    for heading, text in table().items():
        assert len(STEPS[heading]) <= 3
        for file in STEPS[heading]:
            new = not (ROOT / file).exists()
            assert f"`{Path(file).parent if new else file}" in text, (heading, file)
        for name, file in re.findall(r"`(\w+)` (?:of|in) `([\w/.]+)`", text):
            assert re.search(rf"\b{name}\b", (ROOT / file).read_text()), (heading, name)
        for file in re.findall(r"`((?:flatreg|tests|recipes)/[\w/.]+)`", text):
            assert (ROOT / file).exists(), (heading, file)
