"""What comes in: the outputs of a model and the labels of a batch, in one form.

Training, attacks, measures and evaluation check here, and so refuse the same in the same words.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flatreg.data.text import one_line

_FEW = 8  # images that tell what a model returns
# What models of transformers that read text or sound call their first argument.
_NO_IMAGES = ("input_ids", "inputs_embeds", "input_values", "input_features")
# How torch says that a layer got another dtype than its weights have.
_MIXED = re.compile(
    "have the same dtype|scalar type|mixed dtype|Input type .* type .* should be the same"
)
_ONE = 1e-5  # how far a row of probabilities may be from 1: float32 rounds 20,000 classes to 1e-6


def pass_copy(model: Callable[[Tensor], Any], inputs: Tensor) -> Any:
    """Outputs of a model at `inputs`, which stay as they are: it may normalise in place.

    Raises:
        ValueError: the model fails, and needs something else than a batch of images; it writes into
            images whose gradient is wanted, under `no_grad`, where torch does not refuse it.
        RuntimeError: the model fails, and needs images in another dtype.
    """
    try:
        if torch.is_grad_enabled() and inputs.is_leaf and inputs.requires_grad:
            try:  # torch refuses that of a leaf, and a compiled model prefers leaves
                version, outputs = _version(inputs), model(inputs)
                _check_unwritten(model, inputs, version)
                return outputs
            except RuntimeError as error:
                if "leaf Variable" not in str(error):
                    raise
        return model(inputs.clone())
    except Exception as error:  # of any kind: it depends on the model what it makes of images
        if _MIXED.search(str(error)):
            weights = model.parameters() if isinstance(model, nn.Module) else ()
            kinds = ", ".join(sorted({str(w.dtype) for w in weights})) or "none"
            # As torch has it: whoever tries another dtype then catches it so.
            raise RuntimeError(
                f"expected a model of {inputs.dtype} images, its pass mixes dtypes (weights: "
                f"{kinds}; {one_line(error)}): give both in one dtype; a forward that casts must "
                "cast to the dtype of the layer, as x.to(self.head.weight.dtype)"
            ) from error
        wanted = _wants_more(model, error)
        if not wanted:
            raise
        raise ValueError(
            f"expected a model of one batch of images, {wanted}: put it into a module whose "
            "forward takes the images alone and returns logits"
        ) from error


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # which an inference tensor has not


def _check_unwritten(model: object, inputs: Tensor, version: int) -> None:
    if _version(inputs) != version:
        raise ValueError(
            f"expected a forward that leaves its images as they are, that of "
            f"{type(model).__name__} writes into them under no_grad: write x = (x - mean) / std"
        )


def outside_inference(tensor: Tensor) -> Tensor:
    """The tensor without a graph; of one made in inference mode, which takes none, a copy."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _wants_more(model: Callable[[Tensor], Any], error: Exception) -> str:
    """What a model that failed wants besides images, or in their place; empty where it seems not.

    Models of text and images, and of text, may have a default for everything.
    """
    if isinstance(error, TypeError) and re.search(r"forward\(\) missing \d+ required", str(error)):
        return str(error)
    if isinstance(model, partial) and model.args:  # of torch.func.functional_call
        model = model.args[0]
    for module in model.modules() if isinstance(model, nn.Module) else ():
        try:
            names = list(inspect.signature(module.forward).parameters)
        except (TypeError, ValueError):  # of a compiled function, for one
            continue
        if names and names[0] in _NO_IMAGES:
            return f"{type(module).__name__} takes {names[0]} first"
        if "pixel_values" in names:
            break
    return ""


def logits_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """Logits `(batch, classes)` of a model at `inputs`, by `pass_copy`.

    Raises:
        ValueError: as `as_logits` and `check_finite`.
    """
    logits = as_logits(pass_copy(model, inputs), len(inputs))
    check_finite(logits, model)
    return logits


def check_classifier(model: nn.Module, inputs: Tensor) -> int:
    """Number of classes of a model whose outputs can be judged, by a pass of a few `inputs`.

    Raises:
        ValueError: as `logits_of` and `check_no_probabilities`; logits in half precision.
    """
    with torch.no_grad():
        logits = logits_of(model, inputs[:_FEW])
    if logits.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"verdicts are float32: the model returns {logits.dtype}, by an autocast of its own?"
        )
    check_no_probabilities(logits)
    return logits.shape[1]


def as_logits(outputs: object, size: int) -> Tensor:
    """The logits `(size, classes)` that a model returned for a batch of `size`, as they came.

    Those of a single sample may have lost the axis of the batch, as `squeeze()` leaves them.

    Raises:
        ValueError: the outputs are no tensor, or a sparse one, one of another shape, or of one
            class.
    """
    if not isinstance(outputs, Tensor):
        raise ValueError(
            f"expected logits ({size}, classes), the model returns a {type(outputs).__name__}: "
            "give flatreg.logits_only(model), or a module whose forward returns the logits alone"
        )
    if outputs.layout != torch.strided:
        raise ValueError(
            f"expected dense logits, the model returns {outputs.layout}: give logits.to_dense()"
        )
    logits = outputs[None] if outputs.ndim == 1 == size and len(outputs) > 1 else outputs
    shape = tuple(logits.shape)
    if shape in ((size,), (size, 1)):
        raise ValueError(
            f"expected logits of two classes or more, the model returns shape {shape}: "
            "give a single logit z as torch.stack([-z, z], 1).reshape(-1, 2) / 2"
        )
    if logits.ndim != 2 or len(logits) != size:
        raise ValueError(
            f"expected logits ({size}, classes), the model returns shape {tuple(outputs.shape)}"
        )
    if shape[1] < 2:
        raise ValueError(f"expected logits of two classes or more, the model returns shape {shape}")
    if not logits.is_floating_point():
        raise ValueError(f"expected floating logits, the model returns {logits.dtype}")
    return logits


