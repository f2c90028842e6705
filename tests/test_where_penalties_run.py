"""Every penalty in every model that people bring: right, or refused with the alternative.

Right is the penalty on a twin that has no such part: masks that are known instead of dropout, the
formula instead of BatchNorm, no checkpointing, no compiler. Run as a script, this file prints the
table of docs/penalties.md.
"""

import copy
import shutil
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import PENALTIES, images
from timm.layers import DropPath
from torch import nn
from torch.utils.checkpoint import checkpoint

from flatreg import MarginBound, Objective, OffManifoldCurvature

PAGE = Path(__file__).parents[1] / "docs" / "penalties.md"
CURVED = [
    MarginBound(strength=0.5, eps=0.1, method="double_backward", subtract_curvature=True),
    OffManifoldCurvature(strength=0.5, eps=0.1, fraction=0.5),
]
ALL = [*PENALTIES, *CURVED]


class Net(nn.Module):
    """Two blocks and a head; `between` is what the cases differ in."""

    def __init__(self, between=nn.Identity, checkpointed=None):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(1, 6, 3, stride=2, padding=1)
        self.block = nn.Sequential(nn.SiLU(), nn.Conv2d(6, 6, 3, stride=2, padding=1), nn.SiLU())
        self.between = between()
        self.head = nn.Linear(96, 5)
        self.checkpointed = checkpointed

    def inner(self, x):
        return self.between(self.block(x))

    def forward(self, x):
        x = self.stem(x)
        if self.checkpointed is None:
            x = self.inner(x)
        else:
            x = checkpoint(self.inner, x, use_reentrant=self.checkpointed)
        return self.head(x.flatten(1))


class Masked(nn.Module):
    """The masks that another module drew in its first pass; as many random numbers are drawn."""

    def __init__(self, mask, drawing):
        super().__init__()
        self.mask, self.drawing = mask, drawing

    def forward(self, x):
        drawn = self.drawing(x)
        return x * self.mask if len(x) == len(self.mask) else drawn


class BatchStatistics(nn.Module):
    """BatchNorm in train mode by its formula, with nothing to move."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(6)), nn.Parameter(torch.zeros(6))

    def forward(self, x):
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
        w, b = self.weight[:, None, None], self.bias[:, None, None]
        return (x - mean) / (var + 1e-5).sqrt() * w + b


def with_known_masks(model, x):
    """The model with the masks of its first pass after `torch.manual_seed(5)`."""
    seen = []
    hook = model.between.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    torch.manual_seed(5)
    model(x)
    hook.remove()
    twin = copy.deepcopy(model)
    before, after = seen[0]
    twin.between = Masked(torch.where(before == 0, 0.0, after / before).detach(), twin.between)
    return twin


def evaluated(model, penalty, x, y, precision=torch.float32):
    """Value of the penalty and gradient of the loss with it, from one state of the streams."""
    model.zero_grad()
    torch.manual_seed(5)
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        loss = Objective(model, None, [penalty])(x, y)
    loss.total.backward()
    own = getattr(model, "_orig_mod", model)
    gradient = torch.cat([p.grad.flatten() for p in own.parameters()])
    return list(loss.parts.values())[1], gradient


def second_difference(model, penalty, x, y):
    """`OffManifoldCurvature`, with every pass from one state of the streams, by hand."""
    torch.manual_seed(5)
    model(x)
    count = round(penalty.fraction * len(x))
    rows = torch.arange(len(x)) if count == len(x) else torch.randperm(len(x))[:count]

    def loss_at(points):
        torch.manual_seed(5)
        return F.cross_entropy(model(points), y[rows], reduction="none")

    points = x[rows].requires_grad_()
    middle = loss_at(points)
    step = 0.1 * torch.autograd.grad(middle.sum(), points)[0].sign()
    points = points.detach()
    rise = loss_at(points + step) - 2 * middle + loss_at(points - step)
    return (penalty.strength * rise.abs().sum() / count).detach()


CASES = {
    "dropout": partial(Net, lambda: nn.Dropout(0.3)),
    "stochastic depth": partial(Net, lambda: DropPath(0.3)),
    "BatchNorm": partial(Net, lambda: nn.BatchNorm2d(6)),
    "LayerNorm": partial(Net, lambda: nn.LayerNorm([4, 4])),
    "checkpointing": partial(Net, lambda: nn.BatchNorm2d(6), False),
    "reentrant checkpointing": partial(Net, lambda: nn.BatchNorm2d(6), True),
    "torch.compile (aot_eager)": Net,
    "torch.compile (inductor)": Net,
    "bfloat16 autocast": Net,
}


MASKED = ("dropout", "stochastic depth")


def twin_of(case, model, x):
    if case in MASKED:
        return with_known_masks(model, x)
    twin = copy.deepcopy(model)
    if case == "BatchNorm":
        twin.between = BatchStatistics()
    twin.checkpointed = None
    return twin


def brought(case, model):
    """The model as it is trained."""
    if not case.startswith("torch.compile"):
        return model
    torch._dynamo.reset()
    return torch.compile(model, backend=case.split("(")[1][:-1])


@cache
def outcome(case, index):
    """ "yes" where the penalty is right, "refused" where it says so in one line."""
    penalty, (x, y) = ALL[index], images()
    model = CASES[case]().train()
    twin = twin_of(case, model, x)
    half = case == "bfloat16 autocast"
    try:
        value, gradient = evaluated(
            brought(case, model), penalty, x, y, torch.bfloat16 if half else torch.float32
        )
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 400
        assert "use " in str(error) or "switch" in str(error), error
        return "refused"
    if case in (*MASKED, "BatchNorm") and getattr(penalty, "estimator", "") == "second_difference":
        expected = second_difference(model, penalty, x, y)
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-6)
        if (
            penalty.fraction < 1
        ):  # draws masks for a part of the batch, which the twin does not know
            return "yes"
    expected, wanted = evaluated(twin, penalty, x, y)
    if half:  # a difference of two losses is mostly rounding
        rough = penalty.kind in ("OffManifoldCurvature", "LocalLinearity")
        torch.testing.assert_close(value, expected, rtol=0.15, atol=0.1 if rough else 0)
    else:
        scale = float(wanted.abs().max())
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=2e-4 * scale)
    return "yes"


def label(penalty):
    """Name of the row."""
    settings = [f'"{penalty.estimator}"'] if hasattr(penalty, "estimator") else []
    if getattr(penalty, "method", "") == "double_backward":
        settings.append("double backward")
    if getattr(penalty, "subtract_curvature", False):
        settings.append("with curvature")
    if getattr(penalty, "fraction", 1) < 1:
        settings.append("part of the batch")
    return ", ".join([f"`{penalty.kind}`", *settings])


def table():
    """Rows of the table in the page, by name."""
    lines = PAGE.read_text().split("<!-- where they run -->")[1].strip().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(cells[0][1:], row[1:], strict=True)) for row in cells[2:]}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch, when reentrant
@pytest.mark.parametrize("case", CASES)
def test_it_is_right_or_refused_as_the_page_says(case):
    if "inductor" in case and shutil.which("g++") is None:
        pytest.skip("inductor needs a compiler")
    page = table()
    assert set(page) == {label(p) for p in ALL}
    found = {label(p): outcome(case, i) for i, p in enumerate(ALL)}
    assert found == {row: cells[case] for row, cells in page.items()}


if __name__ == "__main__":
    print("| |", " | ".join(CASES), "|")
    print("|---|" + "---|" * len(CASES))
    for i, penalty in enumerate(ALL):
        print("|", label(penalty), "|", " | ".join(outcome(case, i) for case in CASES), "|")
