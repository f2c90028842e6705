"""Losses and attacked images against those of the last release, stored by `parity.py --write`.

On the kernels that wrote them the numbers are equal to the last bit ("==" in the name of a test);
on others, which may round otherwise, to a relative 1e-9 (1e-6 for a penalty that draws in float32).
Another last bit in the first weights moves them by 1e-14.
"""

import json

import pytest
from parity import (
    CASES,
    COARSE,
    CRITERIA,
    FILE,
    PENALTIES,
    RELATIVE,
    compute,
    machine,
    stored_form,
)

from flatreg.optimizers.methods import METHODS
from flatreg.run.catalogue import read_classes

STORED = json.loads(FILE.read_text(encoding="utf-8"))
SAME_KERNELS = STORED["machine"] == machine()


def tolerance(name):
    return next((part for kind, part in COARSE.items() if kind in name), RELATIVE)


def how(name):
    return f"{name}: {'==' if SAME_KERNELS else f'to {tolerance(name):g}'}"


@pytest.mark.parametrize("name", CASES, ids=how)
def test_no_number_has_moved(name):
    stored, found = STORED["cases"][name], stored_form(compute(name))
    if SAME_KERNELS:
        assert found == stored
    then, now = (list(map(float.fromhex, row["some"])) for row in (stored, found))
    assert now == pytest.approx(then, rel=tolerance(name), abs=0)


def test_every_method_penalty_and_criterion_has_numbers_of_its_own():
    kinds = read_classes()
    assert {p.kind for p in PENALTIES} == set(kinds["penalties"])
    assert {c.kind for c in CRITERIA} == set(kinds["criteria"])
    assert STORED["cases"].keys() == CASES.keys() >= {f"method {m.__name__}" for m in METHODS}
    trainings = [row["all"] for name, row in STORED["cases"].items() if "attack" not in name]
    assert len(set(trainings)) == len(trainings)
