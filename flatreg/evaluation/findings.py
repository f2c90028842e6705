"""Signs of an attacked accuracy that is too high: observed sample by sample, judged as findings."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from flatreg.attacks.apgd import apgd
from flatreg.attacks.cascade import attack_rows
from flatreg.attacks.options import Attack, Callback
from flatreg.attacks.pgd import fgsm, noise, pgd
from flatreg.attacks.query import QueriedModel
from flatreg.attacks.square import square
from flatreg.data.sharing import Batch
from flatreg.evaluation.jumps import jump_check
from flatreg.measures.estimate import Estimate
from flatreg.models.state import derived_seed
from flatreg.threat import Threat, whole_box

Checks = dict[str, Tensor]
"""What is observed: for each check its name and one entry a sample."""

_STEPS = 10  # of PGD, plain and on the margin
_DRAWS = 10  # of noise: what a forward with masked gradients loses, it loses to the first few
_QUERIES = 60  # of Square: enough to fool a model whose gradients hide, and few robust ones
_BUDGET = 40  # steps of APGD from another start
_REPEATED = 1e-4  # of the spread of the logits: the same kernels on the same batch agree to this
_REGROUPED = 1e-2  # other batch sizes take other kernels, which TF32 lets differ by 1e-3
_POINTS = 0.05  # of accuracy: what a finding must move at least to be worth a flag
# Sound CIFAR ResNets lie below, plain models with ten times the logits above; a thin line, drawn
# after seeing them (benchmarks/findings.json).
_SATURATED = 0.43


def masking_checks(
    model: nn.Module,
    batch: Batch,
    threat: Threat,
    *,
    seed: int,
    survived: Tensor,
    batch_size: int | None = None,
    callback: Callback | None = None,
) -> Checks:
    """Observe the signs of masked gradients and of attacks too weak; one number a sample.

    Every array is `(batch,)`, booleans but for `logit_spread`, so that the checks of several
    batches or processes are concatenated and then judged by `masking_findings`.

    A sample that nothing fools is passed forward 172 times and backward 90 times: for the checks
    of the forward (4 forward), gradients (3 and 2), jumps (17 and 17; 64 more where these miss the
    margin), PGD on the cross-entropy (13 and 10) and on the margin (11 and 10), one step and noise
    (12 and 1), Square (60), an unbounded attack (11 and 10 at most) and APGD from another start (41
    and 40). An attack stops at a sample when it is fooled: one fooled within two steps takes about
    37 forward, 27 backward.

    Args:
        model: images in [0,1] to logits, in eval mode.
        batch: correctly classified samples.
        threat: of the attacked accuracy; its own attacks are not run.
        seed: of random starts, kept apart from those of the cascade by another stream.
        survived: `(batch,)`: which samples withstood the attacks whose number is to be believed.
        batch_size: samples at a time, halved where memory runs out; left out, all.
        callback: of the attacks: see `flatreg.attacks.Callback`.

    Raises:
        ValueError: the model returns probabilities; as in `flatreg.attacks.pgd`.
    """
    inputs, labels, survived = batch.inputs, batch.labels.long(), survived.bool()
    queried = QueriedModel(model, batch_size)

    def fooled(attack: Attack, among: Tensor, eps: float = threat.eps) -> Tensor:
        """Which of the samples `among` these an attack fools, from starts that are not repeated."""
        found, rows = torch.zeros_like(among), among.nonzero().flatten()
        if len(rows):
            options: dict[str, Any] = {"norm": threat.norm, "seed": derived_seed(seed, 2**31)}
            options |= {"batch_size": batch_size, "callback": callback}
            found[rows] = attack_rows(attack, model, batch, rows, eps=eps, **options).fooled
        return found

    checks = forward_checks(model, inputs, batch_size=batch_size)
    checks |= _gradient_checks(queried, inputs, labels)
    jumps = jump_check(queried, batch, threat, derived_seed(seed, 2**31))
    checks["margin_jumps"] = jumps & ~checks["changes_when_repeated"]
    everyone = torch.ones_like(survived)
    plain = pgd(
        model,
        inputs,
        labels,
        eps=threat.eps,
        norm=threat.norm,
        steps=_STEPS,
        loss="cross_entropy",
        indices=batch.indices,
        batch_size=batch_size,
        callback=callback,
    )
    stuck, rows = torch.zeros_like(survived), ~plain.fooled
    if threat.eps > 0 and bool(rows.any()):  # nothing can move in a ball of one point
        end, start = (
            queried.query(x[rows], labels[rows], "cross_entropy", gradient=False).value
            for x in (plain.inputs, inputs)
        )
        stuck[rows] = ~(end > start)
    margin = partial(pgd, steps=_STEPS, loss="margin")
    withstood = ~fooled(margin, everyone)
    weaker = fooled(partial(fgsm, loss="margin"), withstood)
    weaker |= fooled(partial(noise, draws=_DRAWS), withstood & ~weaker)
    return checks | {
        "survives_cross_entropy": rows,
        "stuck_cross_entropy": stuck,
        "survived": survived,
        "survives_margin": withstood,
        "fooled_by_weaker": weaker,
        "fooled_by_black_box": fooled(partial(square, queries=_QUERIES), survived),
        "survives_unbounded": ~fooled(margin, everyone, whole_box(inputs, threat.norm)),
        "fooled_by_budget": fooled(partial(apgd, steps=_BUDGET, loss="margin"), survived),
    }


def forward_checks(model: nn.Module, inputs: Tensor, *, batch_size: int | None = None) -> Checks:
    """Observe whether logits change when a batch is passed again, or among other images.

    The other images are the negatives 1 - x. Takes four passes forward.

    Args:
        model: images in [0,1] to logits, in eval mode.
        inputs: `(batch, ...)`.
        batch_size: samples at a time.

    Raises:
        ValueError: the model returns probabilities.
    """
    queried = QueriedModel(model, batch_size)
    first, again = queried.logits(inputs), queried.logits(inputs)
    # A sample and its negative side by side, so that every part of the batch has both.
    pairs = rearrange([1 - inputs, inputs], "two n ... -> (n two) ...")
    together = QueriedModel(model, None if batch_size is None else max(2, batch_size))
    among = rearrange(together.logits(pairs), "(n two) c -> two n c", two=2)[1]
    spread = (first.amax(1) - first.amin(1)).clamp_min(torch.finfo(first.dtype).tiny)
    repeated = (again - first).abs().amax(1) > _REPEATED * spread
    regrouped = (among - first).abs().amax(1) > _REGROUPED * spread
    # Logits that change by themselves say nothing about the other images of the batch.
    return {"changes_when_repeated": repeated, "changes_with_batch": regrouped & ~repeated}


def _gradient_checks(queried: QueriedModel, inputs: Tensor, labels: Tensor) -> Checks:
    """Gradients at the images as they are: are they zero, and is softmax one-hot?"""
    logits = queried.logits(inputs)
    zero = {}
    for loss in ("cross_entropy", "margin"):
        slope = queried.query(inputs, labels, loss).gradient.abs().flatten(1).amax(1)
        zero[f"zero_gradient_{loss}"] = slope < torch.finfo(slope.dtype).tiny  # or subnormal
    return zero | {
        "saturated": F.softmax(logits, 1).amax(1) == 1,
        "logit_spread": logits.amax(1) - logits.amin(1),
    }


@dataclass(frozen=True)
class Finding:
    """One check: flagged when its value exceeds the threshold.

    Attributes:
        name: which check.
        value: share of the samples, in [0, 1].
        threshold: above it the check flags.
        verdict: "ok" or "flagged".
        n: number of samples it is a share of.
        meaning: in words, what a flag says.
        reference: where the check comes from.
    """

    name: str
    value: float
    threshold: float
    verdict: Literal["ok", "flagged"]
    n: int
    meaning: str
    reference: str


def make_finding(
    name: str, value: float, threshold: float, n: int, meaning: str, reference: str
) -> Finding:
    """Flag a value above its threshold."""
    verdict: Literal["ok", "flagged"] = "flagged" if value > threshold else "ok"
    return Finding(name, value, threshold, verdict, n, meaning, reference)


def chance_finding(clean: Estimate, classes: int) -> Finding:
    """Judge whether a clean accuracy can be told from guessing: a broken setup shows there first.

    Its value is 1/`classes`, its threshold the lower end of the accuracy's 95% interval: a model
    that is right more seldom is flagged too.
    """
    return make_finding(
        "clean accuracy at chance",
        1 / classes,
        clean.low,
        clean.n,
        "clean accuracy cannot be told from guessing: check normalisation, labels and weights",
        "Carlini et al. 2019, section 4.1",
    )


def joined(parts: Sequence[Checks]) -> Checks:
    """Checks of all samples, from those of several batches; none where no sample was checked."""
    known = [part for part in parts if part]
    return {name: torch.cat([part[name] for part in known]) for name in next(iter(known), ())}


def masking_findings(checks: Checks) -> list[Finding]:
    """Judge the masking checks of all samples.

    The order is that in which to read them: a forward that is no function of one image, then
    gradients that vanish, then attacks that were too weak.
    """
    if not len(checks.get("survived", ())):
        return []
    return [*forward_findings(checks), *_gradient_findings(checks), *_attack_findings(checks)]


def forward_findings(checks: Checks) -> list[Finding]:
    """Judge the forward alone, by `forward_checks`."""
    if not len(checks["changes_when_repeated"]):
        return []
    return [
        _of_share(
            "stochastic forward",
            checks["changes_when_repeated"],
            0.05,
            "the same batch gives other logits when repeated: attack the mean over passes",
            "Athalye et al. 2018, section 4.2; Carlini et al. 2019, section 4.3",
        ),
        _of_share(
            "batch dependence",
            checks["changes_with_batch"],
            0.05,
            "logits depend on the other images of the batch, as with BatchNorm in train mode: "
            "model.eval()",
            "Carlini et al. 2019, section 4.10",
        ),
    ]


def _gradient_findings(checks: Checks) -> list[Finding]:
    n, spread = len(checks["survived"]), float(checks["logit_spread"].double().median())
    by_cross_entropy, by_margin = checks["survives_cross_entropy"], checks["survives_margin"]
    left, stuck = int(by_cross_entropy.sum()), int(checks["stuck_cross_entropy"].sum())
    return [
        _of_share(
            "zero-gradient share",
            checks["zero_gradient_cross_entropy"],
            0.05,
            "the cross-entropy has no gradient in the input: believe attacks on the margin alone",
            "Carlini et al. 2019, section 3.1; Pintor et al. 2022, indicator 1",
        ),
        _of_share(
            "zero-gradient share of the margin",
            checks["zero_gradient_margin"],
            0.05,
            "the margin has no gradient in the input: believe attacks without gradients (square) "
            "alone",
            "Athalye et al. 2018, section 3; Pintor et al. 2022, indicator 1",
        ),
        _of_share(
            "margin jumps",
            checks["margin_jumps"],
            0.05,
            "the margin moves otherwise than its gradient says: name the module at fault in bpda=",
            "Athalye et al. 2018, sections 3 and 4.1",
        ),
        _of_share(
            "saturation share",
            checks["saturated"],
            _SATURATED,
            "softmax is exactly one-hot: confidence hides how the loss curves; from the largest "
            f"to the smallest logit it is {spread:.3g} (median)",
            "Carlini and Wagner 2017, section V",
        ),
        make_finding(
            "cross-entropy gap",
            _share(by_cross_entropy) - _share(by_margin),
            max(_POINTS, _half_width(by_cross_entropy)),
            n,
            "plain-CE PGD-10 leaves more survivors than margin PGD-10: do not believe its number",
            "Walter et al. 2025; Carlini et al. 2019, section 4.3",
        ),
        make_finding(
            "loss not increased",
            stuck / max(1, left),
            # of few survivors a share says little: they must make up a noticeable accuracy too
            min(1.0, max(0.1, _POINTS * n / max(1, left))),
            left,
            "plain-CE PGD-10 ended no higher than it began on its survivors: do not believe its "
            "number",
            "Pintor et al. 2022, indicators 3 and 4",
        ),
    ]


def _attack_findings(checks: Checks) -> list[Finding]:
    return [
        _of_share(
            "weaker attack wins",
            checks["fooled_by_weaker"],
            0.02,
            "one step or noise fools what margin PGD-10 does not: gradients mislead, add square",
            "Athalye et al. 2018, section 3.1",
        ),
        _of_share(
            "black box wins",
            checks["fooled_by_black_box"],
            0.02,
            "a short Square attack fools survivors: gradients mislead, attack with standard-full",
            "Athalye et al. 2018, section 3.1; Croce and Hein 2020",
        ),
        _of_share(
            "unbounded attack fails",
            checks["survives_unbounded"],
            0.05,
            "margin PGD-10 allowed the whole box does not fool everything: add square",
            "Athalye et al. 2018, section 3.1; Carlini et al. 2019, section 4.2",
        ),
        _of_share(
            "larger budget wins",
            checks["fooled_by_budget"],
            _half_width(checks["survived"]),
            "APGD from another start fools survivors: the number is too high, give more steps",
            "Carlini et al. 2019, section 3.2; Pintor et al. 2022, indicator 5",
        ),
    ]


def _of_share(name: str, flags: Tensor, threshold: float, meaning: str, reference: str) -> Finding:
    """Finding about the share of samples that show a sign."""
    return make_finding(name, _share(flags), threshold, len(flags), meaning, reference)


def _share(flags: Tensor) -> float:
    return float(flags.double().mean())


def _half_width(flags: Tensor) -> float:
    """Half the width of the 95% interval of a share: a difference below it may be chance."""
    share = Estimate.share(int(flags.sum()), len(flags))
    return (share.high - share.low) / 2


_USUAL_GAP = 0.15  # one step of a large eps is a weak attack: PGD is this far below it as a rule


def catastrophic_overfitting(fgsm: Sequence[float], attacked: Sequence[float], n: int) -> Finding:
    r"""Judge a training by accuracy under one full step and under PGD, epoch by epoch.

    .. math:: \mathrm{FGSM} - \mathrm{PGD} > \max(0.15, \mathrm{FGSM}/2)

    Single-step adversarial training collapses when the model learns to withstand the one step it
    sees: PGD accuracy drops to 0 while FGSM accuracy stays high. A training is flagged when it is
    past its best PGD accuracy, where PGD fooled less than two thirds of the images that withstood
    the step; its FGSM accuracy is at most one standard error lower than there; and PGD fools most
    of these images now. Else nothing has collapsed, and the threshold is the FGSM accuracy.

    Wong, Rice and Kolter, "Fast is better than free", ICLR 2020; Andriushchenko and Flammarion,
    "Understanding and improving fast adversarial training", NeurIPS 2020.

    Args:
        fgsm: accuracy under one step of length eps, in [0, 1], the latest last.
        attacked: accuracy of the same images under PGD, at most that.
        n: number of images.

    Raises:
        ValueError: the two are empty, or not of one length.

    >>> catastrophic_overfitting([0.5, 0.6, 0.9], [0.4, 0.5, 0.0], n=100).verdict
    'flagged'
    """
    if not fgsm or len(fgsm) != len(attacked):
        raise ValueError(
            "expected accuracies under FGSM and PGD of the same epochs, "
            f"got {len(fgsm)} and {len(attacked)}"
        )
    value, best = fgsm[-1] - attacked[-1], attacked.index(max(attacked))
    least = fgsm[best] - (fgsm[best] * (1 - fgsm[best]) / n) ** 0.5
    was_robust = best < len(attacked) - 1 and attacked[best] > fgsm[best] / 3
    may_collapse = was_robust and fgsm[-1] >= least
    threshold = max(_USUAL_GAP, fgsm[-1] / 2) if may_collapse else fgsm[-1]
    return make_finding(
        "catastrophic overfitting",
        value,
        threshold,
        n,
        "the model withstands one step and several fool it: it is not robust",
        "Wong et al. 2020; Andriushchenko and Flammarion 2020",
    )
