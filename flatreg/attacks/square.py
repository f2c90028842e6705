"""Square Attack: random search over square windows, from the logits alone.

Andriushchenko, Croce, Flammarion, Hein, "Square Attack: a query-efficient black-box adversarial
attack via random search", ECCV 2020, algorithms 2 (Linf) and 3 (L2). L1: Croce and Hein, "Mind the
box: l1-APGD for sparse adversarial attacks on image classifiers", ICML 2021, appendix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from typing_extensions import Unpack

from flatreg.attacks.losses import LossName
from flatreg.attacks.options import AttackOptions, AttackResult, complete
from flatreg.attacks.query import QueryResult
from flatreg.attacks.search import Jobs, run
from flatreg.data.configuration import number, whole
from flatreg.threat import Norm, check_norm, per_sample

_MARKS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10000: there the windows halve
_PLACES = 5  # uniforms of a query besides one a channel: two corners, and which way it is turned
_BLOCK = 128  # queries drawn at a time: 4 kB a job at three channels, less than its image
_TILES = 5  # L2 and L1 start from this many pyramids along each side, 9 at most


@dataclass
class _Memory:
    best: Tensor  # point of largest loss so far, and its loss
    value: Tensor
    numbers: Tensor  # uniforms of the block of queries under way


@dataclass(frozen=True)
class _SquareSearch:
    queries: int
    p_init: float
    norm: Norm
    seed: int
    loss: LossName = "margin"
    gradients: bool = False
    may_leave_ball: bool = False

    def init(self, jobs: Jobs) -> _Memory:
        images, eps = as_images(jobs.inputs), jobs.eps.reshape(-1, 1, 1, 1)
        channels, _, width = images.shape[1:]
        tiles = (1, width) if self.norm == "linf" else (2 * _TILES, 2 * _TILES)
        zero, rows = torch.zeros_like(jobs.row), torch.arange(len(jobs.row))
        signs = self.uniforms(jobs, rows, zero, (channels, *tiles))
        jobs.x = start(images, eps, signs, self.norm).reshape(jobs.inputs.shape)
        numbers = self.uniforms(jobs, rows, zero + 1, (_BLOCK, _PLACES + channels))
        lowest = torch.full(jobs.row.shape, -torch.inf).to(images)
        return _Memory(jobs.x, lowest, numbers)

    def step(self, jobs: Jobs, memory: _Memory, answer: QueryResult) -> None:
        better = answer.value > memory.value
        memory.best = torch.where(per_sample(better, jobs.x).bool(), jobs.x, memory.best)
        memory.value = torch.where(better, answer.value, memory.value)
        # A generator a query and sample would cost more than the pass: one a block of queries. Each
        # job has a block of its own, as their ages differ.
        spent = ((jobs.step % _BLOCK == 0) & (jobs.step > 0)).nonzero().flatten()
        if len(spent):
            shape = memory.numbers.shape[1:]
            memory.numbers[spent] = self.uniforms(jobs, spent, jobs.step // _BLOCK + 1, shape)
        row = torch.arange(len(jobs.step), device=jobs.step.device)
        # In whole numbers: step / queries >= mark / 10000 would depend on its rounding.
        marks = torch.tensor(_MARKS, device=row.device) * self.queries
        proposed = propose(
            as_images(jobs.inputs),
            as_images(memory.best),
            jobs.eps.reshape(-1, 1, 1, 1),
            memory.numbers[row, jobs.step % _BLOCK],
            torch.bucketize((jobs.step + 1) * 10000, marks),
            norm=self.norm,
            p_init=self.p_init,
        )
        jobs.x = proposed.reshape(jobs.x.shape)

    def uniforms(self, jobs: Jobs, rows: Tensor, block: Tensor, shape: Sequence[int]) -> Tensor:
        """Numbers in [0, 1), `(len(rows), *shape)`, a stream per (seed, job, sample, block)."""
        drawn = np.empty((len(rows), *shape), dtype=np.float32)
        # Blocks count from 1: numpy takes a last 0 for nothing, and random_point has that stream.
        keys = torch.stack([jobs.number, jobs.index, block + 1], dim=1).tolist()
        for place, row in enumerate(rows.tolist()):
            generator = np.random.default_rng([self.seed, *keys[row]])
            generator.random(dtype=np.float32, out=drawn[place])
        return torch.from_numpy(drawn).to(jobs.inputs.device)


def square(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    queries: int = 5000,
    p_init: float = 0.8,
    restarts: int = 1,
    **options: Unpack[AttackOptions],
) -> AttackResult:
    """Attack by random search over square windows.

    Needs no gradients, so that it also attacks what is not differentiable. Each query changes one
    window of the best point so far (L2, L1: moves what is in one window to another). The change is
    kept where it lowers the margin.

    Arguments, result and errors as in `flatreg.attacks.pgd`, and `queries`, the points tried by
    each restart, and `p_init`, the part of the pixels in the first windows. It is halved after 10,
    50, 200, 500, 1000, 2000, 4000, 6000 and 8000 of 10000 queries, and in proportion of fewer.
    Inputs that are not `(batch, channels, height, width)` are taken for one row of pixels, a window
    for an interval of it.

    Raises:
        ValueError: also fewer than 1 query, p_init outside (0, 1].
    """
    queries = whole("queries", queries, 1)
    p_init = number("p_init", p_init, "(0, 1]")
    common = complete(options, "square")
    search = _SquareSearch(queries, p_init, check_norm(common["norm"]), common["seed"])
    return run(search, model, inputs, labels, common, eps=eps, restarts=restarts)


def as_images(inputs: Tensor) -> Tensor:
    """View `(batch, ...)` as `(batch, channels, height, width)`: one row, if it is not one."""
    return inputs if inputs.ndim == 4 else inputs.reshape(len(inputs), 1, 1, -1)


def start(inputs: Tensor, eps: Tensor, numbers: Tensor, norm: Norm) -> Tensor:
    """First points of a search: for Linf vertical stripes, else a chequerboard of pyramids.

    Args:
        inputs: `(batch, channels, height, width)`.
        eps: radii `(batch, 1, 1, 1)`.
        numbers: uniforms `(batch, channels, rows, columns)`, the sign of each stripe or tile.
        norm: of the ball.
    """
    signs = _signs(numbers).to(inputs)
    if norm == "linf":
        return (inputs + eps * signs).clamp(0, 1)
    height, width = inputs.shape[2:]
    tile = max(height // _TILES, 1), max(width // _TILES, 1)
    row, column = (torch.arange(n, device=inputs.device) for n in (height, width))
    shape = _pyramids((tile,), norm, inputs.dtype, inputs.device)[0, 0]
    pattern = shape[row % tile[0]][:, column % tile[1]]
    change = pattern * signs[:, :, row // tile[0]][..., column // tile[1]]
    return (inputs + eps * change / _length(change, norm, "b 1 1 1")).clamp(0, 1)


def propose(
    inputs: Tensor,
    best: Tensor,
    eps: Tensor,
    numbers: Tensor,
    level: Tensor,
    *,
    norm: Norm,
    p_init: float,
) -> Tensor:
    """Next points of a search.

    Args:
        inputs: `(batch, channels, height, width)`.
        best: points of the ball, of the same shape.
        eps: radii `(batch, 1, 1, 1)`.
        numbers: uniforms `(batch, 5 + channels)`: top and left of the window, of the second window,
            which way the pyramids are turned, the sign of each channel.
        level: `(batch,)`: how often the part of the pixels in a window has halved.
        norm: of the ball.
        p_init: that part at level 0.
    """
    height, width = inputs.shape[2:]
    windows = _windows(height, width, p_init, least=1 if norm == "linf" else 3)
    sides = torch.tensor(windows, device=level.device)[level]
    signs = rearrange(_signs(numbers[:, _PLACES:]), "b c -> b c 1 1").to(inputs)
    row, column = _place(numbers[:, :2], sides, height, width)
    inside = _within(row, column, sides)
    if norm == "linf":
        return torch.where(inside, (inputs + eps * signs).clamp(0, 1), best)
    source = _within(*_place(numbers[:, 2:4], sides, height, width), sides)
    turned = (numbers[:, 4] < 0.5).long()[:, None, None]
    pyramids = _pyramids(windows, norm, inputs.dtype, inputs.device)
    row = row.clamp(0, pyramids.shape[2] - 1)[:, :, None]
    column = column.clamp(0, pyramids.shape[3] - 1)[:, None]
    eta = signs * rearrange(pyramids[turned, level[:, None, None], row, column], "b h w -> b 1 h w")
    change = _moved(best - inputs, inside, source, eta, eps, norm)
    return (inputs + change).clamp(0, 1)


def _moved(
    change: Tensor, inside: Tensor, source: Tensor, eta: Tensor, eps: Tensor, norm: Norm
) -> Tensor:
    """Empty the window `source` and spend what was there, and what is left of eps, on `inside`.

    Args:
        change: of the best point from the image `(b, c, h, w)`.
        inside: the window that is drawn anew `(b, 1, h, w)`.
        source: the window that is emptied.
        eta: the paper's pyramids, on `inside`.
        eps: radii `(b, 1, 1, 1)`.
        norm: "l2" or "l1"; below, a sum is of squares or of absolute values.
    """
    power = 2 if norm == "l2" else 1
    here = torch.where(inside, change, 0)
    # What was in the window is kept as a direction: it has served before.
    direction = torch.where(inside, eta + here / _length(here, norm, "b c 1 1"), 0)
    taken = torch.where(inside | source, change, 0)
    held = reduce(taken.abs() ** power, "b c h w -> b c 1 1", "sum")
    used = reduce(change.abs() ** power, "b c h w -> b 1 1 1", "sum")
    # A channel keeps what it held in both windows, and gets as much as the others of what is left
    # of eps, which is what the box has cut off before. The length becomes eps again, and needs no
    # projection. Not clamped before the sum, so that roundings beyond eps are taken back.
    budget = (held + (eps**power - used) / change.shape[1]).clamp_min(0) ** (1 / power)
    fresh = direction * budget / _length(direction, norm, "b c 1 1")
    return torch.where(inside, fresh, torch.where(source, 0, change))


def _signs(numbers: Tensor) -> Tensor:
    return 1 - 2 * (numbers < 0.5).int()


def _length(change: Tensor, norm: Norm, shape: str) -> Tensor:
    """Norm of `(b, c, h, w)` over the axes that `shape` lacks; never zero."""
    power = 2 if norm == "l2" else 1
    total = reduce(change.abs() ** power, f"b c h w -> {shape}", "sum") ** (1 / power)
    return total.clamp_min(torch.finfo(change.dtype).tiny)


def _place(numbers: Tensor, sides: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Rows `(b, height)` and columns `(b, width)` counted from the corner of a random window."""
    free = torch.tensor([height, width], device=sides.device) - sides
    corner = torch.minimum((numbers * (free + 1)).long(), free)
    row, column = (torch.arange(n, device=sides.device) for n in (height, width))
    return row - corner[:, :1], column - corner[:, 1:]


