"""Weights in files of others: safetensors, or what `torch.save` wrote; no code of theirs runs."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flatreg.data.files import check_ordinary
from flatreg.data.text import one_line, shown

_KEYS = (  # under which scripts of training save a state dict, beside the optimizer's
    *("state_dict", "model_state_dict", "model_state", "model", "net"),
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema"),
)
_WRAPPERS = ("module.", "_orig_mod.")  # DataParallel and DDP; torch.compile
_NORMALISATIONS = (("mean", "std"), ("mu", "sigma"), ("new_mean", "new_std"), ("_mean", "_std"))
_ATTACKER = ".attacker."  # of the package robustness: the model once more
_SUFFIXES = (".pth", ".pt", ".ckpt", ".tar", ".bin")
# What scripts save beside the weights, and what makes nothing but values: settings, accuracies.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")),
    *(
        (np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar")
        for core in ("core", "_core")
    ),
]


class Weights(NamedTuple):
    """Weights by the names of their network, and the normalisation that was saved with them.

    Attributes:
        state: tensors by name, without the prefixes of wrappers.
        mean, std: per channel, of images in [0,1]; None where the file holds no normalisation.
    """

    state: dict[str, Tensor]
    mean: list[float] | None
    std: list[float] | None


def read_weights(file: str, key: str | None = None) -> Weights:
    """Read the state dict of a network: `.safetensors`, or a file of `torch.save`.

    A state dict may lie under one of the usual keys (state_dict, model_state_dict, model_state,
    model, net, and those of an average: ema, model_ema, state_dict_ema); `key` chooses one. Names
    lose the prefixes of wrappers (module., _orig_mod.). Buffers mean and std, or mu and sigma, of a
    layer that has nothing else are its normalisation, and so are lists of these names beside it.

    Raises:
        ValueError: there is no such file, or it is no file of weights; it holds objects that are
            no tensors and plain values, which are not unpickled; it holds several state dicts and
            `key` chooses none.
    """
    path = Path(file).expanduser()
    if not path.exists():
        raise ValueError(f"weights: expected a file of weights, found none at {shown(file)}")
    if path.is_dir():
        raise ValueError(f"weights: expected a file of weights, {shown(file)} is a folder")
    check_ordinary(path)
    whole = _safetensors(path) if path.suffix == ".safetensors" else _saved_by_torch(path)
    state = _state_dict(whole, key, file)
    named: dict[str, Tensor] = {}
    for name, tensor in state.items():
        bare = name
        while bare.startswith(_WRAPPERS):
            bare = bare.partition(".")[2]
        if bare in named and not torch.equal(named[bare], tensor):
            raise ValueError(
                f"weights: {shown(file)} holds two tensors for {one_line(bare, 80)}, one of them "
                f"as {one_line(name, 80)}: save the state dict of one network"
            )
        named[bare] = tensor
    own = {n: t for n, t in named.items() if _ATTACKER not in f".{n}"}
    named, mean, std = _split_off_normalisation(own or named, file)
    beside = _normalisation_beside(whole, state)
    if mean is not None and beside is not None and beside != (mean, std):
        raise ValueError(
            f"weights: {shown(file)} holds one normalisation in the state dict and another beside "
            "it: save one of them"
        )
    return Weights(named, *(beside or (mean, std)))


def _normalisation_beside(
    whole: Mapping[str, Any], state: Mapping[str, Any]
) -> tuple[list[float], list[float]] | None:
    """Two lists or tensors of numbers that were saved beside the state dict."""
    for names in _NORMALISATIONS:
        pair = [whole.get(name) for name in names if name not in state]
        if all(isinstance(value, (list, tuple, Tensor)) for value in pair) and len(pair) == 2:
            mean, std = (torch.as_tensor(value).flatten().tolist() for value in pair)
            return mean, std
    return None


def renamed(state: dict[str, Tensor], own: Mapping[str, Any]) -> dict[str, Tensor]:
    """Without a first part that all names share (`model.`), where no name is one of the network."""
    while state and not state.keys() & own.keys():
        first = {name.partition(".")[0] for name in state}
        if len(first) > 1 or first & state.keys():
            break
        state = {name.partition(".")[2]: tensor for name, tensor in state.items()}
    return state


def nearest(name: str, known: Iterable[str]) -> str:
    """The hint `; the nearest name is NAME`, or nothing where none is near."""
    found = difflib.get_close_matches(name, list(known), 1, cutoff=0.5)
    return f"; the nearest name is {one_line(found[0])}" if found else ""


def _safetensors(path: Path) -> dict[str, Any]:
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"weights: {shown(path)} is not a safetensors file: {one_line(error)}"
        ) from error


def _saved_by_torch(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            whole = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of any kind: it depends on where the file is damaged
        _, refused, name = str(error).partition("GLOBAL ")
        if refused:
            raise ValueError(
                f"weights: {shown(path)} holds more than tensors ({one_line(name.split(' ')[0])}), "
                "and nothing is unpickled: save its state_dict alone, with torch.save or "
                "safetensors"
            ) from error
        raise ValueError(
            f"weights: {shown(path)} is no file of weights, or damaged ({type(error).__name__}): "
            f"expected safetensors, or what torch.save wrote ({', '.join(_SUFFIXES)})"
        ) from error
    if not isinstance(whole, Mapping):
        raise ValueError(
            f"weights: expected a state dict in {shown(path)}, got a {type(whole).__name__}"
        )
    return dict(whole)


def _state_dict(whole: dict[str, Any], key: str | None, file: str) -> dict[str, Tensor]:
    """The one state dict of a file: what it holds, or what lies under a key."""
    places = [k for k in _KEYS if isinstance(whole.get(k), Mapping) and _is_state(whole[k])]
    if key is not None:
        if not (isinstance(whole.get(key), Mapping) and _is_state(whole[key])):
            have = ", ".join(places) or "no state dict under a key"
            raise ValueError(f"weights_key: {shown(file)} holds {have}, got {key!r:.80}")
        places = [key]
    if len(places) > 1:
        raise ValueError(
            f"weights: {shown(file)} holds {' and '.join(places)}: choose one by "
            f"weights_key={places[-1]}"
        )
    state = whole[places[0]] if places else whole
    if not _is_state(state):
        found = ", ".join(one_line(k, 40) for k in list(whole)[:5])
        raise ValueError(
            f"weights: expected tensors by name in {shown(file)}, or one of the keys "
            f"{', '.join(_KEYS)}; found {found or 'nothing'}"
        )
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}


def _is_state(value: Mapping[Any, Any]) -> bool:
    return bool(value) and any(isinstance(t, Tensor) and t.ndim for t in value.values())


def _split_off_normalisation(
    named: dict[str, Tensor], file: str
) -> tuple[dict[str, Tensor], list[float] | None, list[float] | None]:
    """The other tensors, and the mean and the std of a layer that holds nothing else."""
    leaves: dict[str, set[str]] = {}
    for name in named:
        layer, dot, leaf = name.rpartition(".")
        leaves.setdefault(layer + dot, set()).add(leaf)
    pairs = [
        (layer + mean, layer + std)
        for layer, own in leaves.items()
        for mean, std in _NORMALISATIONS
        # At the top the network's own parameters may stand beside the two.
        if {mean, std} == own or (not layer and {mean, std} <= own)
    ]
    values = [tuple(named[name].flatten().tolist() for name in pair) for pair in pairs]
    if any(value != values[0] for value in values):
        raise ValueError(
            f"weights: expected one normalisation in {shown(file)}, got "
            f"{' and '.join(mean for mean, _ in pairs)}: save the state dict without them, and "
            "give mean=[...] std=[...]"
        )
    taken = {name for pair in pairs for name in pair}
    mean, std = values[0] if values else (None, None)
    return {name: tensor for name, tensor in named.items() if name not in taken}, mean, std
