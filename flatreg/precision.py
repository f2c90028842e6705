"""Where half precision ends: quantities that cancel are taken in float32 at least."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """Cast half precision, as autocast hands it out, up to float32; keep float32 and float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
