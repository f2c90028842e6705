"""Whether the margin jumps: the sign of gradients that do not tell what the model does."""

from __future__ import annotations

import torch
from torch import Tensor

from flatreg.attacks.query import QueriedModel
from flatreg.data.sharing import Batch
from flatreg.threat import Threat, per_sample, random_point, steepest_step

_STEPS, _SHORT_STEPS = 16, 64  # of the same way
# Part of the margin's way. Of MeanSparse at a tenth of a deviation it is 0.11 to 0.22.
_MISSED = 0.1
# Of a continuous margin short steps miss about a quarter of what steps four times as long miss:
# a ReLU network at a large eps may miss more than a tenth in both. Of a jump they miss the same.
_STAYS = 0.6
_LOST = 1.0  # more than all of the way: ripples that 64 steps begin to see; ReLU networks 0.4


def jump_check(queried: QueriedModel, batch: Batch, threat: Threat, seed: int) -> Tensor:
    r"""Whether the margin m moves otherwise than its gradient g says, `(batch,)` booleans.

    .. math:: \sum_k |m_{k+1} - m_k - \tfrac12 (g_k + g_{k+1})^\top d| >
              0.1 \sum_k |m_{k+1} - m_k|

    at the points x + k d, k from 0 to 16, and where so, also in 64 steps of the same way, which
    miss more than 0.6 of what the 16 missed, if these did not miss all. Where m is continuous its
    changes are the integral of g, and shorter steps come nearer to it. The way is the steepest step
    of length eps/2, in pixels without a gradient a random one.

    Args:
        queried: the model.
        batch: of samples.
        threat: whose ball and eps are meant.
        seed: of the random steps.
    """
    x, labels, radius = batch.inputs, batch.labels.long(), per_sample(threat.eps / 2, batch.inputs)
    first = queried.query(x, labels, "margin")
    gradient = first.gradient
    noise = random_point(x, radius, threat.norm, seed=seed, stream=0, indices=batch.indices) - x
    length = gradient.flatten(1).norm(dim=1) / noise.flatten(1).norm(dim=1)
    length = torch.where(length > 0, length, 1)  # of noise that is as steep as the gradient
    slope = torch.where(gradient == 0, per_sample(length, x) * noise, gradient)
    way = steepest_step(x, slope, radius, threat.norm).clamp(0, 1) - x

    def missed(rows: Tensor, steps: int) -> Tensor:
        """Which part of the margin's way its gradients miss `(rows,)`; 0 within its rounding."""
        step = way[rows] / steps
        points = [first.value[rows]], [(gradient[rows] * step).flatten(1).sum(1)]
        for k in range(1, steps + 1):
            at = queried.query(x[rows] + k * step, labels[rows], "margin")
            points[0].append(at.value)
            points[1].append((at.gradient * step).flatten(1).sum(1))
        margin, slope = map(torch.stack, points)
        lost = (margin.diff(dim=0) - (slope[1:] + slope[:-1]) / 2).abs().sum(0)
        moved = margin.diff(dim=0).abs().sum(0)
        rounding = 6 * steps * torch.finfo(margin.dtype).eps * margin.abs().amax(0)
        return (lost - rounding).clamp_min(0) / moved.clamp_min(torch.finfo(margin.dtype).tiny)

    part = missed(torch.arange(len(x), device=x.device), _STEPS)
    jumps = part > _MISSED
    rows = jumps.nonzero().flatten()
    if len(rows):
        again = missed(rows, _SHORT_STEPS)
        stays = (again > _STAYS * part[rows]) | (part[rows] > _LOST)
        jumps[rows] = (again > _MISSED) & stays
    return jumps
