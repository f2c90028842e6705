"""Can this attacked accuracy be believed? Findings that fire where gradients hide the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic.dataclasses import dataclass
from torch import Tensor

Checks = dict[str, Tensor]

_POINTS = 0.05  # of accuracy: what a finding must move at least to be worth a flag
# Two pretrained CIFAR ResNets have 0.30 and 0.35 as they are; of five plain models with ten times
# the logits the least is 0.48, benchmarks/findings.json. A thin line, drawn after seeing them.
_SATURATED = 0.43


@dataclass(frozen=True)
class Finding:
    """One check: flagged when its value exceeds the threshold.

    Attributes:
        name: which check.
        value: share of the samples in [0, 1].
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


def masking_findings(evidence: Mapping[str, Tensor]) -> list[Finding]:
    """Judge the evidence of all samples, as `flatreg.evaluation.masking` observes it.

    The order is that in which to read them: a forward that is no function of one image, then
    gradients that vanish, then attacks that were too weak.
    """
    if not len(evidence["survived"]):
        return []
    return [
        *forward_findings(evidence),
        *_gradient_findings(evidence),
        *_attack_findings(evidence),
    ]


def forward_findings(evidence: Mapping[str, Tensor]) -> list[Finding]:
    """Judge the forward alone, by the evidence of `forward_checks`."""
    n = len(evidence["changes_when_repeated"])
    if not n:
        return []
    return [
        make_finding(
            "stochastic forward",
            _share(evidence["changes_when_repeated"]),
            0.05,
            n,
            "the same batch gives other logits when repeated: attack the mean over passes",
            "Athalye et al. 2018, section 4.2; Carlini et al. 2019, section 4.3",
        ),
        make_finding(
            "batch dependence",
            _share(evidence["changes_with_batch"]),
            0.05,
            n,
            "logits depend on the other images of the batch, as with BatchNorm in train mode",
            "Carlini et al. 2019, section 4.10",
        ),
    ]


def _gradient_findings(evidence: Mapping[str, Tensor]) -> list[Finding]:
    n = len(evidence["survived"])
    spread = float(evidence["logit_spread"].double().median())
    by_loss = {loss: evidence[f"survives_{loss}"] for loss in ("cross_entropy", "margin")}
    left, stuck = int(by_loss["cross_entropy"].sum()), int(evidence["stuck_cross_entropy"].sum())
    return [
        make_finding(
            "zero-gradient share",
            _share(evidence["zero_gradient_cross_entropy"]),
            0.05,
            n,
            "the cross-entropy has no gradient in the input: attacks that climb it stand still",
            "Carlini et al. 2019, section 3.1; Pintor et al. 2022, indicator 1",
        ),
        make_finding(
            "zero-gradient share of the margin",
            _share(evidence["zero_gradient_margin"]),
            0.05,
            n,
            "the margin has no gradient in the input: no attack by gradients says anything",
            "Athalye et al. 2018, section 3; Pintor et al. 2022, indicator 1",
        ),
        make_finding(
            "saturation share",
            _share(evidence["saturated"]),
            _SATURATED,
            n,
            "softmax is exactly one-hot: confidence hides how the loss curves; from the largest "
            f"to the smallest logit it is {spread:.3g} (median)",
            "Carlini and Wagner 2017, section V",
        ),
        make_finding(
            "cross-entropy gap",
            _share(by_loss["cross_entropy"]) - _share(by_loss["margin"]),
            max(_POINTS, _half_width(left, n)),
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


def _attack_findings(evidence: Mapping[str, Tensor]) -> list[Finding]:
    survived = evidence["survived"]
    n, noise = len(survived), _half_width(int(survived.sum()), len(survived))
    return [
        make_finding(
            "weaker attack wins",
            _share(evidence["falls_to_weaker"]),
            0.02,
            n,
            "one step or noise fools what margin PGD-10 does not: its gradients mislead",
            "Athalye et al. 2018, section 3.1",
        ),
        make_finding(
            "black box wins",
            _share(evidence["falls_to_black_box"]),
            0.02,
            n,
            "a short Square attack fools survivors: gradients do not lead to what is there",
            "Athalye et al. 2018, section 3.1; Croce and Hein 2020",
        ),
        make_finding(
            "unbounded attack fails",
            _share(evidence["survives_unbounded"]),
            0.05,
            n,
            "margin PGD-10 allowed the whole box does not fool everything: it gets stuck",
            "Athalye et al. 2018, section 3.1; Carlini et al. 2019, section 4.2",
        ),
        make_finding(
            "larger budget wins",
            _share(evidence["falls_to_budget"]),
            noise,
            n,
            "APGD from another start fools survivors: the number has not converged",
            "Carlini et al. 2019, section 3.2; Pintor et al. 2022, indicator 5",
        ),
    ]


def _share(flags: Tensor) -> float:
    return float(flags.double().mean())


def _half_width(count: int, n: int) -> float:
    """Half the width of the Wilson 95% interval of a share."""
    from scipy.stats import binomtest  # a second to import

    interval = binomtest(count, n).proportion_ci(method="wilson")
    return float(interval.high - interval.low) / 2


_USUAL_GAP = 0.15  # one step of a large eps is a weak attack: PGD is this far below it as a rule


def catastrophic_overfitting(fgsm: Sequence[float], attacked: Sequence[float], n: int) -> Finding:
    r"""Judge a training by accuracy under one full step and under PGD, epoch by epoch.

    .. math:: \mathrm{FGSM} - \mathrm{PGD} > \max(0.15, \mathrm{FGSM}/2)

    Single-step adversarial training collapses when the model learns to withstand the one step it
    sees: PGD accuracy falls to 0 while FGSM accuracy stays high. Flagged is a training past its
    best PGD accuracy, with no less FGSM accuracy than there, in which most of what withstands the
    step falls to PGD. Elsewhere (in the first epoch; at a new best; in a plain training, which
    loses both) nothing has collapsed, and the threshold is the FGSM accuracy, which the gap cannot
    exceed.

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
    return Finding(
        "catastrophic overfitting",
        value,
        threshold,
        "flagged" if value > threshold else "ok",
        n,
        "the model withstands one step and falls to several: it is not robust",
        "Wong et al. 2020; Andriushchenko and Flammarion 2020",
    )
