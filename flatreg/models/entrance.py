"""What comes in: the outputs of a model and the labels of a batch, in one form.

Training, attacks, measures and evaluation check here, and so refuse the same in the same words.
"""

from __future__ import annotations

import torch
from torch import Tensor


def as_logits(outputs: object, size: int) -> Tensor:
    """The logits `(size, classes)` that a model returned for a batch of `size`, as they came.

    Raises:
        ValueError: the outputs are no tensor, or one of another shape, or of one class.
    """
    if not isinstance(outputs, Tensor):
        raise ValueError(
            f"expected logits ({size}, classes), the model returns a {type(outputs).__name__}: "
            "wrap it in a module whose forward returns the logits alone"
        )
    if outputs.ndim != 2 or len(outputs) != size:
        raise ValueError(
            f"expected logits ({size}, classes), the model returns shape {tuple(outputs.shape)}"
        )
    if outputs.shape[1] < 2:
        raise ValueError(
            f"expected logits of two classes or more, the model returns shape "
            f"{tuple(outputs.shape)}: give a single logit z as torch.cat([-z, z], 1) / 2"
        )
    if not outputs.is_floating_point():
        raise ValueError(f"expected floating logits, the model returns {outputs.dtype}")
    return outputs


def as_labels(
    labels: object, size: int, classes: int | None = None, *, read: bool = True
) -> Tensor:
    """Labels of a batch of `size`: class indices `(size,)`, int64, or probabilities as they came.

    Indices of shape `(size, 1)` are flattened, floating ones that are whole numbers are converted.

    Args:
        labels: class indices, or floating `(size, classes)`: probabilities.
        size: of the batch.
        classes: of the model, where they are known.
        read: whether to read the values, for which the host waits on an accelerator.

    Raises:
        ValueError: the labels are no tensor, of another shape, or not those of `classes` classes.
    """
    expected = f"labels: expected class indices ({size},) or probabilities ({size}, classes)"
    if not isinstance(labels, Tensor):
        raise ValueError(f"{expected}, got a {type(labels).__name__}")
    if labels.is_floating_point() and labels.ndim == 2 and labels.shape[1] > 1:
        if len(labels) != size or labels.shape[1] != (classes or labels.shape[1]):
            raise ValueError(
                f"{expected.replace('classes)', f'{classes})') if classes else expected}, "
                f"got {tuple(labels.shape)}"
            )
        return labels
    indices = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if indices.shape != (size,) or indices.is_complex():
        hint = ": give one-hot labels as floats" if labels.ndim == 2 and len(labels) == size else ""
        raise ValueError(f"{expected}, got {labels.dtype} of shape {tuple(labels.shape)}{hint}")
    whole = indices.long()
    if read and indices.is_floating_point() and not bool((whole == indices).all()):
        raise ValueError(f"{expected}, got {labels.dtype} {tuple(labels.shape)} that are not whole")
    if read and size:
        low, high = (int(v) for v in torch.aminmax(whole))
        if low < 0 or high >= (classes or high + 1):
            wanted = f"0 to {classes - 1}" if classes else "0 or more"
            raise ValueError(f"labels: expected {wanted}, got {low} to {high}")
    return whole
