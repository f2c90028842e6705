"""Random starts of jobs."""

from __future__ import annotations

from torch import Tensor

from flatreg.attacks.jobs import Jobs
from flatreg.threat import Norm, random_point


def random_starts(jobs: Jobs, norm: Norm, seed: int, among: Tensor | None = None) -> None:
    """Move the jobs `among` these `(m,)` to a random point of their ball, a stream a job number."""
    x = jobs.inputs.clone()
    for number in sorted(set(jobs.number.tolist())):
        here = jobs.number == number
        rows = here if among is None else here & among
        if bool(rows.any()):
            x[rows] = random_point(
                jobs.inputs[rows], jobs.eps[rows], norm, seed=seed, stream=number,
                indices=jobs.index[rows].tolist(),
            )  # fmt: skip
    jobs.x = x
