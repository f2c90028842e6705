"""Catastrophic overfitting: single-step adversarial training that withstands one step alone."""

from __future__ import annotations

from collections.abc import Sequence

from flatreg.evaluation.findings import Finding

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
        "catastrophic overfitting", value, threshold, "flagged" if value > threshold else "ok", n,
        "the model withstands one step and falls to several: it is not robust",
        "Wong et al. 2020; Andriushchenko and Flammarion 2020",
    )  # fmt: skip
