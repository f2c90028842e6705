"""Labels, as class indices or probabilities, and the precision in which losses are taken.

Quantities that cancel are taken in float32 at least, whatever autocast hands out.
"""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from flatreg.models.entrance import as_labels, as_logits

IGNORE_NOTHING = torch.iinfo(torch.int64).min  # of F.cross_entropy, which drops -100 by default


def class_indices(labels: Tensor, reader: str, size: int | None = None) -> Tensor:
    """Labels of a reader that needs classes, int64 `(batch,)`; others are refused in its name.

    Args:
        labels: of any form.
        reader: that the message names.
        size: of the batch; left out, as many as there are labels.

    Raises:
        ValueError: the labels are probabilities, or as `as_labels`.
    """
    try:
        return as_labels(labels, len(labels) if size is None else size, probabilities=False)
    except ValueError as error:
        raise ValueError(f"{reader}: {error}") from error


def as_targets(labels: Tensor, logits: Tensor, *, read: bool | None = None) -> Tensor:
    """Labels as `F.cross_entropy` wants them: class indices, or probabilities as the logits are.

    Probabilities get the dtype of the logits, float32 at least. Indices are read if `read`; left
    out, on the CPU alone, where nothing waits for it. The kernels assert besides that they are in
    range.

    Raises:
        ValueError: as `as_labels`.
    """
    read = logits.device.type == "cpu" if read is None else read
    targets = as_labels(labels, *logits.shape, read=read)
    if not targets.is_floating_point():
        return targets
    return targets.to(torch.promote_types(logits.dtype, torch.float32))


def at_least_float32(tensor: Tensor) -> Tensor:
    """Cast half precision, as autocast hands it out, up to float32; keep float32 and float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def in_one_precision(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast tensors up to the widest dtype among them, float32 at least."""
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)
    return tuple(t.to(dtype) for t in tensors)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy per sample `(batch,)`, in float32 at least.

    Raises:
        ValueError: as `as_logits` and `as_targets`.
    """
    logits = as_logits(logits, len(labels))
    targets = as_targets(labels, logits)
    return F.cross_entropy(
        at_least_float32(logits), targets, reduction="none", ignore_index=IGNORE_NOTHING
    )
