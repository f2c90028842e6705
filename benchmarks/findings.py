"""Which findings fire on which models: should-fire and should-stay-silent, side by side.

    python benchmarks/findings.py --output benchmarks/findings.json

Rows are findings, columns are cases. A case is a model whose evaluation is sound (nothing may
fire), one whose logits are multiplied so that plain cross-entropy saturates,
or one with a defect that has a finding or an error of its own. A value with `!` fired; `?` marks
what was not expected: a flag on a sound case, or none where one must be.

Models: two pretrained CIFAR ResNets, arms of finished runs of `flatreg run` (standard and
adversarially trained, ConvNeXt, ResNet and ViT), and defective variants of them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from attacked_models import cifar_resnet, npz_images, trained
from side_by_side import Rows, describe_machine, show
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from flatreg.attacks import cascade, pgd
from flatreg.data.files import write_json
from flatreg.data.sharing import Batch
from flatreg.evaluation.findings import Finding, masking_checks, masking_findings
from flatreg.threat import Threat, check_norm

CE_ZERO, MARGIN_ZERO = "zero-gradient share", "zero-gradient share of the margin"
SATURATED, GAP, STUCK = "saturation share", "cross-entropy gap", "loss not increased"
STOCHASTIC, BATCH = "stochastic forward", "batch dependence"
WEAKER, BLACK, UNBOUNDED = "weaker attack wins", "black box wins", "unbounded attack fails"
BUDGET = "larger budget wins"
SCALED = {  # by how much the logits are multiplied: what must fire, what may
    10.0: ({SATURATED}, {GAP, CE_ZERO, STUCK}),
    100.0: ({GAP, CE_ZERO, SATURATED}, {STUCK}),
    1000.0: ({GAP, CE_ZERO, SATURATED}, {STUCK}),
}
PLAIN = ("plain", "vit", "resnet")  # arms that nothing but cross-entropy trained
HEADER = ("clean", "attacked", "seconds")


@dataclass(frozen=True)
class Case:
    """A model, its images, and what must and may fire; or what the error must say."""

    load: Callable[[], tuple[nn.Module, TensorDataset]]
    eps: float
    norm: str = "linf"
    must: frozenset[str] = frozenset()
    may: frozenset[str] = frozenset()
    error: str = ""
    attack: Any = "standard"


class Changed(nn.Module):
    """A model with something before and after it."""

    def __init__(
        self,
        model: nn.Module,
        before: Callable[[Tensor], Tensor] = lambda x: x,
        after: Callable[[Tensor], Tensor] = lambda z: z,
    ) -> None:
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, x: Tensor) -> Tensor:
        """Logits, or what the defect makes of them."""
        return self.after(self.model(self.before(x)))


class BatchStatistics(nn.Module):
    """BatchNorm that takes the statistics of the batch, in eval mode as well."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Logits that depend on the batch."""
        norms = [m for m in self.model.modules() if isinstance(m, nn.BatchNorm2d)]
        for module in norms:
            module.training, module.track_running_stats = True, False
        try:
            return self.model(x)
        finally:
            for module in norms:
                module.training, module.track_running_stats = False, True