def check_finite(logits: Tensor, model: nn.Module) -> None:
    """Refuse logits `(batch, classes)` that are nan or infinite; the host reads them.

    Raises:
        ValueError: some are; the message names the weight or buffer that is not finite, if there is
            one.
    """
    broken = int((~logits.isfinite()).any(1).sum())
    if broken:
        check_weights(model)
        name = non_finite_buffer(model)
        if name is not None:
            raise ValueError(
                f"expected finite logits, the buffer {name!r} of {type(model).__name__} holds "
                "nan: has its training diverged?"
            )
        raise ValueError(
            f"expected finite logits, the model returns nan or inf for {broken} of {len(logits)} "
            "images: look for a division, root or logarithm in it; leave masked classes out"
        )


@torch.no_grad()
def check_weights(model: nn.Module) -> None:
    """Refuse a model with a parameter that is nan or infinite; the host reads them all.

    Raises:
        ValueError: a parameter is, or was made in inference mode, of which no graph can be built.
    """
    if any(weight.is_inference() for weight in model.parameters()):
        raise ValueError(
            f"the weights of {type(model).__name__} were made inside torch.inference_mode, and "
            "have no gradients: build it outside, or give copy.deepcopy(model) made outside"
        )
    name = non_finite_weight(model)
    if name is not None:
        raise ValueError(
            f"expected finite weights, {name!r} of {type(model).__name__} holds nan or inf: "
            "has its training diverged?"
        )


@torch.no_grad()
def non_finite_weight(model: nn.Module) -> str | None:
    """Name of a parameter that holds nan or inf; None where there is none. The host reads them."""
    floating = ((name, p) for name, p in model.named_parameters() if p.is_floating_point())
    return next((name for name, p in floating if not bool(p.isfinite().all())), None)


@torch.no_grad()
def non_finite_buffer(model: nn.Module) -> str | None:
    """Name of a buffer that holds nan; an infinite one is legal: it masks attention."""
    floating = ((name, b) for name, b in model.named_buffers() if b.is_floating_point())
    return next((name for name, b in floating if bool(b.isnan().any())), None)


def check_no_probabilities(logits: Tensor) -> None:
    """Refuse outputs `(batch, classes)` that are probabilities; the host reads them.

    Softmax saturates, and a loss that takes logits would apply it twice.

    Raises:
        ValueError: every row lies in [0, 1] and sums to 1.

    >>> check_no_probabilities(torch.tensor([[0.25, 0.75]]))
    Traceback (most recent call last):
    ValueError: expected logits, the model returns probabilities (rows in [0, 1] that sum to 1): \
drop its softmax, or return the logarithm
    """
    inside = (logits >= 0).all() & (logits <= 1).all()
    if len(logits) and bool(inside & ((logits.sum(1) - 1).abs() < _ONE).all()):
        raise ValueError(
            "expected logits, the model returns probabilities (rows in [0, 1] that sum to 1): "
            "drop its softmax, or return the logarithm"
        )


def as_labels(
    labels: object,
    size: int,
    classes: int | None = None,
    *,
    read: bool = True,
    probabilities: bool = True,
) -> Tensor:
    """Labels of a batch of `size`: class indices `(size,)`, int64, or probabilities as they came.

    Indices of shape `(size, 1)` are flattened, floating ones that are whole numbers are converted.

    Args:
        labels: class indices, or floating `(size, classes)`: probabilities.
        size: of the batch.
        classes: of the model, where they are known.
        read: whether to read the values, for which the host waits on an accelerator.
        probabilities: whether these are labels too.

    Raises:
        ValueError: the labels are no tensor, of another shape, or not those of `classes` classes.
    """
    expected = f"labels: expected class indices ({size},)"
    if probabilities:
        expected += f" or probabilities ({size}, {classes or 'classes'})"
    if not isinstance(labels, Tensor):
        raise ValueError(f"{expected}, got a {type(labels).__name__}")
    shape = tuple(labels.shape)
    if labels.is_floating_point() and labels.ndim == 2 and shape[1] > 1:
        if not probabilities or shape != (size, classes or shape[1]):
            raise ValueError(f"{expected}, got probabilities of shape {shape}")
        return labels
    indices = labels[:, 0] if labels.ndim == 2 and shape[1] == 1 else labels
    if indices.shape != (size,) or indices.is_complex():
        hint = ": for one-hot labels give " + ("floats" if probabilities else "labels.argmax(1)")
        rows = labels.ndim == 2 and len(labels) == size
        raise ValueError(f"{expected}, got {labels.dtype} of shape {shape}{hint if rows else ''}")
    whole = indices.long()
    if read and indices.is_floating_point() and not bool((whole == indices).all()):
        raise ValueError(f"{expected}, got {labels.dtype} {shape} that are not whole")
    if read and size:
        low, high = (int(v) for v in torch.aminmax(whole))
        if low < 0 or high >= (classes or high + 1):
            wanted = f"0 to {classes - 1}" if classes else "0 or more"
            raise ValueError(f"labels: expected {wanted}, got {low} to {high}")
    return whole
