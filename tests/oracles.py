"""Slow, obvious references: what each fast path must equal."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch.func import functional_call


def relative_flatness_by_hessian(feature, weight, bias, label, loss=F.cross_entropy):
    """kappa of one sample, by the full Hessian in the head's weight and its block traces."""

    def loss_of(flat):
        logits = feature @ flat.reshape(weight.shape).T + bias
        return loss(logits[None], label[None]).sum()

    classes, width = weight.shape
    hessian = torch.autograd.functional.hessian(loss_of, weight.reshape(-1).clone())
    blocks = hessian.reshape(classes, width, classes, width)
    traces = torch.einsum("siti->st", blocks)
    return ((weight @ weight.T) * traces).sum()


def input_hessian(loss_at, x):
    """Dense Hessian (d, d) of the loss of one sample `(1, d)`."""
    return torch.autograd.functional.hessian(lambda flat: loss_at(flat[None]).sum(), x[0].clone())


def two_pass_sam_step(model, base, rho, closure):
    """One SAM step written out by hand."""
    base.zero_grad()
    closure().backward()
    params = [p for p in model.parameters() if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p.grad) for p in params]))
    saved = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p in params:
            p.add_(p.grad * (rho * (1 / norm)))
    base.zero_grad()
    closure().backward()
    with torch.no_grad():
        for p, old in zip(params, saved, strict=True):
            p.copy_(old)
    base.step()


def flat_gradient(model, loss_of, at=0.0):
    """Gradient of `loss_of(model)`, all weights moved by `at`, as a vector; leaves no trace."""
    moved, start = copy.deepcopy(model), 0
    with torch.no_grad():
        for p in moved.parameters():
            p += at if isinstance(at, float) else at[start : start + p.numel()].reshape(p.shape)
            start += p.numel()
    params = list(moved.parameters())
    gradients = torch.autograd.grad(loss_of(moved), params, allow_unused=True)
    pairs = zip(params, gradients, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs])


def flat_weights(model):
    """All weights as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def set_gradient(model, flat):
    """Cut a vector into `.grad`."""
    start = 0
    for p in model.parameters():
        p.grad = flat[start : start + p.numel()].reshape(p.shape).clone()
        start += p.numel()


def affine_is_robust(weight, bias, x, label, eps):
    """Whether an affine classifier keeps `label` everywhere in the Linf ball cut with the box.

    Each rival's margin is affine in the pixels, so its minimum puts every pixel at an end of its
    interval.
    """
    low, high = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
    for rival in range(len(weight)):
        if rival == label:
            continue
        slope = weight[label] - weight[rival]
        worst = torch.where(slope > 0, low, high)
        if slope @ worst + bias[label] - bias[rival] < 0:
            return False
    return True


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
