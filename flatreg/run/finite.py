"""Whether the numbers of a training are finite: seen on the device, told by name and step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class NonFinite(NamedTuple):
    """A number that was not finite: its name, its value, and the step that saw it first."""

    name: str
    value: float
    step: int


class FiniteWatch:
    """Remembers on the device where numbers were first not finite; the host may ask later."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._steps: Tensor | None = None
        self._values: Tensor | None = None

    def see(self, step: int, numbers: Mapping[str, Tensor]) -> None:
        """Look at the numbers of a step, 0-d each, the same names in every step."""
        now = torch.stack([value.detach().float() for value in numbers.values()])
        if self._steps is None or self._values is None:
            self._names = tuple(numbers)
            self._steps, self._values = torch.full_like(now, torch.inf), torch.zeros_like(now)
        new = ~now.isfinite() & self._steps.isinf()
        self._values = torch.where(new, now, self._values)
        self._steps = torch.where(new, float(step), self._steps)

    def first(self, gather: Callable[[Tensor], Tensor]) -> NonFinite | None:
        """The first of all that were not finite, on any process; reading it waits for the device.

        Args:
            gather: concatenates a tensor of every process.
        """
        if self._steps is None or self._values is None:
            return None
        steps, values = gather(self._steps), gather(self._values)
        index = int(steps.argmin())
        step = float(steps[index])
        if step == float("inf"):
            return None
        return NonFinite(self._names[index % len(self._names)], float(values[index]), int(step))
