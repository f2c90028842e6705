"""How far an evaluation is: passes spent, of those that it may take at most."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Sequence
from typing import Any

from flatreg.attacks.cascade import describe
from flatreg.attacks.options import Attack, Callback
from flatreg.attacks.spot_check import checked_attack
from flatreg.data.progress import progress_bar
from flatreg.threat import Threat

_GRADIENT = 3  # a query with a gradient takes about three times as long as one without
_DISTANCES = 100 * _GRADIENT  # of the minimal-norm pass of a curve
# Of the masking checks: 172 forward and 90 backward passes of a sample in about 170 queries.
_CHECKS, _CHECKS_WEIGHT = 172 + 2 * 90, 2
_EVERY = 0.5  # seconds: printing costs more than a small forward
_UNKNOWN = 10  # queries of an attack whose settings do not say it


def cost(attack: Attack, images: int = 1) -> float:
    """Time that an attack takes at most on an image that survives it, in forward passes.

    It is read from the attack's settings: steps or queries, times targets, restarts and draws. A
    spot check attacks some `samples` of all `images`, if it finds nothing.
    """
    setting = _settings(attack)
    inner = setting.get("attack")
    if not callable(inner):
        return _queries(setting) * _weight(setting)
    drawn = min(1.0, setting.get("samples", images) / images)
    return float(cost(inner) * setting.get("draws", 1) * drawn)


def _settings(attack: Attack) -> dict[str, Any]:
    """Counts among its settings, alone or in tuples, and an attack that it wraps."""
    try:
        parameters = inspect.signature(attack).parameters.values()
    except (TypeError, ValueError):
        return {}
    given = {p.name: p.default for p in parameters if p.default is not p.empty}
    each = {name: v if isinstance(v, tuple) else (v,) for name, v in given.items()}
    counts = {name for name, values in each.items() if all(isinstance(v, int) for v in values)}
    return {name: v for name, v in given.items() if name in counts or callable(v)}


def _queries(setting: dict[str, Any]) -> int:
    # Of a race: the classes of its long searches, and the steps at each.
    raced = sum(math.prod(setting[name]) for name in ("fmn", "apgd") if name in setting)
    count = setting.get("steps", setting.get("queries", raced or _UNKNOWN))
    return int(count * setting.get("targets", 1) * setting.get("restarts", 1))


def _weight(setting: dict[str, Any]) -> int:
    return 1 if "queries" in setting else _GRADIENT


class AttackProgress:
    """Bar of an evaluation: it moves with the passes that are spent.

    What is left is an upper bound: that all images which survive so far survive to the end. So the
    bar jumps ahead where an attack fools many.
    """

    def __init__(
        self,
        samples: int,
        threats: Sequence[Threat],
        curve: Sequence[Threat],
        checked: int,
        *,
        shown: bool,
    ) -> None:
        """A bar for so many `samples`, of which so many are `checked`: see `evaluator.Request`."""
        self._samples = samples
        self._plans = _plans(samples, threats, curve, checked)
        self._own = threats[0]
        own, after = self._plans[self._own]
        title = f"attack {self._own.eps:.3g}"
        total = samples * (sum(own) + after)
        self.bar = progress_bar(title, int(total), shown=shown, counts=False)
        self.decided = self._survivors = 0
        self._spent = self._spent_before = 0.0  # on all blocks, and on those before this one
        self._text = ""
        self._before = self._seen = self._right = 0  # images of blocks before, and with this one
        self._later, self._weight, self._draws, self._shown_at = 0.0, 1, 1, 0.0

    def __enter__(self) -> AttackProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def begin(self, threat: Threat, number: int, among: int, block: int) -> None:
        """An attack of `threat` begins on `among` images of a `block`."""
        attack, (costs, after) = threat.attacks[number], self._plans[threat]
        if checked_attack(attack):  # after all blocks
            self._right, self._seen = 0, self._samples
            self._text = f"<= {self._survivors / self._samples:.1%}"
        elif threat == self._own:
            if number == 0:
                self._spent_before, self._before, self._right = self._spent, self.decided, among
            self._seen = self.decided + block
            bound = (self._survivors + among) / self._seen
            self._text = f"{self._seen - among}/{self._samples} decided, <= {bound:.1%}"
        where = "" if threat == self._own else f"{threat.norm} {threat.eps:.3g} "
        stage = f"{describe(attack).partition('(')[0]} {number + 1}/{len(threat.attacks)}"
        self.bar.set_postfix_str(f"{self._text}, {where}{stage}", False)
        self._later = among * sum(costs[number + 1 :]) + self._right * after
        setting = _settings(attack)
        inner = setting.get("attack")
        self._draws = setting.get("draws", 1) if callable(inner) else 1
        self._weight = _weight(_settings(inner) if callable(inner) else setting)
        self._show(among * costs[number])

    def callback(self, rows: Any, step: Any, x: Any, left: int) -> None:
        """Count a query; called after every query of an attack."""
        self._spent += len(rows) * self._weight * self._draws
        if time.monotonic() - self._shown_at > _EVERY:
            self._show(left * self._weight)

    def begin_checks(self, among: int) -> Callback:
        """The masking checks begin on `among` images; what their attacks call after a query."""
        self.bar.set_postfix_str(f"{self._text}, masking checks", False)
        self._later, end = 0.0, self._spent + among * _CHECKS
        self._show(end - self._spent)

        def callback(rows: Any, step: Any, x: Any, left: int) -> None:
            self._spent += len(rows) * _CHECKS_WEIGHT
            if time.monotonic() - self._shown_at > _EVERY:
                self._show(max(0.0, end - self._spent))

        return callback

    def decide(self, verdicts: Sequence[int]) -> None:
        """Count images whose verdict is final."""
        self.decided += len(verdicts)
        self._survivors += sum(verdict == -1 for verdict in verdicts)

    def _show(self, left: float) -> None:
        """Show what is spent, and what may be left: of this block, and of images not seen yet."""
        self._shown_at = time.monotonic()
        spent, images = self._spent_before, self._before
        if not images:
            spent, images = self._spent + left + self._later, max(1, self._seen)
        unseen = (self._samples - self._seen) * spent / images
        self.bar.n = int(self._spent)
        self.bar.total = max(1, int(self._spent + left + self._later + unseen))
        self.bar.refresh()


def _plans(
    samples: int, threats: Sequence[Threat], curve: Sequence[Threat], checked: int
) -> dict[Threat, tuple[list[float], float]]:
    """Of each threat, in the order in which they are tried: its attacks' costs, and what follows.

    Of an image the whole curve takes about as long as one of its eps: verdicts at the others follow
    from it.
    """
    plans: dict[Threat, tuple[list[float], float]] = {}
    after = _CHECKS * checked / max(1, samples)
    for threat in curve:
        costs = [cost(attack) / len(curve) for attack in threat.attacks]
        plans[threat] = costs, after
        after += sum(costs)
    after += _DISTANCES * bool(curve)
    for threat in reversed(threats):
        costs = [cost(attack, samples) for attack in threat.attacks]
        plans[threat] = costs, after
        after += sum(costs)
    return plans
