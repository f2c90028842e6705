"""What reaches the last layer and what comes out, in float64."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import nn

from flatreg.measures import at_head
from flatreg.measures.at_head import AtHead

__all__ = ["AtHead", "in_float64", "pass_to_head"]

pass_to_head = partial(at_head.pass_to_head, dtype=torch.float64)


def in_float64(model: nn.Module) -> nn.Module:
    """A copy in float64 on the CPU, in the mode the model is in."""
    return copy.deepcopy(model).cpu().double()
