"""Files that are there whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write_whole(path: Path, text: str) -> None:
    """Replace a text file."""
    partial = _partial(path)
    partial.write_text(text)
    os.replace(partial, path)


def save_whole(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Replace a safetensors file."""
    partial = _partial(path)
    on_cpu = {name: values.detach().cpu().contiguous() for name, values in tensors.items()}
    save_file(on_cpu, partial, dict(metadata) if metadata else None)
    os.replace(partial, path)


def _partial(path: Path) -> Path:
    """Beside the file, so that the move stays within a file system; one a process."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")