def _within(row: Tensor, column: Tensor, sides: Tensor) -> Tensor:
    rows = (row >= 0) & (row < sides[:, :1])
    columns = (column >= 0) & (column < sides[:, 1:])
    return rearrange(rows, "b h -> b 1 h 1") & rearrange(columns, "b w -> b 1 1 w")


@lru_cache(maxsize=32)
def _windows(height: int, width: int, p_init: float, least: int) -> tuple[tuple[int, int], ...]:
    """Sides of the windows at each level: a square, longer where the image is not as high.

    L2 and L1 want at least 3, and odd, so that the pyramids have a tip.
    """
    windows = []
    for level in range(len(_MARKS) + 1):
        area = p_init / 2**level * height * width
        side = _odd(round(area**0.5), least)
        rows, columns = min(side, height), min(side, width)
        if side > height:
            columns = min(_odd(round(area / height), least), width)
        elif side > width:
            rows = min(_odd(round(area / width), least), height)
        windows.append((rows, columns))
    return tuple(windows)


def _odd(side: int, least: int) -> int:
    side = max(side, least)
    return side + 1 if least > 1 and side % 2 == 0 else side


@lru_cache(maxsize=32)
def _pyramids(
    windows: tuple[tuple[int, int], ...], norm: Norm, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The eta of the paper for each window, `(2, windows, height, width)`, its tip at row 0."""
    power = 2 if norm == "l2" else 1
    height, width = (max(sides) for sides in zip(*windows, strict=True))
    found = torch.zeros(2, len(windows), height, width, dtype=torch.float64)
    for turned, (level, (rows, columns)) in product(range(2), enumerate(windows)):
        across = rows == 1 or (turned and columns > 1)
        eta = _pyramid(columns, rows, power).T if across else _pyramid(rows, columns, power)
        found[turned, level, :rows, :columns] = eta / torch.linalg.vector_norm(eta, ord=power)
    return found.to(dtype=dtype, device=device)


def _pyramid(rows: int, columns: int, power: int) -> Tensor:
    """One pyramid on the upper half and one upside down below, as large in their norm."""
    return torch.cat([_half(rows // 2, columns, power), -_half(-(-rows // 2), columns, power)])


def _half(rows: int, columns: int, power: int) -> Tensor:
    """At distance d from the middle, the sum of n^-2 (L1: n^-4) over n = d + 1, d + 2, ..."""
    steps = max(rows, columns) // 2
    terms = torch.arange(1, steps + 2, dtype=torch.float64) ** (-2.0 if power == 2 else -4.0)
    heights = terms.flip(0).cumsum(0).flip(0)
    down = (torch.arange(rows) - rows // 2).abs()[:, None]
    along = (torch.arange(columns) - columns // 2).abs()
    half = heights[torch.maximum(down, along)]
    return half / torch.linalg.vector_norm(half, ord=power) if rows else half
