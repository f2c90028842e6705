"""Fitted manifolds as files: safetensors, hyperparameters as JSON in the metadata."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_manifold(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file whole or not at all.

    Raises:
        OSError: it could not be written; a file that was there is left as it was.
    """
    partial = path.with_name(f".{path.name}.partial")
    whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(whole, str(partial), metadata={"manifold": json.dumps(config)})
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{path}: could not be written: {error}") from error


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