def cases(args: argparse.Namespace) -> Iterator[tuple[str, Case]]:
    """All cases whose files are at hand."""
    images = partial(npz_images, args.cifar)
    for depth in (20, 56):
        load = lambda d=depth: (cifar_resnet(d, args.checkpoints), images())  # noqa: E731
        yield from scaled(f"ResNet-{depth}", load, 2 / 255)
    for name, run, eps in (
        ("digits", args.digits, 0.15),
        ("CIFAR", args.small_cifar, 4 / 255),
        ("networks", args.networks, 0.05),
    ):
        arms = sorted(path.name for path in (run / "checkpoints").glob("*"))
        for arm in arms:
            load = partial(trained, run, arm)
            if arm in PLAIN:
                yield from scaled(f"{name} {arm}", load, eps)
            else:
                yield f"{name} {arm}", Case(load, eps)
    for arm in ("second-difference", "input-gradient", "jacobian-norm", "gradient-difference"):
        if (args.arms / "checkpoints" / arm).exists():
            # This penalty is known to make cross-entropy overstate: a flag on it is right.
            may = frozenset({GAP}) if arm == "gradient-difference" else frozenset()
            yield f"digits {arm}", Case(partial(trained, args.arms, arm), 0.1, may=may)
    load = partial(trained, args.digits, "nfgsm")
    yield "digits nfgsm, l2", Case(load, 1.0, "l2")
    yield "digits nfgsm, l1", Case(load, 6.0, "l1")
    load = partial(trained, args.digits, "plain")
    yield "digits plain, l2", Case(load, 1.0, "l2")
    yield "digits plain x1000, l2", scale_case(load, 1.0, 1000.0, "l2")
    yield "digits plain x1000, l1", scale_case(load, 8.0, 1000.0, "l1")
    yield from defects(args)


def scaled(
    name: str,
    load: Callable[[], tuple[nn.Module, TensorDataset]],
    eps: float,
) -> Iterator[tuple[str, Case]]:
    """A standard model as it is, and with its logits multiplied."""
    yield name, Case(load, eps)
    for scale in SCALED:
        yield f"{name} x{scale:g}", scale_case(load, eps, scale)


def scale_case(
    load: Callable[[], tuple[nn.Module, TensorDataset]],
    eps: float,
    scale: float,
    norm: str = "linf",
) -> Case:
    """A model with its logits multiplied."""
    must, may = SCALED[scale]
    return Case(
        lambda: changed(load, after=lambda z: scale * z), eps, norm, frozenset(must), frozenset(may)
    )


def changed(load: Callable[[], tuple[nn.Module, TensorDataset]], **how: Any) -> Any:
    """A model with something before and after it, and its images."""
    model, data = load()
    return Changed(model, **how).eval(), data


def defects(args: argparse.Namespace) -> Iterator[tuple[str, Case]]:
    """Each defect has a finding or an error of its own."""
    load = partial(trained, args.digits, "nfgsm")
    cifar = lambda: (cifar_resnet(20, args.checkpoints), npz_images(args.cifar))  # noqa: E731
    anything = frozenset({WEAKER, BLACK, UNBOUNDED, BUDGET, GAP, STUCK, CE_ZERO, MARGIN_ZERO})
    yield (
        "softmax",
        Case(lambda: changed(load, after=lambda z: z.softmax(1)), 0.15, error="expected logits"),
    )
    yield (
        "normalised images",
        Case(
            lambda: (load()[0], TensorDataset(2 * load()[1].tensors[0] - 1, load()[1].tensors[1])),
            0.15,
            error="images in [0, 1]",
        ),
    )
    yield (
        "numpy",
        Case(
            lambda: changed(load, after=lambda z: torch.from_numpy(z.detach().numpy())),
            0.15,
            error="no gradient in the inputs",
        ),
    )
    yield (
        "BatchNorm in train mode",
        Case(
            lambda: (BatchStatistics(cifar()[0]), cifar()[1]),
            2 / 255,
            must=frozenset({BATCH}),
            may=anything,
        ),
    )
    yield (
        "dropout",
        Case(
            lambda: changed(load, before=lambda x: F.dropout(x, 0.1, training=True)),
            0.15,
            must=frozenset({STOCHASTIC}),
            may=anything,
        ),
    )
    yield (
        "noise in the forward",
        Case(
            lambda: changed(load, before=lambda x: x + 0.05 * torch.randn_like(x)),
            0.15,
            must=frozenset({STOCHASTIC}),
            may=anything,
        ),
    )
    yield (
        "rounding",
        Case(
            lambda: changed(
                partial(trained, args.digits, "plain"), before=lambda x: (8 * x).round() / 8
            ),
            0.15,
            must=frozenset({MARGIN_ZERO, CE_ZERO, UNBOUNDED, BLACK}),
            may=anything,
            attack=partial(pgd, steps=10),
        ),
    )
    yield (
        "one step of PGD",
        Case(
            load,
            0.2,
            must=frozenset({BUDGET}),
            may=frozenset({BLACK}),
            attack=partial(pgd, steps=1),
        ),
    )


