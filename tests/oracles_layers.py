"""Dense references for curvature in the weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.func import functional_call


def loss_in(model, x, y, parameter):
    """Mean cross-entropy as a function of one parameter, flattened."""
    shape = model.get_parameter(parameter).shape

    def loss(flat):
        return F.cross_entropy(functional_call(model, {parameter: flat.reshape(shape)}, (x,)), y)

    return loss


def block_hessian(model, x, y, parameter):
    """Dense Hessian of the mean loss in one parameter, (numel, numel)."""
    flat = model.get_parameter(parameter).detach().flatten()
    return torch.autograd.functional.hessian(loss_in(model, x, y, parameter), flat)


def full_hessian(model, x, y):
    """Dense Hessian of the mean loss in all parameters."""
    named = dict(model.named_parameters())
    sizes = [p.numel() for p in named.values()]

    def loss(flat):
        parts = zip(named.items(), flat.split(sizes), strict=True)
        weights = {name: part.reshape(p.shape) for (name, p), part in parts}
        return F.cross_entropy(functional_call(model, weights, (x,)), y)

    flat = torch.cat([p.detach().flatten() for p in named.values()])
    return torch.autograd.functional.hessian(loss, flat)


def block_gauss_newton(model, x, parameter):
    """J^T A J of each sample in one parameter, (batch, numel, numel)."""
    weight = model.get_parameter(parameter).detach()

    def logits_of(flat):
        return functional_call(model, {parameter: flat.reshape(weight.shape)}, (x,))

    jacobian = torch.autograd.functional.jacobian(logits_of, weight.flatten())
    p = F.softmax(model(x).detach(), 1)
    a = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    return torch.einsum("bsi,bst,btj->bij", jacobian, a, jacobian)


def kappa_of_block(matrix, weight, groups=1, transposed=False):
    """sum over s, s' of <w_s, w_s'> Tr H_ss', entry by entry, group by group."""
    entries = list(torch.cartesian_prod(*map(torch.arange, weight.shape)).tolist())
    if len(weight.shape) == 1:
        raise ValueError("a matrix or a kernel is wanted")
    per_group = weight.shape[0] // groups

    def place(entry):
        """(group, output, column) of one entry of the weight."""
        first, second, *kernel = entry
        group = first // per_group
        rows, column = (second, first % per_group) if transposed else (first % per_group, second)
        return group, rows, (column, *kernel)

    at = {place(entry): i for i, entry in enumerate(entries)}
    flat, total = weight.detach().flatten(), 0.0
    for group in range(groups):
        rows = sorted({r for g, r, _ in at if g == group})
        columns = sorted({c for g, _, c in at if g == group})
        for s in rows:
            i = torch.tensor([at[group, s, c] for c in columns])
            for t in rows:
                j = torch.tensor([at[group, t, c] for c in columns])
                total = total + (flat[i] * flat[j]).sum() * matrix[..., i, j].sum(-1)
    return total
