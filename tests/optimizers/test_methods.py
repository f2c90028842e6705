import inspect
from typing import get_args

import pytest
import torch
from cases import images, timm_net
from pydantic import TypeAdapter, ValidationError
from torch import nn
from typing_extensions import Unpack

import flatreg
from flatreg import SharpnessAware, optimizers
from flatreg.optimizers.methods import METHODS, Interval, Wrapper, settings_of, wrap
from flatreg.terms.protocol import Amount, Count

KINDS = get_args(get_args(Wrapper)[0])


def read(settings, union=Wrapper):
    return TypeAdapter(union).validate_python(settings)


@pytest.mark.parametrize("spec", KINDS, ids=lambda kind: kind.__name__)
def test_settings_and_defaults_are_those_of_the_method(spec):
    parameters = inspect.signature(getattr(optimizers, spec.__name__)).parameters
    own = {
        name: p.default
        for name, p in parameters.items()
        if p.kind is p.KEYWORD_ONLY and p.default is not p.empty
    }
    defaults = spec().model_dump(exclude={"kind", "scope", "begin_epoch"})
    assert own.items() <= defaults.items()
    everything = inspect.signature(SharpnessAware).parameters
    assert set(defaults) - set(own) <= set(everything)


def test_every_method_can_be_spelled():
    spelled = {kind.__name__ for kind in KINDS} | {"HeadRelativeSAM"}  # RelativeSAM, scope: head
    methods = {
        name
        for name in optimizers.__all__
        if inspect.isfunction(value := getattr(optimizers, name))
        and value.__module__ == optimizers.methods.__name__
    }
    assert spelled == methods


@pytest.mark.parametrize("kind", [kind.__name__ for kind in KINDS])
def test_wraps_with_scope_and_warm_up(kind):
    model, counts = timm_net(), {}
    for scope in (None, "head", 2):
        base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        spec = read({"kind": kind, "scope": scope, "begin_epoch": 1.5})
        wrapped = wrap(spec, base, model, images(2, size=32)[0], steps_per_epoch=10)
        assert wrapped.base is base and wrapped.begin == 15
        counts[scope] = len(wrapped.parameters(perturbed=True))
        assert base.param_groups[0]["sam_rho"] == (0.01 if kind == "AWP" else spec.rho)
    assert counts[None] == len(wrapped.parameters())
    assert counts["head"] == 2 < counts[2] < counts[None]


def test_mistakes_are_named():
    for settings, message in (
        ({"kind": "SAM", "rh": 1}, "Extra inputs"),
        ({"kind": "WSAM", "gamma": 1.0}, "less than 1"),
        ({"kind": "SAMM"}, "does not match any of the expected tags"),
        ({"kind": "SAM", "scope": "tail"}, "'head'"),
    ):
        with pytest.raises(ValidationError, match=message):
            read(settings)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("SAM", {"rho": "0.1"}, "rho must be >= 0 and finite, got '0.1'"),
        ("SAM", {"tail": "0.5"}, r"tail: expected a number in \(0, 1\], got '0.5'"),
        ("ASAM", {"eta": float("nan")}, "eta: .*finite number, got nan"),
        ("ASAM", {"eta": -1.0}, r"eta: .*, got -1\.0"),
        ("GSAM", {"alpha": float("inf")}, "alpha: .*, got inf"),
        ("LookSAM", {"alpha": -0.7}, r"alpha: .*, got -0\.7"),
        ("FriendlySAM", {"sigma": -1.0}, r"sigma: .*, got -1\.0"),
        ("FriendlySAM", {"decay": 2.0}, r"decay: .*, got 2\.0"),
        ("GNP", {"alpha": -0.5}, r"GNP: alpha: .*, got -0\.5"),
        ("GSAM", {"alpha": True}, "GSAM: alpha: expected a number, got True"),
        ("SAM", {"rho": True}, "rho must be >= 0 and finite, got True"),
        ("SAM", {"tail": True}, "tail: expected a number in .*, got True"),
        ("SAM", {"roh": 0.1}, "SAM: roh: expected one of rho, scope, .*; did you mean rho?"),
        ("AWP", {"rho": 0.1}, "AWP: rho: expected one of gamma, scope, .*no such setting"),
    ],
)
def test_python_refuses_the_settings_that_a_recipe_refuses(method, settings, message):
    base = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(ValueError, match=message) as told:
        getattr(flatreg, method)(base, **settings)
    assert "\n" not in str(told.value)


def test_a_method_of_ones_own_is_one_function():
    """Its place in the table of methods gives it the settings of a recipe."""

    def ToySAM(
        base, model: nn.Module, *, rho: Amount, depth: Count = 2, **options: Unpack[Interval]
    ):
        """A toy."""
        assert isinstance(model, nn.Module)
        return SharpnessAware(base, rho=rho * depth, **options)

    union = settings_of([*METHODS, ToySAM])
    settings = read({"kind": "ToySAM", "rho": "1/4", "scope": "head", "every": 3}, union)
    assert settings.model_dump(exclude={"scope"}) == {
        "kind": "ToySAM",
        "rho": 0.25,
        "depth": 2,
        "every": 3,
        "begin_epoch": 0.0,
        "tail": 1.0,
        "micro_batches": 1,
        "sync_perturbation": False,
    }
    assert type(settings).__doc__ == "A toy."
    model = timm_net()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped = wrap(settings, base, model, images(2, size=32)[0], steps_per_epoch=10)
    assert (wrapped.rho, wrapped.every, len(wrapped.parameters(perturbed=True))) == (0.5, 3, 2)
    for wrong, message in (
        ({}, "Field required"),
        ({"rho": -1}, "greater than or equal to 0"),
        ({"rho": 1, "depth": 0}, "greater than or equal to 1"),
    ):
        with pytest.raises(ValidationError, match=message):
            read({"kind": "ToySAM", **wrong}, union)
