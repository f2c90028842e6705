r"""Binarization test of an attack: does it find an adversarial image that provably exists?

Zimmermann, Brendel, Tramer, Carlini, "Increasing Confidence in Adversarial Robustness
Evaluations", NeurIPS 2022. Per sample the last layer is exchanged for one that tells random points
inside the ball (class 0) from a random point on its boundary (class 1):

.. math:: z(x') = s\,(0,\; w^\top \phi(x') + b), \qquad
          w^\top \phi(x_\text{inner}) + b < 0 < w^\top \phi(x_\text{boundary}) + b

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

from flatreg.attacks.cascade import cascade, stages
from flatreg.attacks.options import Attack
from flatreg.attacks.query import QueriedModel
from flatreg.data.configuration import whole
from flatreg.data.loading import batches, map_style, subset
from flatreg.data.progress import progress_bar
from flatreg.evaluation.findings import Finding, make_finding
from flatreg.measures.estimate import Estimate
from flatreg.models.entrance import check_classifier, logits_of
from flatreg.models.forward import evaluated, run_forward
from flatreg.models.heads import Head, find_head
from flatreg.models.state import derived_seed
from flatreg.threat import Threat, check_norm, per_sample, project, random_point

_INSIDE = 0.95  # radius of the inner points, in units of eps: the authors' eta
_STRETCH = 10.0  # a random change this much longer, projected, ends on the boundary
_NEAR = 0.9  # where in the gap the classes part: near the boundary point, chance does not meet it
_TRIES = 5  # boundary points to draw until one can be told from the inner points
_MISSED = 0.05  # the evaluation passes at 95% success
_HARDNESS = 1e3  # of the SVM: nearly a hard margin on standardised features


@dataclass(frozen=True)
class BinarizationTest:
    """Result of `binarization_test`.

    Attributes:
        n: samples on which a linear map of the features tells boundary points from inner points.
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
            f"binarization test: {self.success} found by the attack, {self.random} at random, "
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
    """Give each of some samples an adversarial image by construction, and let the attack find it.

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
        boundary: points on the boundary of the ball, adversarial; more make it easier.
        seed: of the subset, the points and the attack.
        batch_size: samples at a time.
        progress: show a bar.

    Raises:
        ValueError: as in `flatreg.evaluate` and `flatreg.find_head`; the features tell no boundary
            point from the inner points.
    """
    threat = Threat(norm=check_norm(norm), eps=eps, attacks=stages(attack))
    inner, boundary = whole("inner", inner, 1), whole("boundary", boundary, 1)
    dataset, available, loading = map_style(data)
    chosen = subset(available, samples, seed)
    found: list[bool] = []
    at_random: list[bool] = []
    bar = progress_bar("binarization test", len(chosen), shown=progress)
    with evaluated(model) as module, bar:
        for batch in batches(module, dataset, chosen, batch_size, loading):
            check_classifier(module, batch.inputs)
            head = find_head(module, batch.inputs)
            for row, index in enumerate(batch.indices):
                image = batch.inputs[row : row + 1]
                # The stages draw from `derived_seed(seed, number)`: their starts are other points.
                ball = _Ball(image, threat, derived_seed(seed, index, 1))
                binary = _binarize(QueriedModel(module, batch_size), head, ball, inner, boundary)
                bar.update()
                if binary is None:
                    continue
                result = cascade(
                    binary,
                    image,
                    torch.zeros(1, dtype=torch.long, device=image.device),
                    eps=threat.eps,
                    norm=threat.norm,
                    attacks=threat.attacks,
                    seed=seed,
                    indices=[index],
                )
                found.append(bool(result.fooled))
                drawn = ball.points(threat.eps, inner, 2)
                at_random.append(bool(_adversarial(binary, drawn, batch_size).any()))
    if not found:
        raise ValueError(
            "expected features that tell a point on the boundary from points inside the ball, got "
            f"none for {len(chosen)} samples: fewer inner points or more samples"
        )
    n = len(found)
    success = Estimate.share(sum(found), n)
    finding = make_finding(
        "binarization test",
        1 - success.value,
        _MISSED,
        n,
        "the attack misses adversarial images that exist: survivors of it may be no more robust",
        "Zimmermann et al. 2022",
    )
    return BinarizationTest(n, success, Estimate.share(sum(at_random), n), finding)


class _Binarized(nn.Module):
    """Features of a model under a head that says 0 at the inner points and 1 at the boundary."""

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
class _Ball:
    """The ball of a threat around an image `(1, ...)`, and the random points drawn in it."""

    image: Tensor
    threat: Threat
    seed: int

    def points(self, radius: float, count: int, stream: int) -> Tensor:
        """Random points of a ball of another radius, `(count, ...)`."""
        images = self.image.expand(count, *self.image.shape[1:])
        return random_point(
            images,
            per_sample(radius, images),
            self.threat.norm,
            seed=self.seed,
            stream=stream,
            indices=range(count),
        )

    def boundary(self, count: int, stream: int) -> Tensor:
        """Random points on the boundary of the ball, `(count, ...)`."""
        points = self.points(self.threat.eps, count, stream)
        further = self.image + _STRETCH * (points - self.image)
        radius = per_sample(self.threat.eps, points)
        return project(further, self.image.expand_as(points), radius, self.threat.norm)


def _binarize(
    queried: QueriedModel, head: Head, ball: _Ball, inner: int, boundary: int
) -> _Binarized | None:
    """Fit a head to the points; None where no boundary point can be told from the inner ones."""
    model, batch_size = queried.model, queried.batch_size
    inside = torch.cat([ball.image, ball.points(_INSIDE * ball.threat.eps, inner, 0)])
    with torch.no_grad():
        parts = queried.in_parts(len(inside), lambda rows: _features(model, head, inside[rows]))
        inner_features = torch.cat(list(parts))
        ranked = logits_of(model, ball.image).sort(1).values[0]
    for attempt in range(_TRIES):
        outside = ball.boundary(boundary, 3 + attempt)
        with torch.no_grad():
            outer_features = _features(model, head, outside)
        fitted = _discriminate(inner_features, outer_features, float(ranked[-1] - ranked[-2]))
        if fitted is None:
            continue
        binary = _Binarized(model, head, *fitted)
        # In the arithmetic of the attack, one image at a time: the boundary point must fool.
        one_by_one = [bool(_adversarial(binary, point[None], batch_size)) for point in outside]
        if all(one_by_one) and not bool(_adversarial(binary, inside, batch_size).any()):
            return binary
    return None


def _adversarial(binary: _Binarized, points: Tensor, batch_size: int | None) -> Tensor:
    """Which of these points are of class 1, `(count,)`."""
    return QueriedModel(binary, batch_size).logits(points).argmax(1) == 1


def _discriminate(inner: Tensor, outer: Tensor, margin: float) -> tuple[Tensor, Tensor] | None:
    """Weight and bias of the widest linear gap, cut near `outer`; row 0 gets `margin`."""
    from sklearn.svm import SVC  # slow to import

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
