"""Losses of passes, per sample, that several criteria share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from flatreg.forward import Forward
from flatreg.labels import as_targets
from flatreg.precision import at_least_float32


def cross_entropy(at: Forward) -> Tensor:
    """Cross-entropy `(batch,)`, in the precision of the pass.

    Raises:
        ValueError: the labels are probabilities of other classes than the logits are.
    """
    return F.cross_entropy(at.logits, as_targets(at.labels, at.logits), reduction="none")


def log_probabilities(at: Forward) -> Tensor:
    """Log-probabilities `(batch, classes)`, in float32 at least."""
    return at_least_float32(at.logits).log_softmax(1)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum_k p_k (log p_k - log q_k) `(batch,)`, differentiable in both."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
