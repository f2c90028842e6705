"""Slow, obvious references: what each fast path must equal."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F


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
