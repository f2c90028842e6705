import json
import textwrap
from typing import get_args

import pytest

import flatreg
from flatreg.attacks.cascade import PRESETS
from flatreg.data.sources import Data
from flatreg.measures.manifold import Manifold
from flatreg.optimizers.methods import Wrapper
from flatreg.run.catalogue import FILE, TOPICS, listing, read_classes
from flatreg.terms import Criterion, Penalty
from flatreg.terms.protocol import Schedule

UNIONS = {
    "criteria": Criterion,
    "penalties": Penalty,
    "schedules": Schedule,
    "manifolds": Manifold,
    "wrappers": Wrapper,
    "data": Data,
}


def block(text, kind):
    """The lines of one kind."""
    lines = iter(text.splitlines())
    first = next(line for line in lines if line.split()[:1] == [kind])
    rest = []
    for line in lines:
        if not line.startswith("    "):
            break
        rest.append(line)
    return " ".join(" ".join([first, *rest]).split())


@pytest.mark.parametrize("topic", UNIONS)
def test_every_kind_is_listed_with_every_setting(topic):
    text = listing(topic)
    for member in get_args(get_args(UNIONS[topic])[0]):
        fields = member.__pydantic_fields__
        names = [name for name, field in fields.items() if field.repr]
        found = block(text, fields["kind"].default)
        for name in names:
            assert name == "kind" or name in found, f"{member.__name__}.{name}"
        documented = getattr(flatreg, member.__name__, member) if topic == "wrappers" else member
        first = textwrap.dedent(documented.__doc__).strip().split("\n")[0]
        assert " ".join(first.split()) in found


def test_settings_are_as_they_are():
    text = listing()
    assert block(text, "SAM").endswith("sync_perturbation=False")
    assert " rho=0.05, scope=None|head|int, every=1," in block(text, "SAM")
    assert "size=32, test=0.2, validation=0.0, limit=None" in block(text, "digits")
    assert "name (one of MNIST, FashionMNIST," in block(text, "torchvision")
    assert "schedule=None|WarmUp|EpsWarmUp" in block(text, "GradAlign")
    curvature = block(text, "OffManifoldCurvature")
    assert "eps, estimator=second_difference|" in curvature
    assert "manifold=IdentityManifold|PCA" in curvature
    assert curvature.endswith("strength=1.0, schedule=None|WarmUp|EpsWarmUp")
    assert "fitted" not in text


def test_presets_are_listed_stage_by_stage():
    text = listing("attacks")
    assert [line.split()[0] for line in text.splitlines() if line[:3].strip()][1:] == list(PRESETS)
    assert "pgd(loss=margin, steps=10, step_size=0.5) > apgd(" in block(text, "standard")


def test_topics_and_width():
    whole = listing()
    for topic in TOPICS:
        lines = listing(topic).splitlines()
        assert lines[0] == topic and "\n".join(lines).split("\n\n")[0] in whole
    assert max(map(len, whole.splitlines())) <= 100
    assert all(line == line.rstrip() for line in whole.splitlines())
    with pytest.raises(ValueError, match=r"^topic: expected one of criteria, .* got 'models'$"):
        listing("models")
    with pytest.raises(ValueError, match=r"got 'penaltys'; did you mean penalties\?$"):
        listing("penaltys")


def test_the_catalogue_is_that_of_the_classes():
    """After a change of a kind, `python -m flatreg.run.catalogue` writes the file again."""
    assert json.loads(FILE.read_text()) == read_classes()
    assert tuple(read_classes()) == TOPICS
