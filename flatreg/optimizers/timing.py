"""When a step perturbs: on every so many steps, from one on, or while the learning rate is low."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from flatreg.data.configuration import number, whole
from flatreg.optimizers.parameter_state import PEAK, SINCE, STEPS


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The steps on which weights are perturbed; the others are the base optimizer's own.

    What it counts lies in the groups of the base optimizer: `sam_steps`, the steps on a gradient of
    ours; with a tail also `sam_peak_lr`, the highest learning rate of a step, and `sam_tail_since`,
    the first step of the tail, -1 outside.

    Args:
        every: perturb on every so many steps, counted from the first that may.
        begin: perturb from this step on, counted from 0.
        tail: perturb only while the learning rate, the largest of the groups, is at most so large a
            part of the highest that a step was taken at.

    Raises:
        ValueError: one is out of its range.
    """

    every: int = 1
    begin: int = 0
    tail: float = 1.0

    def __post_init__(self) -> None:
        whole("every", self.every, 1)
        whole("begin", self.begin, 0)
        number("tail", self.tail, "(0, 1]")

    def check(self, base: Any) -> None:
        """Refuse a tail of a learning rate that has none.

        Raises:
            ValueError: the base optimizer has no learning rate, or is schedule-free.
        """
        groups = base.param_groups
        constant = any("lr" not in group or "weight_lr_power" in group for group in groups)
        if self.tail < 1 and constant:
            raise ValueError(
                f"tail: expected a base optimizer whose learning rate falls, that of "
                f"{type(base).__name__} does not: write begin=STEP"
            )

    def check_loaded(self, base: Any) -> None:
        """Warn where a checkpoint, as of the base optimizer alone, knows no highest rate."""
        group = base.param_groups[0]
        if self.tail < 1 and not group.get(PEAK) and group.get(STEPS) != 0:
            warnings.warn(
                "the checkpoint does not say the highest learning rate of its training, so that "
                "tail counts from now: write it to param_groups[0]['sam_peak_lr']",
                stacklevel=3,
            )

    def has_begun(self, base: Any) -> bool:
        """Whether `begin` is over and the learning rate is in its tail."""
        if steps_of(base) < self.begin or self.tail == 1:
            return steps_of(base) >= self.begin
        peak = float(base.param_groups[0].get(PEAK, 0.0))
        # A rate of 0 at the start of a warm-up has no peak yet; 0.1 * 0.1 may round upwards.
        return 0 < peak and _rate(base) <= self.tail * peak * (1 + 1e-6)

    def perturbs(self, base: Any) -> bool:
        """Whether the step that comes perturbs."""
        return self.has_begun(base) and (steps_of(base) - self._since(base)) % self.every == 0

    def count(self, base: Any, *, ours: bool) -> None:
        """Count a step that was taken, if on a gradient of ours, and look at its learning rate."""
        entries: dict[str, Any] = {}
        if self.tail < 1:
            peak = max(float(base.param_groups[0].get(PEAK, 0.0)), _rate(base))
            entries = {PEAK: peak, SINCE: self._since(base) if self.has_begun(base) else -1}
        if ours:
            entries[STEPS] = steps_of(base) + 1
        for group in base.param_groups:
            group.update(entries)

    def _since(self, base: Any) -> int:
        """The step from which `every` counts."""
        since = self.begin if self.tail == 1 else int(base.param_groups[0].get(SINCE, -1))
        return since if since >= 0 else steps_of(base)


def steps_of(base: Any) -> int:
    """Steps that were taken on a gradient of `backward`, `perturbed` or `step(closure)`."""
    return int(base.param_groups[0].get(STEPS, 0))


def _rate(base: Any) -> float:
    """The largest learning rate of all groups; of layer-wise ones, that of the head."""
    return max(float(group["lr"]) for group in base.param_groups)
