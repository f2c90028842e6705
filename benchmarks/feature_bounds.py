"""Bounds on the loss in feature space against the largest loss found: the figure of the page.

    python benchmarks/feature_bounds.py --output docs/figures/bound_curve.png

A small network is trained on scikit-learn's digits. Over the radius R, in multiples of each test
image's own feature radius (where its prediction can first change), the figure shows the bounds and
the largest loss found: median and quartiles over the test images that are right. Prints the numbers
that docs/feature_bounds.md quotes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatreg.data.sources import Digits
from flatreg.measures.feature_bound import BoundCurve, bound_curve, feature_radius
from flatreg.measures.lipschitz import (
    feature_displacement,
    lipschitz_certificate,
    lipschitz_estimate,
)
from flatreg.report.figures.style import COLORS, INK, STYLE, kind_color

LINES = {
    "worst_loss": ("largest loss found", INK, "-"),
    "local_bound": ("local bound, largest eigenvalue", COLORS[2], "-"),
    "relative_bound": ("local bound, relative flatness", kind_color("RelativeFlatness"), "--"),
    "global_bound": ("global bound", COLORS[5], "-"),
}


def trained() -> tuple[nn.Sequential, Tensor, Tensor]:
    """A network of two layers fitted to the digits, in float64, and the test images."""
    torch.manual_seed(0)
    splits = Digits(size=8).load()
    train = splits.train.images / 255
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(model(train), splits.train.labels).backward()
        optimizer.step()
    return model.double(), splits.test.images.double() / 255, splits.test.labels


def quartiles(values: Tensor) -> Tensor:
    """Lower quartile, median, upper quartile over the samples `(3, radii)`."""
    at = torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype)
    return values.quantile(at, dim=1)


def draw(multiples: Tensor, curve: BoundCurve, path: Path) -> None:
    """Bounds and largest loss on the left, bounds over largest loss on the right."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10.2, 3.8))
        for name, (label, color, dash) in LINES.items():
            for axes, values in (
                (left, getattr(curve, name)),
                (right, getattr(curve, name) / curve.worst_loss),
            ):
                low, middle, high = quartiles(values)
                axes.fill_between(multiples, low, high, color=color, alpha=0.15, linewidth=0)
                axes.plot(multiples, middle, dash, color=color, label=label)
        for axes in (left, right):
            axes.axvline(1, color=INK, linestyle=":", linewidth=0.9)
            axes.set(xlabel="R / feature radius of the image", yscale="log")
        left.set(ylabel="cross-entropy", xlim=(0, float(multiples[-1])))
        left.set_title("Loss at features moved by at most R")
        right.set(ylabel="bound / largest loss found", xscale="log", ylim=(0.9, 1000))
        right.set_title("How much too large")
        left.legend(fontsize=8.5, loc="lower right")
        figure.tight_layout()
        figure.savefig(path, bbox_inches="tight")
        plt.close(figure)


def main() -> None:
    """Train, measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/figures/bound_curve.png"))
    arguments = parser.parse_args()

    model, images, labels = trained()
    with torch.no_grad():
        features = model[:-1](images)
        logits = model[-1](features)
    weight = model[-1].weight.detach()
    own = feature_radius(logits, labels, weight)
    right = own > 0
    print(f"{len(labels)} test images, {float(right.double().mean()):.1%} right")
    multiples = torch.cat([torch.logspace(-3, -1, 21), torch.linspace(0.11, 3, 60)]).double()
    radii = multiples[:, None] * own[right]
    curve = bound_curve(logits[right], labels[right], weight, radii)
    for name in LINES:
        ratio = quartiles(getattr(curve, name) / curve.worst_loss)[1]
        at = {m: float(ratio[(multiples - m).abs().argmin()]) for m in (0.01, 0.1, 0.3, 1, 3)}
        print(f"{name:16}", {m: round(r, 3) for m, r in at.items()})
        below = getattr(curve, name) < curve.worst_loss * (1 - 1e-12)
        print(f"{'':16} violations: {int(below.sum())} of {below.numel()}")
    better = (curve.local_bound < curve.global_bound).double().mean(1)
    for m in (0.001, 0.01, 0.1, 1):
        share = better[(multiples - m).abs().argmin()]
        print(f"local below global at {m}: {float(share):.0%} of the images")
    certificate = lipschitz_certificate(model, before=model[-1])
    estimate = lipschitz_estimate(model[:-1], images)
    print("features:", certificate, "|", estimate)
    for eps in (0.01, 0.02, 0.05):
        reach = feature_displacement(certificate, eps, "linf", images.shape[1:])
        print(f"linf eps {eps}: cannot change {float((own > reach).double().mean()):.1%}")
    draw(multiples, curve, arguments.output)


if __name__ == "__main__":
    main()