def examine(case: Case, samples: int) -> tuple[dict[str, float], list[Finding]]:
    """Attack a case and judge it."""
    begin = time.perf_counter()
    model, data = case.load()
    model.eval()
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:samples]
    x, y = (tensor[rows] for tensor in data.tensors)
    with torch.no_grad():
        right = model(x).argmax(1) == y
    x, y, indices = x[right], y[right], rows[right].tolist()
    attacked = cascade(
        model, x, y, eps=case.eps, norm=case.norm, attacks=case.attack, indices=indices
    )
    middle = time.perf_counter()
    threat = Threat(norm=check_norm(case.norm), eps=case.eps)
    checks = masking_checks(model, Batch(indices, x, y), threat, seed=0, survived=~attacked.fooled)
    facts = {
        "clean": len(x) / len(rows),
        "attacked": float((~attacked.fooled).sum()) / len(rows),
        "seconds cascade": middle - begin,
        "seconds": time.perf_counter() - middle,
    }
    return facts, masking_findings(checks)


def judge(case: Case, samples: int) -> tuple[dict[str, Any], dict[str, str]]:
    """What came, in full and as a column of the table."""
    try:
        facts, findings = examine(case, samples)
    except ValueError as error:
        expected = case.error and case.error in str(error)
        return {"error": str(error), "expected": bool(expected)}, {
            "error": "yes" if expected else "?"
        }
    column = {name: f"{facts[name]:.2f}" for name in HEADER}
    wrong = []
    for f in findings:
        fired = f.verdict == "flagged"
        odd = (fired and f.name not in case.must | case.may) or (not fired and f.name in case.must)
        column[f.name] = f"{f.value:.2f}{'!' if fired else ''}{'?' if odd else ''}"
        wrong += [f.name] if odd else []
    column["error"] = "missing ?" if case.error else ""
    listed = [
        {k: getattr(f, k) for k in ("name", "value", "threshold", "verdict", "n")} for f in findings
    ]
    return {**facts, "findings": listed, "unexpected": wrong}, column


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoints", type=Path, default=Path("data/checkpoints"))
    parser.add_argument("--cifar", type=Path, default=Path("data/cifar10_small.npz"))
    parser.add_argument("--digits", type=Path, default=Path("runs/quickstart"), help="eps 0.15")
    parser.add_argument(
        "--small-cifar", type=Path, default=Path("runs/cifar10_small"), help="eps 4/255"
    )
    parser.add_argument(
        "--networks",
        type=Path,
        default=Path("runs/uncanny_valley"),
        help="of recipes/paper: ConvNeXt, ResNet and ViT on digits, eps 0.05",
    )
    parser.add_argument("--arms", type=Path, default=Path("runs/digits_penalties"), help="eps 0.1")
    parser.add_argument(
        "--only", default="", help="cases whose name contains one of these; separated by semicolons"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/findings.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    machine = describe_machine("cpu") | {"samples": args.samples}
    results: dict[str, Any] = {"machine": machine, "cases": {}}
    print(json.dumps(machine, indent=1))
    table: Rows = {}
    for name, case in cases(args):
        if args.only and not any(part in name for part in args.only.split(";")):
            continue
        torch.manual_seed(0)
        results["cases"][name], table[name] = judge(case, args.samples)
        write_json(args.output, results)  # after each: a run takes minutes
    columns = [*HEADER, STOCHASTIC, BATCH, CE_ZERO, MARGIN_ZERO, SATURATED, GAP, STUCK]
    show("Findings", table, [*columns, WEAKER, BLACK, UNBOUNDED, BUDGET, "error"])


if __name__ == "__main__":
    main()
