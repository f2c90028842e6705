"""Observe, sample by sample, the signs that an attacked accuracy flatters its model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flatreg.attacks.apgd import apgd
from flatreg.attacks.options import Attack
from flatreg.attacks.pgd import fgsm, noise, pgd
from flatreg.attacks.query import QueriedModel
from flatreg.attacks.square import square
from flatreg.evaluation.findings import Checks
from flatreg.models.state import derived_seed
from flatreg.threat import Norm, check_norm, whole_box

_STEPS = 10  # of PGD, plain and on the margin
_DRAWS = 10  # of noise: what a forward with masked gradients loses, it loses to the first few
_QUERIES = 60  # of Square: enough to fool a model whose gradients hide, and few robust ones
_BUDGET = 40  # steps of APGD from another start
_REPEATED = 1e-4  # of the spread of the logits: the same kernels on the same batch agree to this
_REGROUPED = 1e-2  # other batch sizes take other kernels, which TF32 lets differ by 1e-3


def masking_checks(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float,
    norm: str = "linf",
    seed: int,
    indices: Sequence[int],
    survived: Tensor,
    batch_size: int | None = None,
) -> Checks:
    """Observe the signs of masked gradients and of attacks too weak; one number a sample.

    Every array is `(batch,)`, booleans but for `logit_spread`, so that the evidence of several
    batches or processes is concatenated and then judged by `masking_findings`.

    A sample that nothing fools is passed forward 155 times and backward 73 times: for the guards
    of the forward (4 forward), gradients (3 and 2), PGD on the cross-entropy (13 and 10) and on
    the margin (11 and 10), one step and noise (12 and 1), Square (60), an unbounded attack (11 and
    10 at most) and APGD from another start (41 and 40). In every attack a sample leaves when it is
    fooled: one that falls within two steps takes about 20 forward and 10 backward.

    Args:
        model: images in [0,1] to logits, in eval mode.
        inputs: correctly classified samples `(batch, ...)`.
        labels: `(batch,)`.
        eps: radius in [0,1] pixel units.
        norm: "linf", "l2" or "l1".
        seed: of random starts, kept apart from those of the cascade by another stream.
        indices: identity of each sample.
        survived: `(batch,)`: which samples withstood the attacks whose number is to be believed.
        batch_size: samples at a time, halved where memory runs out; left out, all.

    Raises:
        ValueError: the model returns probabilities; as in `flatreg.attacks.pgd`.
    """
    known, labels = check_norm(norm), labels.long()
    observed = forward_checks(model, inputs, batch_size=batch_size)
    fooled = partial(
        _fooled,
        model=model,
        inputs=inputs,
        labels=labels,
        norm=known,
        indices=indices,
        # The cascade's stages are streams 0, 1, ...: a diagnosis must not repeat their starts.
        seed=derived_seed(seed, 2**31),
        batch_size=batch_size,
    )
    everyone, survived = torch.ones_like(survived), survived.bool()
    observed |= _slopes(model, inputs, labels, batch_size)
    observed |= _cross_entropy_attack(
        model, inputs, labels, eps=eps, norm=known, indices=indices, batch_size=batch_size
    )
    margin = partial(pgd, steps=_STEPS, loss="margin")
    withstood = ~fooled(margin, everyone, eps=eps)
    weaker = fooled(partial(fgsm, loss="margin"), withstood, eps=eps)
    weaker |= fooled(partial(noise, draws=_DRAWS), withstood & ~weaker, eps=eps)
    return observed | {
        "survived": survived,
        "survives_margin": withstood,
        "falls_to_weaker": weaker,
        "falls_to_black_box": fooled(partial(square, queries=_QUERIES), survived, eps=eps),
        "survives_unbounded": ~fooled(margin, everyone, eps=whole_box(inputs, known)),
        "falls_to_budget": fooled(partial(apgd, steps=_BUDGET, loss="margin"), survived, eps=eps),
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
    victim = QueriedModel(model, batch_size)
    first = victim.logits(inputs)
    check_logits(first)
    again = victim.logits(inputs)
    # A sample and its negative side by side, so that every part of the batch has both.
    pairs = rearrange([1 - inputs, inputs], "two n ... -> (n two) ...")
    together = QueriedModel(model, None if batch_size is None else max(2, batch_size))
    among = rearrange(together.logits(pairs), "(n two) c -> two n c", two=2)[1]
    spread = (first.amax(1) - first.amin(1)).clamp_min(torch.finfo(first.dtype).tiny)
    repeated = (again - first).abs().amax(1) > _REPEATED * spread
    regrouped = (among - first).abs().amax(1) > _REGROUPED * spread
    # What changes by itself says nothing about the company it is in.
    return {"changes_when_repeated": repeated, "changes_with_batch": regrouped & ~repeated}


def check_logits(logits: Tensor) -> None:
    """Refuse what is no logits: probabilities saturate, and losses would take softmax twice.

    Raises:
        ValueError: every row lies in [0, 1] and sums to 1; there are not two classes; half
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


def _slopes(model: nn.Module, inputs: Tensor, labels: Tensor, batch_size: int | None) -> Checks:
    """Gradients at the images as they are: are they zero, and is softmax one-hot?"""
    victim = QueriedModel(model, batch_size)
    logits = victim.logits(inputs)
    zero = {}
    for loss in ("cross_entropy", "margin"):
        slope = victim.query(inputs, labels, loss).gradient.abs().flatten(1).amax(1)
        zero[f"zero_gradient_{loss}"] = slope < torch.finfo(slope.dtype).tiny  # or subnormal
    return zero | {
        "saturated": F.softmax(logits, 1).amax(1) == 1,
        "logit_spread": logits.amax(1) - logits.amin(1),
    }


def _cross_entropy_attack(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float,
    norm: Norm,
    indices: Sequence[int],
    batch_size: int | None,
) -> Checks:
    """Plain cross-entropy PGD: who withstands it, and whose loss it did not even raise."""
    result = pgd(
        model,
        inputs,
        labels,
        eps=eps,
        norm=norm,
        steps=_STEPS,
        loss="cross_entropy",
        indices=indices,
        batch_size=batch_size,
    )
    stuck, rows = torch.zeros_like(result.fooled), ~result.fooled
    victim = QueriedModel(model, batch_size)
    if bool(rows.any()):
        at = (
            victim.query(x[rows], labels[rows], "cross_entropy", gradient=False).value
            for x in (result.inputs, inputs)
        )
        end, start = at
        stuck[rows] = ~(end > start)
    return {"survives_cross_entropy": rows, "stuck_cross_entropy": stuck}


def _fooled(
    attack: Attack,
    among: Tensor,
    *,
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    eps: float,
    norm: Norm,
    seed: int,
    indices: Sequence[int],
    batch_size: int | None,
) -> Tensor:
    """Which of the samples `among` these `(batch,)` an attack fools."""
    fooled, rows = torch.zeros_like(among), among.nonzero().flatten()
    if len(rows):
        fooled[rows] = attack(
            model,
            inputs[rows],
            labels[rows],
            eps=eps,
            norm=norm,
            seed=seed,
            indices=[indices[row] for row in rows.tolist()],
            batch_size=batch_size,
        ).fooled
    return fooled
