"""Which directions stay on the data manifold and which leave it."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class IdentityManifold:
    """Every direction is off-manifold: the tangent space is {0}, the normal projector is I."""

    kind: Literal["IdentityManifold"] = "IdentityManifold"

    def split(self, inputs: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Split `vectors` at `inputs` (both `(batch, ...)`) into (tangent, normal) parts."""
        return torch.zeros_like(vectors), vectors
