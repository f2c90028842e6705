"""Adaptive attack check: did the survivors survive, or did the attack stop short?

It is for models trained with a penalty, which can bend the loss where attacks query it and move no
decision boundary. The survivors of an evaluation show it in three ways: images made against a
baseline trained without the penalty fool the model; a much longer search does; the loss around an
image is uneven.

Athalye, Carlini, Wagner, "Obfuscated gradients give a false sense of security", ICML 2018; Carlini
et al., "On evaluating adversarial robustness", 2019; Tramer, Carlini, Brendel, Madry, "On adaptive
attacks to adversarial example defenses", NeurIPS 2020. The slice: Tramer et al., "Ensemble
adversarial training: attacks and defenses", ICLR 2018.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass as record
from functools import partial
from typing import Any

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from flatreg.attacks.apgd import apgd
from flatreg.attacks.bpda import Modules, with_bpda
from flatreg.attacks.cascade import attack_rows, on_survivors
from flatreg.attacks.losses import LossName
from flatreg.attacks.options import Attack
from flatreg.attacks.query import QueriedModel, loss_and_gradient
from flatreg.data.configuration import whole
from flatreg.data.loading import batches, map_style, subset
from flatreg.data.progress import progress_bar
from flatreg.data.sharing import Batch
from flatreg.evaluation.findings import Finding, make_finding
from flatreg.evaluation.results import Evaluation
from flatreg.measures.estimate import Estimate
from flatreg.measures.linearised_margin import margin
from flatreg.models.forward import evaluated
from flatreg.models.precision import cross_entropy
from flatreg.threat import Threat, check_norm, distance, per_sample, rounding, steepest_step

_TRANSFER_STEPS = 100  # APGD's own number; every image on the way is tried, not the last alone
_LOSSES: tuple[LossName, ...] = ("margin", "rescaled_cross_entropy")
_SHARE = 0.02  # of the survivors; why, says `adaptive_attack_check`
_AXIS = [point / 10 for point in range(-20, 21)]  # of a slice, in units of eps

_MEANINGS = {
    "transfer wins": (
        "images made against a baseline without the penalty fool survivors of the attack",
        "Athalye et al. 2018, section 3.1; Carlini et al. 2019, section 5.2",
    ),
    "long search wins": (
        "more steps and restarts fool survivors of the attack: it stopped short",
        "Carlini et al. 2019, section 4.3; Tramer et al. 2020",
    ),
    "bpda wins": (
        "with another backward pass of the named modules, a search fools survivors of the attack",
        "Athalye et al. 2018, section 4.1",
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
        n: survivors checked.
        steps, restarts: of each long search.
        seed: of the subset, the random starts and the slices.
        seconds: wall-clock.
        indices: dataset index of each sample checked.
        fooled_by_transfer: of each, whether an image made against the baseline fools it; empty
            without a baseline.
        fooled_by_search: of each, whether a long search fools it.
        attacked: attacked accuracy of the evaluation, less the samples fooled here.
        findings: "transfer wins" (with a baseline), "long search wins" and "bpda wins" (with
            modules named); none without survivors.
        slices: of the loss around a few of the samples.
        fooled_by_bpda: of each, whether a long search with another backward pass fools it; empty
            where no module was named.
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
    fooled_by_transfer: list[bool]
    fooled_by_search: list[bool]
    attacked: Estimate
    findings: list[Finding]
    slices: list[Slice]
    fooled_by_bpda: list[bool] = Field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{self.norm} eps {self.eps:.4g}: {self.n} of {self.survivors} survivors, APGD of "
            f"{self.steps} steps x {self.restarts} restarts, seed {self.seed}"
        ]
        for f in self.findings:
            limit = f"{f.value:.3f} (threshold {f.threshold:.3f})"
            lines.append(f"  finding {f.verdict:<8} {f.name}: {limit}")
        return "\n".join([*lines, f"  attacked, at most    {self.attacked}"])


def adaptive_attack_check(
    model: nn.Module,
    data: Dataset[Any] | DataLoader[Any],
    evaluation: Evaluation,
    *,
    baseline: nn.Module | None = None,
    bpda: Modules = (),
    steps: int = 500,
    restarts: int = 5,
    samples: int | None = 128,
    slices: int = 4,
    seed: int | None = None,
    batch_size: int = 256,
    progress: bool = True,
) -> AdaptiveAttackCheck:
    """Attack the survivors of `evaluation` with far more effort, and draw the loss around them.

    A finding flags above 0.02 of the survivors: of a sound model, images made against the baseline
    fooled 2 of 128.

    Gradients, buffers, modes and every random stream of both models are left as they were. A
    single process does the work: under a launch, call it on one.

    Args:
        model: images in [0,1] to logits, the one that was evaluated; a DDP wrapper too.
        data: what it was evaluated on.
        evaluation: names the survivors, eps and norm.
        baseline: the same network trained without the penalty, on the same device. Every image in
            the ball that APGD on its margin tries is tried on `model` too.
        bpda: modules whose gradients hide what is there, as in `evaluate`: the long searches run
            on all samples again, with the identity, or the module given, in their backward pass.
        steps: of the long searches: APGD on the margin, then on the rescaled cross-entropy.
        restarts: of each search.
        samples: size of a fixed, seeded subset of the survivors; None for all.
        slices: samples to take a slice of.
        seed: left out, one more than the evaluation's: the searches start elsewhere.
        batch_size: samples at a time.
        progress: show a bar with the points queried.

    Raises:
        ValueError: `steps`, `restarts` or `samples` below 1; a model or data other than those that
            were evaluated; `bpda` as in `flatreg.attacks.bpda`.
    """
    steps, restarts = whole("steps", steps, 1), whole("restarts", restarts, 1)
    started = time.perf_counter()
    seed = evaluation.seed + 1 if seed is None else seed
    survivors = [i for i, v in zip(evaluation.indices, evaluation.verdicts, strict=True) if v == -1]
    chosen = _some(survivors, samples, seed)
    dataset, available, loading = map_style(data)
    if lacking := set(chosen) - set(available):
        raise ValueError(f"expected the data that was evaluated, it has no sample {max(lacking)}")
    search = partial(apgd, steps=steps, restarts=restarts)
    searches = tuple(partial(search, loss=loss) for loss in _LOSSES)
    threat = Threat(norm=check_norm(evaluation.norm), eps=evaluation.eps, attacks=searches)
    straight = with_bpda(searches, bpda)[len(searches) :]
    transfer_steps = min(steps, _TRANSFER_STEPS)
    transfer = partial(search, loss="margin", steps=transfer_steps, early_stop=False)
    sliced = frozenset(_some(chosen, slices, seed) if slices else ())
    fooled: dict[str, list[bool]] = {name: [] for name in _MEANINGS}
    drawn: list[Slice] = []
    longest = len(searches + straight) * (steps + 1) + (baseline is not None) * (transfer_steps + 1)
    queries = len(chosen) * restarts * longest
    bar = progress_bar("adaptive attack check", queries, unit="queries", shown=progress)
    with (
        evaluated(model) as module,
        nullcontext() if baseline is None else evaluated(baseline) as other,
        bar,
    ):
        check = _Check(QueriedModel(module, batch_size), threat, seed, bar)
        for batch in batches(module, dataset, chosen, batch_size, loading):
            check.refuse_another_model(batch)
            if other is not None:
                fooled["transfer wins"] += check.transferred(batch, other, transfer)
            fooled["long search wins"] += check.searched(batch, searches)
            if straight:
                fooled["bpda wins"] += check.searched(batch, straight)
            rows = [row for row, index in enumerate(batch.indices) if index in sliced]
            drawn += [check.slice(batch, row) for row in rows]
    tried = {name: values for name, values in fooled.items() if values}
    lost = sum(map(any, zip(*tried.values(), strict=True)))
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
        fooled_by_transfer=fooled["transfer wins"],
        fooled_by_search=fooled["long search wins"],
        attacked=Estimate.share(len(survivors) - lost, evaluation.n),
        findings=[  # a single sample is no sign
            make_finding(name, sum(v) / len(v), max(_SHARE, 1 / len(v)), len(v), *_MEANINGS[name])
            for name, v in tried.items()
        ],
        slices=drawn,
        fooled_by_bpda=fooled["bpda wins"],
    )


@record(frozen=True, eq=False)
class _Check:
    """The model under attack, the threat with its long searches, their seed, the bar."""

    queried: QueriedModel
    threat: Threat
    seed: int
    bar: Any

    def refuse_another_model(self, batch: Batch) -> None:
        """Refuse a model, or data, whose survivors are misclassified when clean."""
        wrong = self.queried.logits(batch.inputs).argmax(1) != batch.labels
        # Rounding may turn a sample whose margin is next to nothing; it does not turn many.
        if int(wrong.sum()) > max(1, len(wrong) / 20):
            raise ValueError(
                "expected the model and the data that were evaluated, got ones where "
                f"{int(wrong.sum())} of {len(wrong)} survivors are misclassified when clean"
            )

    def transferred(self, batch: Batch, baseline: nn.Module, attack: Attack) -> list[bool]:
        """Which samples the model gets wrong at an image in the ball that the attack tries."""
        fooled = torch.zeros_like(batch.labels, dtype=torch.bool)
        furthest = self.threat.eps + rounding(batch.inputs, self.threat.norm)

        def score(samples: Tensor, step: Tensor, x: Tensor, left: int) -> None:
            # APGD in L1 begins in a larger ball: images outside the threat's do not count.
            tried = distance(x, batch.inputs[samples], self.threat.norm) <= furthest
            tried &= ~fooled[samples]
            if bool(tried.any()):
                rows = samples[tried]
                wrong = self.queried.logits(x[tried]).argmax(1) != batch.labels[rows]
                fooled[rows[wrong]] = True
            self.bar.update(len(samples))

        rows, how = torch.arange(len(fooled)), self._options | {"seed": self.seed}
        attack_rows(attack, baseline, batch, rows, callback=score, **how)
        return fooled.tolist()

    def searched(self, batch: Batch, attacks: Sequence[Attack]) -> list[bool]:
        """Which samples one of the long searches `attacks` fools."""

        def count(samples: Tensor, *_: object) -> None:
            self.bar.update(len(samples))

        fooled_by = torch.full_like(batch.labels, -1)
        for number, attack, rows in on_survivors(attacks, fooled_by):
            how = self._options | {"seed": self.seed + number, "callback": count}
            result = attack_rows(attack, self.queried.model, batch, rows, **how)
            fooled_by[rows[result.fooled]] = number
        return (fooled_by >= 0).tolist()

    @property
    def _options(self) -> dict[str, Any]:
        threat = self.threat
        return {"eps": threat.eps, "norm": threat.norm, "batch_size": self.queried.batch_size}

    def slice(self, batch: Batch, row: int) -> Slice:
        """Evaluate the model over the plane through an image; the random step is the sample's."""
        index, x, y = batch.indices[row], batch.inputs[row : row + 1], batch.labels[row : row + 1]
        norm, eps = self.threat.norm, per_sample(self.threat.eps, x)
        noise = torch.from_numpy(np.random.default_rng([self.seed, index]).standard_normal(x.shape))
        slope = loss_and_gradient(self.queried.model, x, y, "margin")[1]
        downhill = steepest_step(x, slope, eps, norm) - x
        sideways = steepest_step(x, noise.to(x), eps, norm) - x
        axis = x.new_tensor(_AXIS)
        labels, centres = y.expand(len(axis)), x.expand(len(axis), *x.shape[1:])
        rows = list[tuple[Tensor, Tensor, Tensor]]()
        for b in axis:  # a row at a time: the whole grid of large images may not fit
            points = (x + per_sample(axis, centres) * downhill + b * sideways).clamp(0, 1)
            logits = self.queried.logits(points)
            loss = cross_entropy(logits, labels)
            rows.append((margin(logits, labels), loss, distance(points, centres, norm)))
        margins, losses, distances = (torch.stack(c).tolist() for c in zip(*rows, strict=True))
        return Slice(index, int(y), _AXIS, margins, losses, distances)


def _some(indices: Sequence[int], samples: int | None, seed: int) -> list[int]:
    return subset(indices, samples, seed) if indices else []
