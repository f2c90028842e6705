"""Masking checks: observe, sample by sample, the signs that an attacked accuracy is too high."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flatreg.attacks.apgd import apgd
from flatreg.attacks.cascade import attack_rows, run_stages
from flatreg.attacks.options import Attack
from flatreg.attacks.pgd import fgsm, noise, pgd
from flatreg.attacks.query import QueriedModel
from flatreg.attacks.square import square
from flatreg.data.loading import Batch
from flatreg.evaluation.findings import Checks
from flatreg.models.state import derived_seed
from flatreg.threat import Threat, whole_box

_STEPS = 10  # of PGD, plain and on the margin
_DRAWS = 10  # of noise: what a forward with masked gradients loses, it loses to the first few
_QUERIES = 60  # of Square: enough to fool a model whose gradients hide, and few robust ones
_BUDGET = 40  # steps of APGD from another start
_REPEATED = 1e-4  # of the spread of the logits: the same kernels on the same batch agree to this
_REGROUPED = 1e-2  # other batch sizes take other kernels, which TF32 lets differ by 1e-3


def masking_checks(
    model: nn.Module,
    batch: Batch,
    threat: Threat,
    *,
    seed: int,
    survived: Tensor,
    batch_size: int | None = None,
) -> Checks:
    """Observe the signs of masked gradients and of attacks too weak; one number a sample.

    Every array is `(batch,)`, booleans but for `logit_spread`, so that the checks of several
    batches or processes are concatenated and then judged by `masking_findings`.

    A sample that nothing fools is passed forward 155 times and backward 73 times: for the checks
    of the forward (4 forward), gradients (3 and 2), PGD on the cross-entropy (13 and 10) and on
    the margin (11 and 10), one step and noise (12 and 1), Square (60), an unbounded attack (11 and
    10 at most) and APGD from another start (41 and 40). Every attack stops at a sample when it is
    fooled: one that is fooled within two steps takes about 20 forward and 10 backward.

    Args:
        model: images in [0,1] to logits, in eval mode.
        batch: correctly classified samples.
        threat: of the attacked accuracy; its own attacks are not run.
        seed: of random starts, kept apart from those of the cascade by another stream.
        survived: `(batch,)`: which samples withstood the attacks whose number is to be believed.
        batch_size: samples at a time, halved where memory runs out; left out, all.

    Raises:
        ValueError: the model returns probabilities; as in `flatreg.attacks.pgd`.
    """
    inputs, labels, survived = batch.inputs, batch.labels.long(), survived.bool()
    queried = QueriedModel(model, batch_size)

    def fooled(attack: Attack, among: Tensor, eps: float = threat.eps) -> Tensor:
        """Which of the samples `among` these an attack fools, from starts that are not repeated."""

        def stage(number: int, attack: Attack, rows: Tensor) -> Tensor:
            options = dict(norm=threat.norm, seed=derived_seed(seed, 2**31), batch_size=batch_size)
            return attack_rows(attack, model, batch, rows, eps=eps, **options).fooled

        return run_stages((attack,), among, stage) >= 0

    checks = forward_checks(model, inputs, batch_size=batch_size)
    checks |= _gradient_checks(queried, inputs, labels)
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
    )
    stuck, rows = torch.zeros_like(survived), ~plain.fooled
    if bool(rows.any()):
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
    first = queried.logits(inputs)
    check_logits(first)
    again = queried.logits(inputs)
    # A sample and its negative side by side, so that every part of the batch has both.
    pairs = rearrange([1 - inputs, inputs], "two n ... -> (n two) ...")
    together = QueriedModel(model, None if batch_size is None else max(2, batch_size))
    among = rearrange(together.logits(pairs), "(n two) c -> two n c", two=2)[1]
    spread = (first.amax(1) - first.amin(1)).clamp_min(torch.finfo(first.dtype).tiny)
    repeated = (again - first).abs().amax(1) > _REPEATED * spread
    regrouped = (among - first).abs().amax(1) > _REGROUPED * spread
    # Logits that change by themselves say nothing about the other images of the batch.
    return {"changes_when_repeated": repeated, "changes_with_batch": regrouped & ~repeated}


def check_logits(logits: Tensor) -> None:
    """Refuse what is no logits: probabilities saturate, and losses would take softmax twice.

    Raises:
        ValueError: every row lies in [0, 1] and sums to 1; there is one class; half
            precision, as an autocast inside the forward returns.

    >>> check_logits(torch.tensor([[0.25, 0.75]]))
    Traceback (most recent call last):
    ValueError: expected logits, the model returns probabilities (rows in [0, 1] that sum to 1): \
drop its softmax, or return the logarithm
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"expected logits (batch, classes) of two classes at least, got {tuple(logits.shape)}"
        )
    if logits.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"verdicts are float32: the model returns {logits.dtype}, by an autocast of its own?"
        )
    inside = bool(((logits >= 0) & (logits <= 1)).all())
    if len(logits) and inside and bool(((logits.sum(1) - 1).abs() < 1e-3).all()):
        raise ValueError(
            "expected logits, the model returns probabilities (rows in [0, 1] that sum to 1): "
            "drop its softmax, or return the logarithm"
        )


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
