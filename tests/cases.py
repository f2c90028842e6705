"""Small models and data that many tests share."""

from __future__ import annotations

import copy
import json
from functools import cache, partial

import timm
import torch
from torch import nn

import flatreg
from flatreg import (
    GradAlign,
    InputGradient,
    JacobianNorm,
    LayerFlatness,
    LocalLinearity,
    MarginBound,
    OffManifoldConfidence,
    OffManifoldCurvature,
    RelativeFlatness,
)
from flatreg.attacks import apgd, fmn, pgd, race, spot_check, square

METHODS = ("finite_difference", "double_backward")
CURVATURES = ("second_difference", "chord", "elle", "gradient_difference", "fisher")
# Every kind of penalty in every form, for the loops it must run in.
PENALTIES = [
    RelativeFlatness(strength=0.1),
    *(LayerFlatness(strength=0.1, method=m) for m in METHODS),
    *(InputGradient(strength=0.5, eps=0.1, method=m) for m in METHODS),
    *(MarginBound(strength=0.5, eps=0.1, method=m) for m in METHODS),
    MarginBound(strength=0.5, eps=0.1, step=0.25, subtract_curvature=True),
    *(OffManifoldCurvature(strength=0.5, eps=0.1, estimator=e) for e in CURVATURES),
    OffManifoldConfidence(strength=0.5, eps=0.1, floor=1e4),
    GradAlign(strength=0.5, eps=0.1),
    *(LocalLinearity(strength=0.5, eps=0.1, method=m) for m in METHODS),
    *(JacobianNorm(strength=0.5, eps=0.1, method=m) for m in METHODS),
]
# LayerFlatness by double backward needs a third derivative, which BatchNorm has in eval mode only.
TRAINED_WITH_BATCH_NORM = [
    p for p in PENALTIES if (p.kind, getattr(p, "method", "")) != ("LayerFlatness", METHODS[1])
]


def images(n=8, channels=1, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, channels, size, size, generator=generator)
    return x, torch.randint(0, 5, (n,), generator=generator)


def small_net(seed=0, batch_norm=True, dropout=0.0, dtype=torch.float32):
    """Convolutions, a smooth activation, BatchNorm, dropout, and a linear head of 5 classes."""
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(6) if batch_norm else nn.Identity()
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, padding=1),
        norm,
        nn.SiLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(32, 5),
    ).to(dtype)


def timm_net(name="test_convnext3", seed=0):
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=5, in_chans=1)
    return flatreg.with_normalization(model, [0.5], [0.5])


def trained_net(n=128, seed=0, steps=150):
    """`small_net` fitted to the brightest of five strips; its data comes with it.

    It is fitted once: a later call copies it, and leaves random stream and gradients as the first.
    """
    fitted, x, y, stream = _fitted_net(n, seed, steps)
    torch.set_rng_state(stream)
    model = copy.deepcopy(fitted)
    for own, weight in zip(model.parameters(), fitted.parameters(), strict=True):
        own.grad = weight.grad.clone()
    return model, x.clone(), y.clone()


@cache
def _fitted_net(n, seed, steps):
    x, _ = images(n, seed=seed)
    y = x[..., :15].reshape(n, 1, 16, 5, 3).mean((1, 2, 4)).argmax(1)
    model = small_net(seed, batch_norm=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), x, y, torch.get_rng_state()


LIGHT = (  # every kind of stage that "standard" has, at a twentieth of its price
    partial(pgd, steps=10),
    partial(apgd, steps=10),
    partial(fmn, targets=3, steps=5),
    partial(race, heats=((4, 5, 2.5), (2, 8, 1.5)), fmn=(1, 5), apgd=(2, 10)),
    partial(spot_check, attack=partial(square, queries=50), samples=16),
)


class Noisy(nn.Module):
    """A random forward."""

    def __init__(self, model, size):
        super().__init__()
        self.model, self.size = model, size

    def forward(self, x):
        return self.model(x + self.size * torch.randn_like(x))


def refused(stored, file, read):
    """How many copies of a JSON file `read` refuses, in one line each; it may take the others.

    Of each copy one place is gone or of another kind.
    """
    count = 0
    for wrong in _altered(stored):
        file.write_text(json.dumps(wrong))
        try:
            read(file.parent)
        except ValueError as error:
            assert "\n" not in str(error)
            count += 1
    return count


def _altered(stored):
    places, left = [], [(key,) for key in stored]
    while left:
        place = left.pop()
        places.append(place)
        value = stored
        for key in place:
            value = value[key]
        inside = range(min(1, len(value))) if isinstance(value, list) else value
        left += [(*place, key) for key in inside] if isinstance(value, dict | list) else []
    for *parents, last in places:
        for other in ("gone", None, "x", -1, [], {}, {"value": "x", "stderr": 1}):
            result = copy.deepcopy(stored)
            around = result
            for key in parents:
                around = around[key]
            if other == "gone":
                del around[last]
            else:
                around[last] = other
            yield result
