r"""A race of targets: a short search at each, and long ones at those whose boundary is nearest.

Which class an image is fooled to is not known beforehand, and the likeliest other class is often
another. MALT ranks the targets t by the linear distance of their boundary,

.. math:: \frac{z_y(x) - z_t(x)}{\|\nabla_x (z_y(x) - z_t(x))\|_*},

Melamed, Yehudai, Vardi, "MALT Powers Up Adversarial Attacks", NeurIPS 2024. This is the first step
of FMN's search. Here a few more steps find a distance that holds, with an image at it: ranked by
it, two targets fool as many samples as all of them, and of samples that nothing near fools the long
searches are saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from flatreg.attacks.apgd import AutoDescent
from flatreg.attacks.fmn import MinimumNorm
from flatreg.attacks.options import AttackOptions, AttackResult, complete, for_rows, identities
from flatreg.attacks.query import QueriedModel
from flatreg.attacks.search import Search, likeliest, run
from flatreg.data.configuration import whole
from flatreg.models.precision import class_indices
from flatreg.models.state import derived_seed
from flatreg.threat import Norm, check_eps, check_norm, per_sample

Heat = tuple[int, int, float]
"""Classes, steps at each, and how far the nearest adversarial image may lie, in units of eps."""

# A sample that a longer search fools had its nearest image within these, and most that it does not
# fool had not: on networks of digits and CIFAR-10 trained by N-FGSM.
_HEATS: dict[Norm, tuple[Heat, ...]] = {
    "linf": ((9, 10, 2.5), (4, 30, 1.15)),
    "l2": ((9, 15, 2.5), (3, 60, 1.2)),
    "l1": ((9, 30, 2.0), (3, 60, 1.3)),
}
# Random points from which APGD starts at each class. In L2 a start at the right class fooled an
# image near the boundary in two of three tries (ResNet-20 on CIFAR-10).
_STARTS: dict[Norm, int] = {"linf": 1, "l2": 2, "l1": 2}


def race(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    heats: Sequence[Heat] | None = None,
    fmn: tuple[int, int] = (2, 50),
    apgd: tuple[int, int] = (4, 100),
    starts: int | None = None,
    **options: Unpack[AttackOptions],
) -> AttackResult:
    """Search at the likeliest other classes briefly, and at the nearest of them at length.

    A heat is a round of short searches by FMN from the image, at one class each. The first is at
    the likeliest classes, each later one at those where the heat before found the nearest
    adversarial image. A sample that no heat fools is given up where the nearest is too far away.
    The others are searched at length from random points: by FMN, and then by APGD on DLR. A verdict
    does not depend on other samples.

    Args:
        model: as in `flatreg.attacks.pgd`, and so are the other arguments, result and errors.
        inputs: `(batch, ...)`.
        labels: `(batch,)`.
        eps: radius, scalar or `(batch,)`.
        heats: see `Heat`; left out, 9 and 4 classes with 10 and 30 steps for Linf, and more steps
            for L2 and L1, where FMN comes nearer more slowly.
        fmn: number of nearest classes, and steps at each, of the long search by FMN.
        apgd: the same of APGD; it has no more classes than the last heat.
        starts: of APGD at each class; left out 1, and 2 for L2 and L1, where more depends on them.
        **options: see `flatreg.attacks.AttackOptions`.
    """
    common, labels = complete(options, "race"), class_indices(labels, "an attack", len(inputs))
    norm, seed = check_norm(common["norm"]), common["seed"]
    check_eps(eps, norm)
    if not len(inputs):
        return AttackResult(inputs.detach(), torch.full_like(labels, -1), 0, 0)
    track = _Track(model, inputs, labels, per_sample(eps, inputs).flatten(), common)
    queried = QueriedModel(model, common["batch_size"])
    heats = _HEATS[norm] if heats is None else heats
    starts = _STARTS[norm] if starts is None else whole("starts", starts, 1)
    if not heats:
        raise ValueError("heats: expected one at least, got none")
    heats = [_checked("heats", heat, ("classes", "steps", "reach")) for heat in heats]
    fmn, apgd = (_checked(*one, ("classes", "steps")) for one in (("fmn", fmn), ("apgd", apgd)))
    common["indices"] = identities(common["indices"], len(inputs))
    classes = likeliest(queried, inputs, labels, heats[0][0])
    rows = torch.arange(len(inputs), device=labels.device)
    common_search = partial(MinimumNorm, norm=norm, nearest=False)
    for number, (count, steps, reach) in enumerate(heats):
        distances = torch.full((len(rows), min(count, classes.shape[1])), torch.inf).to(inputs)
        heat = common_search(
            steps=steps, jobs_each=count, seed=derived_seed(seed, number), distances=distances
        )
        left = track.run(heat, rows, classes[:, :count])
        closest = distances.amin(1)
        # A sample of which no adversarial image is known, however far away, is not given up.
        left = left & ~(closest.isfinite() & (closest > reach * track.radius[rows]))
        order = distances[left].argsort(dim=1, stable=True)
        rows, classes = rows[left], classes[left].gather(1, order)
    long = common_search(steps=fmn[1], jobs_each=0, seed=derived_seed(seed, len(heats)))
    left = track.run(long, rows, classes[:, : fmn[0]])
    last = AutoDescent(apgd[1], "dlr", norm, derived_seed(seed, len(heats) + 1))
    track.run(last, rows[left], classes[left][:, : apgd[0]], starts)
    forwards = track.forwards + queried.forwards
    return AttackResult(track.images, track.fooled.long() - 1, forwards, track.backwards)


def _checked(name: str, search: Any, parts: Sequence[str]) -> Any:
    """A search with its classes and steps as whole numbers."""
    if not isinstance(search, Sequence) or len(search) != len(parts):
        raise ValueError(f"{name}: expected ({', '.join(parts)}), got {search!r:.60}")
    return (*(whole(part, search[i], 1) for i, part in enumerate(parts[:2])), *search[2:])


class _Track:
    """The samples, what is known of each so far, and the passes spent."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        labels: Tensor,
        radius: Tensor,
        options: AttackOptions,
    ) -> None:
        self.model, self.inputs, self.labels, self.radius = model, inputs, labels, radius
        self.options, self.images = options, inputs.detach().clone()
        self.fooled = torch.zeros_like(labels, dtype=torch.bool)
        self.forwards = self.backwards = 0

    def run(self, search: Search[Any], rows: Tensor, classes: Tensor, starts: int = 1) -> Tensor:
        """Search samples `rows` at `classes` `(rows, k)`; whom it has not fooled `(rows,)`."""
        if not len(rows):
            return rows.bool()
        result = run(
            search,
            self.model,
            self.inputs[rows],
            self.labels[rows],
            for_rows(self.options, rows),
            eps=self.radius[rows],
            restarts=starts,
            targets=classes,
        )
        self.images[rows], self.fooled[rows] = result.inputs, result.fooled
        self.forwards += result.forwards
        self.backwards += result.backwards
        return ~result.fooled
