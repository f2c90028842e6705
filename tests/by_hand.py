"""Every sharpness-aware method, and the gradient it steps on, written out by its formula."""

from __future__ import annotations

import torch
from oracles import flat_gradient, flat_weights

import flatreg
from flatreg import (
    ASAM,
    AWP,
    GNP,
    GSAM,
    SAM,
    WSAM,
    FriendlySAM,
    LookSAM,
    MomentumSAM,
    RelativeSAM,
    StaleSAM,
)

METHODS = {
    "SAM": lambda base, net: SAM(base, rho=0.1),
    "ASAM": lambda base, net: ASAM(base, rho=0.3),
    "RelativeSAM": lambda base, net: RelativeSAM(base, net, rho=0.1),
    "MomentumSAM": lambda base, net: MomentumSAM(base, rho=0.1),
    "StaleSAM": lambda base, net: StaleSAM(base, rho=0.1),
    "FriendlySAM": lambda base, net: FriendlySAM(base, rho=0.1),
    "GSAM": lambda base, net: GSAM(base, rho=0.1, alpha=0.3),
    "WSAM": lambda base, net: WSAM(base, rho=0.1, gamma=0.8),
    "GNP": lambda base, net: GNP(base, rho=0.1, alpha=0.6),
    "LookSAM": lambda base, net: LookSAM(base, rho=0.1, every=2),
    "AWP": lambda base, net: AWP(base, gamma=0.05),
    "head": lambda base, net: SAM(base, rho=0.1, scope=net[8]),
    "last blocks": lambda base, net: SAM(base, rho=0.1, scope=flatreg.last_blocks(net, 2)),
    "spaced": lambda base, net: SAM(base, rho=0.1, every=2, begin=1),
    "tail": lambda base, net: SAM(base, rho=0.1, tail=0.85),
}
MOMENTUM, DECAY = 0.9, 0.9  # of the SGD, and of its learning rate a step, that `estimate` is for


def unit(v):
    return v / v.norm()


def cut(net, flat):
    """Name, weight and its piece of a vector."""
    start = 0
    for name, p in net.named_parameters():
        yield name, p.detach(), flat[start : start + p.numel()].reshape(p.shape)
        start += p.numel()


def ascent(method, net, g, memory):
    """The perturbation, by its formula."""
    if method in ("MomentumSAM", "StaleSAM"):
        v = memory.get("momentum" if method == "MomentumSAM" else "last")
        sign = -1 if method == "MomentumSAM" else 1
        return torch.zeros_like(g) if v is None else sign * 0.1 * unit(v)
    if method == "ASAM":
        t = flat_weights(net).abs() + 0.01
        return 0.3 * t**2 * g / (t * g).norm()
    if method == "RelativeSAM":
        inside = {n: w.flatten(1).T @ v.flatten(1) for n, w, v in cut(net, g) if w.ndim > 1}
        length = torch.cat([m.flatten() for m in inside.values()]).norm()
        return 0.1 * torch.cat(
            [
                (w.flatten(1) @ inside[n] / length).flatten() if n in inside else v.flatten() * 0
                for n, w, v in cut(net, g)
            ]
        )
    if method == "AWP":
        return 0.05 * torch.cat(
            [(w.norm() * unit(v) * float(w.ndim > 1)).flatten() for _, w, v in cut(net, g)]
        )
    if method in ("head", "last blocks"):
        names = ("8.",) if method == "head" else ("3.", "8.")
        g = torch.cat([v.flatten() * float(n.startswith(names)) for n, _, v in cut(net, g)])
    if method == "FriendlySAM":
        mean = memory.get("mean")
        memory["mean"] = g if mean is None else 0.9 * mean + 0.1 * g
        g = g if mean is None else g - mean
    return 0.1 * unit(g)


def estimate(method, net, loss, step, memory):
    """The gradient of one micro-batch, by its formula."""
    g = flat_gradient(net, loss)
    if method == "spaced" and (step < 1 or (step - 1) % 2):
        return g
    if method == "tail" and DECAY**step > 0.85:
        return g
    if method == "LookSAM" and step % 2:
        return g + 0.7 * g.norm() * memory["v"]
    g_p = flat_gradient(net, loss, ascent(method, net, g, memory))
    if method == "GSAM":
        return g_p - 0.3 * (g - (g @ g_p) / g_p.norm() ** 2 * g_p)
    if method in ("WSAM", "GNP"):
        return g + (4.0 if method == "WSAM" else 0.6) * (g_p - g)
    if method == "LookSAM":
        memory["v"] = unit(g_p - (g @ g_p) / g.norm() ** 2 * g)
    return g_p


def note_step(net, memory):
    """Remember the gradient that is about to be stepped on, and SGD's momentum after the step."""
    g = torch.cat([p.grad.flatten() for p in net.parameters()])
    memory["last"] = g.clone()
    memory["momentum"] = MOMENTUM * memory["momentum"] + g if "momentum" in memory else g.clone()
