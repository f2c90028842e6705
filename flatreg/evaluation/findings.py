"""Findings: can this attacked accuracy be believed, or do gradients hide adversarial images?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic.dataclasses import dataclass
from torch import Tensor

from flatreg.measures.estimate import Estimate

Checks = dict[str, Tensor]
"""What `flatreg.evaluation.masking` observes: for each check its name and one entry a sample."""

_POINTS = 0.05  # of accuracy: what a finding must move at least to be worth a flag
# Two pretrained CIFAR ResNets have 0.30 and 0.35 as they are; of five plain models with ten times
# the logits the least is 0.48, benchmarks/findings.json. A thin line, drawn after seeing them.
_SATURATED = 0.43


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


def masking_findings(checks: Checks) -> list[Finding]:
    """Judge the masking checks of all samples.

    The order is that in which to read them: a forward that is no function of one image, then
    gradients that vanish, then attacks that were too weak.
    """
    if not len(checks["survived"]):
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
            "logits depend on the other images of the batch, as with BatchNorm in train mode",
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
            "the cross-entropy has no gradient in the input: attacks that climb it stand still",
            "Carlini et al. 2019, section 3.1; Pintor et al. 2022, indicator 1",
        ),
        _of_share(
            "zero-gradient share of the margin",
            checks["zero_gradient_margin"],
            0.05,
            "the margin has no gradient in the input: no attack by gradients says anything",
            "Athalye et al. 2018, section 3; Pintor et al. 2022, indicator 1",
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
            "plain-CE PGD-10 leaves more survivors than margin PGD-10: flatness fools it",
            "Walter et al. 2025; Carlini et al. 2019, section 4.3",
        ),
        make_finding(
            "loss not increased",
            stuck / max(1, left),
            # of few survivors a share says little: they must make up a noticeable accuracy too
            min(1.0, max(0.1, _POINTS * n / max(1, left))),
            left,
            "plain-CE PGD-10 ended no higher than it began on its survivors: it did not move",
            "Pintor et al. 2022, indicators 3 and 4",
        ),
    ]


def _attack_findings(checks: Checks) -> list[Finding]:
    return [
        _of_share(
            "weaker attack wins",
            checks["fooled_by_weaker"],
            0.02,
            "one step or noise fools what margin PGD-10 does not: its gradients mislead",
            "Athalye et al. 2018, section 3.1",
        ),
        _of_share(
            "black box wins",
            checks["fooled_by_black_box"],
            0.02,
            "a short Square attack fools survivors: gradients do not lead to what is there",
            "Athalye et al. 2018, section 3.1; Croce and Hein 2020",
        ),
        _of_share(
            "unbounded attack fails",
            checks["survives_unbounded"],
            0.05,
            "margin PGD-10 allowed the whole box does not fool everything: it gets stuck",
            "Athalye et al. 2018, section 3.1; Carlini et al. 2019, section 4.2",
        ),
        _of_share(
            "larger budget wins",
            checks["fooled_by_budget"],
            _half_width(checks["survived"]),
            "APGD from another start fools survivors: the number has not converged",
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
    past its best PGD accuracy, has no less FGSM accuracy than it had there, and PGD fools most of
    the images that withstand the step. Elsewhere (in the first epoch; at a new best; in a plain
    training, which loses both) nothing has collapsed, and the threshold is the FGSM accuracy, which
    the gap cannot exceed.

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
    past_best = best < len(attacked) - 1 and fgsm[-1] >= fgsm[best]
    threshold = max(_USUAL_GAP, fgsm[-1] / 2) if past_best else fgsm[-1]
    return make_finding(
        "catastrophic overfitting",
        value,
        threshold,
        n,
        "the model withstands one step and several fool it: it is not robust",
        "Wong et al. 2020; Andriushchenko and Flammarion 2020",
    )
