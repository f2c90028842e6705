"""One keyword, one meaning: which functions and settings may use a word that had several."""

import dataclasses
import inspect
from typing import get_args

import numpy as np
import pytest

import flatreg
from flatreg import measures
from flatreg.optimizers import methods
from flatreg.terms import Criterion, Penalty
from flatreg.terms.protocol import Schedule

# word -> (what it means, who takes it). A wrapper's words are its own, but for `rho`.
MEANINGS = {
    "rho": ("radius in the weights", {"worst_case_sharpness"}),
    "std": ("standard deviation of noise on the weights", {"average_case_sharpness"}),
    "matrix": (
        "curvature matrix in the weights",
        {"layer_flatness", "flatness_draws", "hessian_top_eigenvalue", "hessian_trace_estimate"},
    ),
    "second_order": ("what bounds the second derivative", {"local_bound"}),
    "subtract_curvature": (
        "whether a bound is to second order",
        {"linearised_margin", "MarginBound"},
    ),
    "step": (
        "length of a finite difference",
        {
            "second_difference",
            "gradient_difference",
            "gradient_dual_norm",
            "local_linearity",
            "jacobian_norm_forward",
            "gauss_newton_flatness",
            "linearised_margin",
            "InputGradient",
            "MarginBound",
        },
    ),
    "fraction": (
        "part of a whole, in (0, 1]",
        {"chord", "WarmUp", "EpsWarmUp", "OffManifoldCurvature"},
    ),
    "curvature": ("nothing: it had four meanings", set()),
    "share": ("nothing: a part of a whole is a `fraction`, a factor of a loss a weight", set()),
}


def keywords(thing):
    if dataclasses.is_dataclass(thing):
        return {field.name for field in dataclasses.fields(thing)}
    return set(inspect.signature(thing).parameters)


TERMS = [m for union in (Criterion, Penalty, Schedule) for m in get_args(get_args(union)[0])]
TAKERS = {thing.__name__: keywords(thing) for thing in TERMS} | {
    name: keywords(getattr(measures, name))
    for name in measures.__all__
    if inspect.isfunction(getattr(measures, name))
}


def test_a_word_is_taken_by_what_it_means():
    takers = {word: {n for n, words in TAKERS.items() if word in words} for word in MEANINGS}
    assert takers == {word: named for word, (_, named) in MEANINGS.items()}


def test_the_radius_of_the_wrappers_is_rho():
    names = [name for name in ("SAM", "ASAM", "RelativeSAM", "GSAM") if hasattr(methods, name)]
    assert names and all("rho" in keywords(getattr(flatreg, name)) for name in names)


CONFIGURED = [
    one
    for one in (getattr(flatreg, name) for name in flatreg.__all__)
    if getattr(one, "__pydantic_config__", {}).get("extra") == "forbid"
]


@pytest.mark.parametrize("kind", CONFIGURED, ids=lambda kind: kind.__name__)
def test_a_mistake_in_a_term_or_a_manifold_is_one_line(kind):
    with pytest.raises(ValueError, match=f"^{kind.__name__}: kynd: there .* did you mean kind.$"):
        kind(kynd=1)
    with pytest.raises(TypeError, match=f"^{kind.__name__}: expected settings by name, got 0.1$"):
        kind(0.1)
    with pytest.raises(TypeError) as error:
        kind(np.zeros((9, 9)))
    assert "\n" not in str(error.value)


def test_a_schedule_of_another_kind_is_refused_by_its_name():
    with pytest.raises(ValueError, match=r"^NFGSM: schedule: expected EpsWarmUp, got WarmUp\("):
        flatreg.NFGSM(eps=0.1, schedule=flatreg.WarmUp(fraction=0.5))


@pytest.mark.parametrize(("given", "got"), [(-1, "equal to 0, got -1"), (True, "Tr")])
def test_a_wrong_number_is_shown(given, got):
    with pytest.raises(ValueError, match=f"^RelativeFlatness: strength: .*{got}") as error:
        flatreg.RelativeFlatness(strength=given)
    assert "\n" not in str(error.value)
