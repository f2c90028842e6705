r"""Claim: relative flatness of the last layer has a closed form.

.. math:: \sum_{s,s'} \langle w_s, w_{s'} \rangle \operatorname{Tr} H_{s,s'}
          = \|\phi\|^2 ( \sum_s p_s \|w_s\|^2 - \| \sum_s p_s w_s \|^2 )

The left side is computed as it stands: autograd's Hessian of a sample's cross-entropy in the weight
of the head, block by block, in float64.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from einops import einsum
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from flatreg.claims.at_head import AtHead, in_float64, pass_to_head
from flatreg.claims.result import FEWEST, Check, ClaimResult, Findings, Trained, result_of
from flatreg.measures.estimate import Estimate
from flatreg.terms.protocol import CONFIG, Count

TOLERANCE = 1e-9
# 1 - p has lost half of float64's digits there, and with it the Hessian, not the closed form.
FAINTEST = 1e-6


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class ClosedForm:
    """Relative flatness of the last layer is what its closed form says.

    Reproduced on an arm if the two differ by 1e-9 at most, relative to the Hessian's, over the
    samples whose confidence is below 1 - 1e-6, 20 at least: above it the Hessian itself has lost
    its digits, and is drawn but not judged.

    Args:
        samples: how many of the evaluated ones.
    """

    samples: Count = 64
    kind: Literal["ClosedForm"] = "ClosedForm"

    def __call__(self, trained: Trained) -> ClaimResult:
        """Judge the claim."""
        found = {title: self._on_arm(title, model, trained) for title, model in trained.each()}
        return result_of(
            self.kind,
            "Relative flatness of the last layer, a sum over blocks of the Hessian, is the squared "
            "norm of the features times the variance of the class weights under the softmax.",
            trained,
            self.samples,
            found,
        )

    def _on_arm(self, title: str, model: nn.Module, trained: Trained) -> Findings:
        exact = in_float64(model)
        at = pass_to_head(exact, *trained.test_batch(self.samples, exact))
        closed, explicit = at.kappa(), kappa_by_hessian(at)
        apart = (closed - explicit).abs() / explicit.abs()
        judged = apart[at.uncertainty > FAINTEST]
        largest = float(judged.max()) if len(judged) else float("nan")
        check = Check(
            title,
            f"largest relative difference at most {TOLERANCE:g}, over {FEWEST} samples or more of "
            f"confidence below 1 - {FAINTEST:g}",
            f"{largest:.2g} over {len(judged)} of {len(apart)}",
            len(judged) >= FEWEST and largest <= TOLERANCE,
        )
        numbers = {
            "largest difference": Estimate.exact(largest, len(judged)),
            "median difference": Estimate.median(apart),
            "kappa": Estimate.median(closed),
            "1 - confidence": Estimate.median(at.uncertainty),
        }
        drawn = {"closed": closed, "hessian": explicit, "doubt": at.uncertainty}
        return Findings([check], numbers, {name: values.tolist() for name, values in drawn.items()})


@torch.enable_grad()
def kappa_by_hessian(at: AtHead) -> Tensor:
    """The sum over blocks of the Hessian `(n,)`, sample by sample."""
    gram = at.weight @ at.weight.T
    classes, width = at.weight.shape
    basis = torch.eye(width, dtype=at.weight.dtype)
    sums = []
    for phi, z, y in zip(at.features, at.logits, at.labels, strict=True):
        weight = at.weight.clone().requires_grad_()
        bias = z - at.weight @ phi
        loss = F.cross_entropy(weight @ phi + bias, y)
        (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
        traces = []
        for s in range(classes):  # rows (s, i) of the Hessian, one pass a row
            (rows,) = torch.autograd.grad(
                gradient[s], weight, basis, retain_graph=True, is_grads_batched=True
            )
            traces.append(einsum(rows, "i t i -> t"))
        sums.append((gram * torch.stack(traces)).sum())
    return torch.stack(sums)
