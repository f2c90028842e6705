"""Fitted manifolds as files: safetensors, hyperparameters as JSON in the metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from flatreg.atomic import save_whole


def write_manifold(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file whole or not at all.

    Raises:
        OSError: it could not be written; a file that was there is left as it was.
    """
    save_whole(path, tensors, {"manifold": json.dumps(config)})


def read_manifold(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the hyperparameters and the tensors that `write_manifold` wrote.

    Raises:
        ValueError: the file holds no manifold of this kind.
    """
    with safe_open(str(path), "pt") as file:
        config = json.loads((file.metadata() or {}).get("manifold", "{}"))
        if config.get("kind") != kind:
            raise ValueError(f"{path}: expected a {kind}, got {config.get('kind')}")
        return config, {name: file.get_tensor(name) for name in file.keys()}
