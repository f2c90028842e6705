"""Did the survivors survive, or did the attack stop short? For models trained with a penalty.

A penalty can bend the loss where attacks look, and move no decision boundary. The survivors of an
evaluation show it: images made against a twin trained without the penalty fool the model, a much
longer search does, the loss around an image does not fall evenly.

Athalye, Carlini, Wagner, "Obfuscated gradients give a false sense of security", ICML 2018; Carlini
et al., "On evaluating adversarial robustness", 2019; Tramer, Carlini, Brendel, Madry, "On adaptive
attacks to adversarial example defenses", NeurIPS 2020. The slice: Tramer et al., "Ensemble
adversarial training: attacks and defenses", ICLR 2018.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass as record
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from flatreg.attacks.apgd import apgd
from flatreg.attacks.losses import LossName
from flatreg.attacks.options import Callback
from flatreg.attacks.query import QueriedModel, loss_and_gradient
from flatreg.data.loading import Batch, batches, map_style, subset
from flatreg.evaluation.findings import Finding, make_finding
from flatreg.evaluation.results import Evaluation
from flatreg.measures.estimate import Estimate
from flatreg.measures.linearised_margin import margin
from flatreg.models.forward import in_float32
from flatreg.models.state import untouched
from flatreg.threat import Norm, check_norm, distance, per_sample, rounding, steepest_step

_TWIN_STEPS = 100  # APGD's own number; every image on the way is tried, not the last alone
_LOSSES: tuple[LossName, ...] = ("margin", "rescaled_cross_entropy")
_SHARE = 0.02  # of the survivors; why, says `adaptive_attack_check`
_AXIS = [point / 10 for point in range(-20, 21)]  # of a slice, in units of eps

_MEANINGS = {
    "transfer wins": (
        "images made against a twin without the penalty fool samples that the attack left standing",
        "Athalye et al. 2018, section 3.1; Carlini et al. 2019, section 5.2",
    ),
    "long search wins": (
        "more steps and restarts fool samples that the attack left standing: it stopped short",
        "Carlini et al. 2019, section 4.3; Tramer et al. 2020",
    ),
}


@dataclass(frozen=True)
class Slice:
    r"""Margin and loss over the plane of two steps of length eps from an image, cut with the box.

    .. math:: x + a\, s(x, -\nabla m) + b\, s(x, \xi), \qquad -2 \le a, b \le 2, \quad
              \xi \sim \mathcal{N}(0, 1)

    with m the margin and s the `flatreg.threat.steepest_step` of length eps: for Linf, signs. Grids
    are `(points, points)`, a row for each b, a column for each a: downhill to the right.

    Attributes:
        index, label: of the sample in the dataset.
        axis: values of a, and of b; 0 is the image.
        margin: z_y - max_{s != y} z_s, in units of the logits; the label flips where it is < 0.
        cross_entropy: of the label.
        distance: from the image, in the norm of the ball; for Linf, a diamond lies inside eps.
    """

    index: int
    label: int
    axis: list[float]
    margin: list[list[float]]
    cross_entropy: list[list[float]]
    distance: list[list[float]]


@dataclass(frozen=True)
class AdaptiveAttackCheck:
    """Result of `adaptive_attack_check`.

    Attributes:
        eps, norm, survivors: of the evaluation.
        n: survivors looked at.
        steps, restarts: of each long search.
        seed: of the subset, the random starts and the slices.
        seconds: wall-clock.
        indices: dataset index of each sample looked at.
        fell_to_transfer: of each, whether an image made against the twin fools it; or empty.
        fell_to_search: of each, whether a long search fools it.
        attacked: attacked accuracy of the evaluation, less those that fell here.
        findings: "transfer wins" (with a twin) and "long search wins"; none without survivors.
        slices: of the loss around a few of the samples.
    """

    eps: float
    norm: str
    n: int
    survivors: int
    steps: int
    restarts: int
    seed: int
    seconds: float
    indices: list[int]
    fell_to_transfer: list[bool]
    fell_to_search: list[bool]
    attacked: Estimate
    findings: list[Finding]
    slices: list[Slice]

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{self.norm} eps {self.eps:.4g}: {self.n} of {self.survivors} survivors, APGD of "
                f"{self.steps} steps x {self.restarts} restarts, seed {self.seed}",
                *(
                    f"  finding {f.verdict:<8} {f.name}: {f.value:.3f} "
                    f"(threshold {f.threshold:.3f})"
                    for f in self.findings
                ),
                f"  attacked, at most    {self.attacked}",
            ]
        )


def adaptive_attack_check(
    model: nn.Module,
    data: Dataset[Any] | DataLoader[Any],
    evaluation: Evaluation,
    *,
    baseline: nn.Module | None = None,
    steps: int = 500,
    restarts: int = 5,
    samples: int | None = 128,
    slices: int = 4,
    seed: int | None = None,
    batch_size: int = 256,
    progress: bool = True,
) -> AdaptiveAttackCheck:
    """Attack the survivors of `evaluation` with far more effort, and look at the loss around them.

    A finding flags above 0.02 of the survivors: 2 of 128 of a sound model fell to its plain twin.

    Gradients, buffers, modes and every random stream of both models are left as they were. A
    single process does the work: under a launch, call it on one.

    Args:
        model: images in [0,1] to logits, the one that was evaluated; a DDP wrapper too.
        data: what it was evaluated on.
        evaluation: names the survivors, eps and norm.
        baseline: the same network trained without the penalty, on the same device. Every image in
            the ball that APGD on its margin meets is tried on `model`.
        steps: of the long searches: APGD on the margin, then on the rescaled cross-entropy.
        restarts: of each search.
        samples: size of a fixed, seeded subset of the survivors; None for all.
        slices: samples to take a slice of.
        seed: left out, one more than the evaluation's, so that the searches start elsewhere.
        batch_size: samples at a time.
        progress: show a bar with the points tried.

    Raises:
        ValueError: `steps`, `restarts` or `samples` below 1; a model or data other than those that
            were evaluated.
    """
    if min(steps, restarts) < 1:
        raise ValueError(f"steps and restarts must be >= 1, got {steps} and {restarts}")
    started = time.perf_counter()
    seed = evaluation.seed + 1 if seed is None else seed
    survivors = [i for i, v in zip(evaluation.indices, evaluation.verdicts, strict=True) if v == -1]
    chosen = _some(survivors, samples, seed)
    dataset, loading = map_style(data)
    if chosen and chosen[-1] >= len(dataset):  # type: ignore[arg-type]
        raise ValueError(f"expected the data that was evaluated, it has no sample {chosen[-1]}")
    threat = _Threat(
        evaluation.eps,
        check_norm(evaluation.norm),
        steps,
        restarts,
        seed,
        batch_size,
        frozenset(_some(chosen, slices, seed) if slices else ()),
    )
    columns: defaultdict[str, list[Any]] = defaultdict(list)
    looks = len(_LOSSES) * (steps + 1) + (
        min(steps, _TWIN_STEPS) + 1 if baseline is not None else 0
    )
    with (
        in_float32(model) as module,
        untouched(module),
        nullcontext() if baseline is None else in_float32(baseline) as other,
        nullcontext() if other is None else untouched(other),
        tqdm(
            total=len(chosen) * restarts * looks,
            desc="scrutiny",
            unit="look",
            leave=False,
            disable=not progress,
        ) as bar,
    ):

        def tick(samples: Tensor, *_: object) -> None:
            bar.update(len(samples))

        for batch in batches(module, dataset, chosen, batch_size, loading):
            for name, values in _judge(module, other, batch, threat, tick).items():
                columns[name] += values
    taken = {name: columns[name] for name in _MEANINGS if columns[name]}
    fell = sum(map(any, zip(*taken.values(), strict=True)))
    return AdaptiveAttackCheck(
        eps=evaluation.eps,
        norm=evaluation.norm,
        n=len(chosen),
        survivors=len(survivors),
        steps=steps,
        restarts=restarts,
        seed=seed,
        seconds=time.perf_counter() - started,
        indices=chosen,
        slices=columns["slices"],
        fell_to_transfer=columns["transfer wins"],
        fell_to_search=columns["long search wins"],
        attacked=Estimate.share(len(survivors) - fell, evaluation.n),
        findings=[  # a single sample is no sign
            make_finding(name, sum(v) / len(v), max(_SHARE, 1 / len(v)), len(v), *_MEANINGS[name])
            for name, v in taken.items()
        ],
    )


@record(frozen=True)
class _Threat:
    eps: float
    norm: Norm
    steps: int
    restarts: int
    seed: int
    batch_size: int
    pictured: frozenset[int]  # dataset indices of the samples to take a slice of


def _judge(
    model: nn.Module, baseline: nn.Module | None, batch: Batch, threat: _Threat, callback: Callback
) -> dict[str, list[Any]]:
    """Scrutinise one batch of survivors; one list per column, per sample but for the slices."""
    wrong = QueriedModel(model, threat.batch_size).logits(batch.inputs).argmax(1) != batch.labels
    # Rounding may turn over a sample whose margin is next to nothing; it does not turn over many.
    if int(wrong.sum()) > max(1, len(wrong) / 20):
        raise ValueError(
            "expected the model and the data that were evaluated, got ones where "
            f"{int(wrong.sum())} of {len(wrong)} survivors are misclassified when clean"
        )
    pictured = [row for row, index in enumerate(batch.indices) if index in threat.pictured]
    return {
        "transfer wins": []
        if baseline is None
        else _transfer(model, baseline, batch, threat, callback),
        "long search wins": _long_search(model, batch, threat, callback),
        "slices": [_slice(model, batch, row, threat) for row in pictured],
    }


def _transfer(
    model: nn.Module, baseline: nn.Module, batch: Batch, threat: _Threat, callback: Callback
) -> list[Any]:
    """Which samples `model` gets wrong at an image of the ball that APGD on `baseline` meets."""
    victim = QueriedModel(model, threat.batch_size)
    fooled = torch.zeros_like(batch.labels, dtype=torch.bool)
    furthest = threat.eps + rounding(batch.inputs, threat.norm)

    def score(samples: Tensor, step: Tensor, x: Tensor, left: int) -> None:
        tried = distance(x, batch.inputs[samples], threat.norm) <= furthest  # L1 strays at first
        tried &= ~fooled[samples]
        if bool(tried.any()):
            rows = samples[tried]
            fooled[rows[victim.logits(x[tried]).argmax(1) != batch.labels[rows]]] = True
        callback(samples, step, x, left)

    apgd(
        baseline,
        batch.inputs,
        batch.labels,
        eps=threat.eps,
        norm=threat.norm,
        loss="margin",
        steps=min(threat.steps, _TWIN_STEPS),
        restarts=threat.restarts,
        seed=threat.seed,
        indices=batch.indices,
        batch_size=threat.batch_size,
        callback=score,
        early_stop=False,
    )
    return fooled.tolist()


def _long_search(model: nn.Module, batch: Batch, threat: _Threat, callback: Callback) -> list[Any]:
    """Which samples APGD fools with many steps and restarts, climbing one loss or the other."""
    fooled = torch.zeros_like(batch.labels, dtype=torch.bool)
    for number, loss in enumerate(_LOSSES):
        rows = (~fooled).nonzero().flatten()
        fooled[rows] = apgd(
            model,
            batch.inputs[rows],
            batch.labels[rows],
            eps=threat.eps,
            norm=threat.norm,
            loss=loss,
            steps=threat.steps,
            restarts=threat.restarts,
            seed=threat.seed + number,
            indices=[batch.indices[r] for r in rows],
            batch_size=threat.batch_size,
            callback=callback,
        ).fooled
    return fooled.tolist()


def _slice(model: nn.Module, batch: Batch, row: int, threat: _Threat) -> Slice:
    """Evaluate `model` over the plane through one image; the random step is the sample's own."""
    index, x, y = batch.indices[row], batch.inputs[row : row + 1], batch.labels[row : row + 1]
    noise = torch.from_numpy(np.random.default_rng([threat.seed, index]).standard_normal(x.shape))
    eps = per_sample(threat.eps, x)
    downhill = steepest_step(x, loss_and_gradient(model, x, y, "margin")[1], eps, threat.norm) - x
    sideways = steepest_step(x, noise.to(x), eps, threat.norm) - x
    axis = x.new_tensor(_AXIS)
    victim, rows = QueriedModel(model, threat.batch_size), list[tuple[Tensor, Tensor, Tensor]]()
    labels, centres = y.expand(len(axis)), x.expand(len(axis), *x.shape[1:])
    for b in axis:  # a row at a time: the whole grid of large images may not fit
        points = (x + per_sample(axis, centres) * downhill + b * sideways).clamp(0, 1)
        logits = victim.logits(points)
        loss = F.cross_entropy(logits, labels, reduction="none")
        rows.append((margin(logits, labels), loss, distance(points, centres, threat.norm)))
    margins, losses, distances = (torch.stack(c).tolist() for c in zip(*rows, strict=True))
    return Slice(index, int(y), _AXIS, margins, losses, distances)


def _some(indices: Sequence[int], samples: int | None, seed: int) -> list[int]:
    return [indices[row] for row in subset(len(indices), samples, seed)] if indices else []
