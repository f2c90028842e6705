r"""Test the attack, not the model: does it find an adversarial image that provably exists?

Zimmermann, Brendel, Tramer, Carlini, "Increasing Confidence in Adversarial Robustness
Evaluations", NeurIPS 2022. Per sample the last layer is exchanged for one that tells random points
inside the ball (class 0) from a planted point on its boundary (class 1):

.. math:: z(x') = s\,(0,\; w^\top \phi(x') + b), \qquad
          w^\top \phi(x_\text{inner}) + b < 0 < w^\top \phi(x_\text{planted}) + b

The features :math:`\phi` are the model's own and frozen, so whatever hides gradients in them hides
them here. The scale s gives the image the margin that the model itself gives it, so that a
cross-entropy which saturates on the model saturates here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from flatreg.attacks.cascade import cascade
from flatreg.attacks.options import Attack
from flatreg.attacks.query import QueriedModel
from flatreg.data.loading import batches, map_style, subset
from flatreg.evaluation.findings import Finding, make_finding
from flatreg.evaluation.masking import check_logits
from flatreg.measures.estimate import Estimate
from flatreg.models.forward import in_float32, run_forward
from flatreg.models.heads import Head, find_head
from flatreg.models.state import derived_seed, untouched
from flatreg.threat import Norm, check_eps, check_norm, per_sample, project, random_point

_INSIDE = 0.95  # radius of the inner points, in units of eps: the authors' eta
_STRETCH = 10.0  # a random change this much longer, projected, ends on the boundary
_NEAR = 0.9  # where in the gap the boundary runs: near the planted point chance does not meet it
_TRIES = 5  # planted points to draw until one can be told from the inner points
_MISSED = 0.05  # the evaluation passes at 95% success
_HARDNESS = 1e3  # of the SVM: nearly a hard margin on standardised features


@dataclass(frozen=True)
class BinarizationTest:
    """Result of `binarization_test`.

    Attributes:
        n: samples whose planted image a linear map of the features can tell from inner points.
        success: share of them on which the attack found an adversarial image.
        random: share on which as many random points of the ball as there were inner points hold
            one. Where it is high the test is easy, and passing it proves little.
        finding: flagged when the attack misses more than 5%.
    """

    n: int
    success: Estimate
    random: Estimate
    finding: Finding

    def __str__(self) -> str:
        return (
            f"planted adversaries found: {self.success} by the attack, {self.random} at random, "
            f"n = {self.n}: {self.finding.verdict}"
        )


def binarization_test(
    model: nn.Module,
    data: Dataset[Any] | DataLoader[Any],
    *,
    eps: float,
    norm: str = "linf",
    attack: str | Attack | Sequence[Attack] = "standard",
    samples: int = 32,
    inner: int = 199,
    boundary: int = 1,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = True,
) -> BinarizationTest:
    """Plant an adversarial image beside each of some samples, and let the attack look for it.

    The model is left as it was. Each sample takes 2 `inner` passes forward and an attack of its
    own, one image at a time.

    Args:
        model: images in [0,1] to logits, with a last linear layer.
        data: map-style dataset of (image, label), or a loader of one; labels are not used.
        eps: radius in [0,1] pixel units.
        norm: "linf", "l2" or "l1".
        attack: what is tested: a preset, one attack or a list (see `flatreg.attacks.cascade`).
        samples: size of a fixed, seeded subset.
        inner: points inside the ball, besides the image itself; more make the test harder.
        boundary: planted points; more make it easier.
        seed: of the subset, the points and the attack.
        batch_size: samples at a time.
        progress: show a bar.

    Raises:
        ValueError: as in `flatreg.evaluate` and `flatreg.find_head`; no point could be planted.
    """
    known = check_norm(norm)
    check_eps(eps, known)
    if inner < 1 or boundary < 1:
        raise ValueError(f"inner and boundary must be >= 1, got {inner} and {boundary}")
    dataset, loading = map_style(data)
    chosen = subset(len(dataset), samples, seed)  # type: ignore[arg-type]
    found: list[bool] = []
    at_random: list[bool] = []
    bar = tqdm(total=len(chosen), desc="planted", unit="img", leave=False, disable=not progress)
    with in_float32(model) as module, untouched(module), bar:
        for batch in batches(module, dataset, chosen, batch_size, loading):
            head = find_head(module, batch.inputs)
            check_logits(QueriedModel(module, batch_size).logits(batch.inputs))
            for row, index in enumerate(batch.indices):
                image = batch.inputs[row : row + 1]
                site = _Site(image, eps, known, derived_seed(seed, index), batch_size)
                planted = _plant(module, head, site, inner, boundary)
                bar.update()
                if planted is None:
                    continue
                result = cascade(
                    planted,
                    image,
                    torch.zeros(1, dtype=torch.long, device=image.device),
                    eps=eps,
                    norm=norm,
                    attacks=attack,
                    seed=seed,
                    indices=[index],
                )
                found.append(bool(result.fooled))
                at_random.append(bool(site.fools(planted, site.points(eps, inner, 2)).any()))
    if not found:
        raise ValueError(
            "expected features that tell a point on the boundary from points inside the ball, got "
            f"none for {len(chosen)} samples: fewer inner points or more samples"
        )
    return _judge(found, at_random)


def _judge(found: list[bool], at_random: list[bool]) -> BinarizationTest:
    n = len(found)
    success, chance = Estimate.share(sum(found), n), Estimate.share(sum(at_random), n)
    finding = make_finding(
        "planted adversary missed",
        1 - success.value,
        _MISSED,
        n,
        "the attack misses adversarial images that exist: survivors of it may be no more robust",
        "Zimmermann et al. 2022",
    )
    return BinarizationTest(n, success, chance, finding)


class _Planted(nn.Module):
    """Features of a model under a head that says 0 at the inner points and 1 at the planted."""

    weight: Tensor
    bias: Tensor

    def __init__(self, model: nn.Module, head: Head, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.model, self.head = model, head
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(batch, 2)`."""
        score = _features(self.model, self.head, x) @ self.weight + self.bias
        return torch.stack([torch.zeros_like(score), score], dim=1)


