"""Can this attacked accuracy be believed? Findings that fire where gradients hide the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from scipy.stats import binomtest
from torch import Tensor, nn

from flatreg.attacks.pgd import pgd
from flatreg.attacks.victim import climb

Evidence = dict[str, Tensor]

_USUAL_GAP = 0.15  # one step of a large eps is a weak attack: PGD is this far below it as a rule


@dataclass(frozen=True)
class Finding:
    """One check: flagged when its value exceeds the threshold.

    Attributes:
        name: which check.
        value: share of the samples in [0, 1].
        threshold: above it the check flags.
        verdict: "ok" or "flagged".
        n: number of correctly classified samples it was taken on.
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


def masking_evidence(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float,
    seed: int,
    indices: Sequence[int],
) -> Evidence:
    """Observe, sample by sample, the signs of masked gradients; every array is `(batch,)` booleans.

    Args:
        model: images in [0,1] to logits, in eval mode.
        inputs: correctly classified samples `(batch, ...)`.
        labels: `(batch,)`.
        eps: radius in [0,1] pixel units.
        seed: of the attacks, as in `flatreg.attacks.pgd`.
        indices: identity of each sample.
    """
    _, gradient, _ = climb(model, inputs, labels, "cross_entropy")
    tiny = torch.finfo(gradient.dtype).tiny  # below it numbers are subnormal and lose their digits
    with torch.no_grad():
        top = F.softmax(model(inputs), dim=1).amax(1)
    by_loss = {
        loss: ~pgd(model, inputs, labels, eps=eps, loss=loss, seed=seed, indices=indices).fooled
        for loss in ("cross_entropy", "margin")
    }
    return {
        "zero_gradient": gradient.abs().flatten(1).amax(1) < tiny,
        "saturated": top == 1,
        "survives_cross_entropy": by_loss["cross_entropy"],
        "survives_margin": by_loss["margin"],
    }


def masking_findings(evidence: Mapping[str, Tensor]) -> list[Finding]:
    """Judge the evidence of all samples."""
    n = len(evidence["saturated"])
    if n == 0:
        return []
    share = {name: float(values.float().mean()) for name, values in evidence.items()}
    interval = binomtest(int(evidence["survives_cross_entropy"].sum()), n).proportion_ci(
        method="wilson"
    )

    def finding(name: str, value: float, threshold: float, meaning: str, reference: str) -> Finding:
        verdict: Literal["ok", "flagged"] = "flagged" if value > threshold else "ok"
        return Finding(name, value, threshold, verdict, n, meaning, reference)

    return [
        finding(
            "zero-gradient share", share["zero_gradient"], 0.05,
            "the cross-entropy has no gradient in the input: attacks that climb it stand still",
            "Carlini et al. 2019, section 3.1; Pintor et al. 2022, indicator 1",
        ),
        finding(
            "saturation share", share["saturated"], 0.25,
            "softmax is exactly one-hot: confidence hides how the loss curves",
            "Carlini and Wagner 2017, section V",
        ),
        finding(
            "cross-entropy gap", share["survives_cross_entropy"] - share["survives_margin"],
            max(0.05, (interval.high - interval.low) / 2),
            "plain-CE PGD-10 leaves more survivors than margin PGD-10: flatness fools it",
            "Walter et al. 2025; Carlini et al. 2019, section 4.3",
        ),
    ]  # fmt: skip


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
        "catastrophic overfitting", value, threshold, "flagged" if value > threshold else "ok", n,
        "the model withstands one step and falls to several: it is not robust",
        "Wong et al. 2020; Andriushchenko and Flammarion 2020",
    )  # fmt: skip
