"""Closed-form smallest adversarial perturbations, slow and obvious, in float64."""

from __future__ import annotations

import numpy as np
import torch

ORD = {"linf": float("inf"), "l2": 2, "l1": 1}


def norm_of(change, norm):
    return float(np.linalg.norm(change, ord=ORD[norm]))


def smallest_gain(slope, gain, x, norm):
    """The d of least norm with <slope, d> >= gain and x + d in [0,1]^n; None where there is none.

    Every pixel moves along the sign of its slope, at most to the end of the box. Linf: all by the
    same amount t, or to the end. L2: all in proportion s to their slope, or to the end. L1: one
    pixel after the other, steepest first.
    """
    a = np.abs(slope)
    room = np.where(slope > 0, 1 - x, x)
    if gain <= 0:
        return np.zeros_like(x)
    if a @ room < gain:
        return None
    if norm == "l1":
        moved = np.zeros_like(x)
        for i in np.argsort(-a):
            if a[i] > 0:
                moved[i] = min(room[i], (gain - a @ moved) / a[i])
        return np.sign(slope) * np.maximum(moved, 0)
    pace = np.ones_like(x) if norm == "linf" else a
    moved = smallest(lambda t: np.minimum(t * pace, room), lambda d: a @ d >= gain)
    return np.sign(slope) * moved


def smallest(path, enough):
    """path(t) with the least t >= 0 that is enough, for what grows along the path; by bisection."""
    low, high = 0.0, 1.0
    while not enough(path(high)) and high < 1e12:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(path(middle)) else (middle, high)
    return path(high)


def affine_perturbation(weight, bias, x, label, norm):
    """Smallest perturbation in the box that makes another class of Wx + b at least as large.

    One rival at a time, as each margin is affine; None where no rival can be reached.
    """
    weight, bias, x = (np.asarray(part.detach(), dtype=np.float64) for part in (weight, bias, x))
    found = []
    for rival in range(len(weight)):
        if rival != label:
            slope = weight[rival] - weight[label]
            found.append(smallest_gain(slope, bias[label] - bias[rival] - slope @ x, x, norm))
    reached = [change for change in found if change is not None]
    return min(reached, key=lambda change: norm_of(change, norm)) if reached else None


def sphere_perturbation(x, centre, radius, norm):
    """Smallest perturbation that brings x onto the sphere ||x - c||_2 = r, the box left aside.

    With v = |x - c|. L2: along the ray from c. Linf: outward every coordinate grows by t, inward
    every one shrinks by t, to 0 at most. L1: inward the largest coordinates are cut to one level;
    outward ||.||^2 is convex in the change and so largest at a corner of the L1 ball: one
    coordinate moves, and the largest needs least, as sqrt(v^2 + k) - v falls with v.
    """
    x, centre = (np.asarray(part, dtype=np.float64) for part in (x, centre))
    v, away = np.abs(x - centre), np.where(x >= centre, 1.0, -1.0)
    outward = v @ v < radius**2
    if norm == "l2":
        return (x - centre) * (radius / np.sqrt(v @ v) - 1)
    if norm == "linf" and outward:
        return away * smallest(
            lambda t: np.full_like(v, t), lambda d: (v + d) @ (v + d) >= radius**2
        )
    if norm == "linf":
        return -away * smallest(
            lambda t: np.minimum(v, t), lambda d: (v - d) @ (v - d) <= radius**2
        )
    if outward:
        moved, i = np.zeros_like(v), int(v.argmax())
        moved[i] = np.sqrt(v[i] ** 2 + radius**2 - v @ v) - v[i]
        return away * moved
    return -away * smallest(
        lambda t: np.maximum(v - max(v.max() - t, 0), 0), lambda d: (v - d) @ (v - d) <= radius**2
    )


class Sphere(torch.nn.Module):
    """Class 0 inside a sphere, class 1 outside: logits (r^2 - ||x - c||^2, 0)."""

    def __init__(self, centre, radius):
        super().__init__()
        self.centre, self.radius = centre, radius

    def forward(self, x):
        inside = self.radius**2 - (x - self.centre).square().sum(1)
        return torch.stack([inside, torch.zeros_like(inside)], 1)