@dataclass(frozen=True, eq=False)
class _Site:
    """A ball around an image `(1, ...)`, and the random points drawn in it."""

    image: Tensor
    eps: float
    norm: Norm
    seed: int
    batch_size: int

    def points(self, radius: float, count: int, stream: int) -> Tensor:
        """Random points of a ball of another radius, `(count, ...)`."""
        images = self.image.expand(count, *self.image.shape[1:])
        return random_point(
            images,
            per_sample(radius, images),
            self.norm,
            seed=self.seed,
            stream=stream,
            indices=range(count),
        )

    def boundary(self, count: int, stream: int) -> Tensor:
        """Random points on the boundary of the ball, `(count, ...)`."""
        points = self.points(self.eps, count, stream)
        further = self.image + _STRETCH * (points - self.image)
        radius = per_sample(self.eps, points)
        return project(further, self.image.expand_as(points), radius, self.norm)

    def fools(self, planted: nn.Module, points: Tensor) -> Tensor:
        """Which of these points a planted model calls 1, `(count,)`."""
        return QueriedModel(planted, self.batch_size).logits(points).argmax(1) == 1


def _plant(
    model: nn.Module, head: Head, site: _Site, inner: int, boundary: int
) -> nn.Module | None:
    """Fit a head to the points; None where no planted point can be told from the inner ones."""
    inside = torch.cat([site.image, site.points(_INSIDE * site.eps, inner, 0)])
    with torch.no_grad():
        parts = QueriedModel(model, site.batch_size).in_parts(
            len(inside), lambda rows: _features(model, head, inside[rows])
        )
        own = torch.cat(list(parts))
        ranked = model(site.image).sort(1).values[0]
    for attempt in range(_TRIES):
        outside = site.boundary(boundary, 3 + attempt)
        with torch.no_grad():
            others = _features(model, head, outside)
        fitted = _discriminate(own, others, float(ranked[-1] - ranked[-2]))
        if fitted is None:
            continue
        planted = _Planted(model, head, *fitted)
        # In the arithmetic of the attack, one image at a time: the planted image must fool.
        one_by_one = [bool(site.fools(planted, point[None])) for point in outside]
        if all(one_by_one) and not bool(site.fools(planted, inside).any()):
            return planted
    return None


def _discriminate(inner: Tensor, outer: Tensor, margin: float) -> tuple[Tensor, Tensor] | None:
    """Weight and bias of the widest linear gap, cut near `outer`; row 0 gets `margin`."""
    from sklearn.svm import SVC  # a second to import

    points = torch.cat([inner, outer]).double().cpu().numpy()
    labels = np.repeat([0, 1], [len(inner), len(outer)])
    centre, spread = points[0], points.std(0)
    spread = np.where(spread > 0, spread, 1)
    machine = SVC(kernel="linear", C=_HARDNESS, class_weight="balanced")
    machine.fit((points - centre) / spread, labels)
    weight = machine.coef_[0] / spread
    scores = (points - centre) @ weight
    low, high = scores[labels == 0].max(), scores[labels == 1].min()
    cut = low + _NEAR * (high - low)
    if not high > low or not cut > 0:
        return None
    scale = (margin if margin > 0 else 1.0) / cut
    bias = -(cut + centre @ weight) * scale
    return inner.new_tensor(weight * scale), inner.new_tensor(bias)


def _features(model: nn.Module, head: Head, x: Tensor) -> Tensor:
    return run_forward(model, x, torch.zeros(len(x)), head).features
