"""Numbers that no release moves unnoticed: 100 losses of every method, penalty and criterion.

`python tests/parity.py --write` stores them in `parity.json`, `tests/test_parity.py` compares.
Everything runs in float64 on the CPU, on a network of linear maps and tanh.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from cases import PENALTIES
from torch import nn

from flatreg import (
    APGDAT,
    FGSMPGI,
    FGSMRS,
    FGSMRSCS,
    LIET,
    MART,
    NFGSM,
    NUAT,
    PGDAT,
    SAM,
    TRADES,
    Brier,
    CrossEntropy,
    Memory,
    Objective,
    backward,
)
from flatreg.attacks import apgd, cascade, eot, fgsm, fmn, noise, pgd, race, random_search, square
from flatreg.optimizers.methods import METHODS

FILE = Path(__file__).with_name("parity.json")
STEPS, KEPT = 100, 10  # every tenth loss is stored as it is, the digest is of all
RELATIVE = 1e-9  # on other kernels
COARSE = {"JacobianNorm": 1e-6}  # its directions are drawn in float32
EPS = 0.1


def batch(n=16, size=4):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, 1, size, size, generator=generator, dtype=torch.float64)
    return x, x.flatten(1).unfold(1, 4, 3).sum(2).argmax(1)  # the brightest of five stretches


def network():
    torch.manual_seed(0)
    wide = partial(nn.Linear, dtype=torch.float64)  # float32 draws round otherwise elsewhere
    layers = (nn.Flatten(), wide(16, 12), nn.Tanh(), wide(12, 12), nn.Tanh(), wide(12, 5))
    return nn.Sequential(*layers)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)


def losses_of_method(make):
    """Losses of a training by a sharpness-aware optimizer, at the unperturbed weights."""
    model, losses = network(), []
    optimizer, closure = make(sgd(model), model), Objective(model).bind(*batch())
    for _ in range(STEPS):
        losses.append(float(backward(optimizer, closure).total))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def losses_of_terms(criterion, penalties=()):
    """Losses of a training by SGD."""
    model, (x, y), losses = network(), batch(), []
    memory, places = Memory(samples=len(x)), torch.arange(len(x))
    optimizer, objective = sgd(model), Objective(model, criterion, penalties, memory=memory)
    for step in range(STEPS):
        memory.start_epoch(step // 10)
        loss = objective.bind(x, y, places)().total
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def result_of_attack(attack, norm):
    """Sum of the attacked images, how many are fooled, and every pixel."""
    model, (x, y) = network(), batch(n=32)
    optimizer = sgd(model)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    eps = {"linf": 0.05, "l2": 0.2, "l1": 0.6}[norm]
    result = attack(model.eval(), x, y, eps=eps, norm=norm)
    counts = (int(result.fooled.sum()), result.forwards, result.backwards)
    return [float(result.inputs.sum()), *map(float, counts), *result.inputs.flatten().tolist()]


def method(function):
    """A wrapper of one of `METHODS` by its defaults, but for a radius that moves something."""
    radius = {"AWP": {"gamma": 0.05}, "WSAM": {"rho": 0.01}}.get(function.__name__, {"rho": 0.1})
    if "model" in inspect.signature(function).parameters:
        return lambda base, model: function(base, model, **radius)
    return lambda base, model: function(base, **radius)


CRITERIA = [
    CrossEntropy(),
    Brier(),
    NFGSM(eps=EPS),
    FGSMRS(eps=EPS),
    FGSMRSCS(eps=EPS),
    FGSMPGI(eps=EPS, reset=4),
    LIET(eps=EPS),
    NUAT(eps=EPS),
    PGDAT(eps=EPS, steps=3),
    APGDAT(eps=EPS, steps=3),
    TRADES(eps=EPS, steps=3),
    MART(eps=EPS, steps=3),
]
ATTACKS = {
    "pgd": partial(pgd, steps=10),
    "pgd cross-entropy": partial(pgd, steps=10, loss="cross_entropy"),
    "apgd": partial(apgd, steps=15),
    "apgd targeted": partial(apgd, steps=15, loss="dlr", targets=3),
    "fmn": partial(fmn, steps=15),
    "square": partial(square, queries=40),
    "fgsm": fgsm,
    "noise": noise,
    "random_search": partial(random_search, queries=20),
    "eot": partial(eot, attack=partial(pgd, steps=4), draws=2),
    "race": partial(race, heats=((3, 4, 2.5), (2, 8, 1.5)), fmn=(1, 5), apgd=(2, 10)),
    "cascade": partial(cascade, attacks="fast"),
}


def named(term):
    """Its kind and the settings that are not the defaults of a number."""
    words = (getattr(term, key, "") for key in ("estimator", "method", "subtract_curvature"))
    return "-".join([term.kind, *(str(word) for word in words if word)])


CASES = {
    **{f"method {f.__name__}": partial(losses_of_method, method(f)) for f in METHODS},
    **{
        f"method SAM, {name}": partial(losses_of_method, make)
        for name, make in {
            "every third step": lambda base, _: SAM(base, rho=0.1, every=3, begin=2),
            "head": lambda base, model: SAM(base, rho=0.1, scope=model[5]),
            "micro-batches": lambda base, _: SAM(base, rho=0.1, micro_batches=2),
        }.items()
    },
    **{f"penalty {named(p)}": partial(losses_of_terms, None, [p]) for p in PENALTIES},
    **{f"criterion {c.kind}": partial(losses_of_terms, c) for c in CRITERIA},
    **{
        f"attack {name} {norm}": partial(result_of_attack, attack, norm)
        for name, attack in ATTACKS.items()
        for norm in ("linf", "l2", "l1")
        if (name, norm) != ("apgd targeted", "l1")
    },
}


def compute(name):
    """The numbers of a case, from fixed seeds, in deterministic kernels of one thread."""
    before = torch.get_rng_state(), torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(1)
    try:
        return CASES[name]()
    finally:
        torch.set_rng_state(before[0])
        torch.use_deterministic_algorithms(before[1])


def digest(numbers):
    return hashlib.sha256("".join(map(float.hex, numbers)).encode()).hexdigest()[:16]


def stored_form(numbers):
    """Every tenth loss, or the four sums of an attack; the digest of all numbers."""
    some = numbers[::KEPT] if len(numbers) == STEPS else numbers[:4]
    return {"some": [value.hex() for value in some], "all": digest(numbers)}


def machine():
    """What decides on the last bit: the version of torch, and the kernels it takes here.

    Linear algebra libraries choose kernels by the processor, and do not say which: hence the
    digest of what they compute.
    """
    x, y = batch(n=64, size=8)
    a, b = x.flatten(1), x.flatten(1).flip(0) + y[:, None]
    probe = [
        *(a[:n, :k] @ b[:n, :k].T for n, k in ((16, 16), (16, 12), (5, 12), (32, 16), (64, 64))),
        *(f(b) for f in (torch.tanh, torch.exp, torch.log1p, torch.sin, torch.erfinv)),
        *(b.sum(0), b.sum(1), b.norm(), b.softmax(1), torch.linalg.qr(b[:, :8])[0]),
    ]
    values = torch.cat([part.flatten() for part in probe]).nan_to_num(0).tolist()
    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "kernels": digest(values),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="replace parity.json")
    write = parser.parse_args().write
    torch.set_num_threads(1)
    found = {name: stored_form(compute(name)) for name in CASES}
    old = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {"cases": {}}
    for name in sorted(found.keys() | old["cases"].keys()):
        if found.get(name) != old["cases"].get(name):
            print(f"{name}: {'new' if name not in old['cases'] else 'moved'}")
    if write:
        rows = ",\n".join(f'  "{name}": {json.dumps(row)}' for name, row in found.items())
        head = json.dumps(machine())
        FILE.write_text(f'{{"machine": {head},\n "cases": {{\n{rows}\n }}}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
