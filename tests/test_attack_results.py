"""Images that attacks return: in the ball, one a sample, and no query after it is fooled."""

import dataclasses
from functools import partial

import pytest
import torch
from cases import Noisy, trained_net
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

from flatreg import evaluate
from flatreg.attacks import (
    apgd,
    cascade,
    eot,
    fmn,
    noise,
    pgd,
    race,
    random_search,
    spot_check,
    square,
)
from flatreg.attacks.options import AttackResult
from flatreg.threat import distance

QUIET = dict(progress=False, diagnose=False)


@pytest.fixture(scope="module")
def case():
    model, x, y = trained_net(n=80)
    return model, TensorDataset(x, y), x, y


@pytest.mark.parametrize("steps", [2, 3, 5, 9])
def test_survivors_of_a_search_that_may_leave_the_ball_are_in_it(case, tmp_path, steps):
    model, data, x, y = case
    attack = [partial(fmn, steps=steps)]
    options = dict(eps=0.02, attack=attack, folder=tmp_path, save_inputs=True, **QUIET)
    result = evaluate(model, data, **options)
    saved = load_file(tmp_path / "adversarial.safetensors")["inputs"]
    assert float(distance(saved, x, "linf").max()) <= 0.02 + 1e-7
    assert int((model(saved).argmax(1) == y).sum()) == result.attacked.count > 5
    direct = fmn(model, x, y, eps=0.02, steps=steps)
    assert float(distance(direct.inputs, x, "linf").max()) <= 0.02 + 1e-7


def test_images_of_an_earlier_evaluation_do_not_stay_beside_a_later_one(case, tmp_path):
    _, data, *_ = case
    options = dict(attack="fast", folder=tmp_path, **QUIET)
    evaluate(case[0], data, eps=0.02, save_inputs=True, **options)
    assert (tmp_path / "adversarial.safetensors").exists()
    evaluate(case[0], data, eps=0.03, **options)
    found = sorted(path.name for path in tmp_path.glob("*.*") if path.is_file())
    assert {"evaluation.json", "samples.csv"} <= set(found)
    assert "adversarial.safetensors" not in found


def test_an_image_outside_the_ball_is_replaced_and_refused_where_it_is_reported_as_fooling(case):
    model, data, x, y = case

    def outside(model, inputs, labels, **options):
        far = (inputs + 0.5).clamp(0, 1)
        return AttackResult(far, torch.full_like(labels, -1), len(inputs), 0)

    result = evaluate(model, data, eps=0.02, attack=outside, **QUIET)
    assert result.attacked == result.clean
    assert result.attacked_margins == [
        m if v > -2 else None for m, v in zip(result.margins, result.verdicts, strict=True)
    ]

    def reporting(model, inputs, labels, **options):
        return dataclasses.replace(outside(model, inputs, labels), fooled_by=0 * labels)

    with pytest.raises(RuntimeError, match="left its threat model"):
        cascade(model, x, y, eps=0.02, attacks=[reporting])


SEVERAL = {
    "targets": partial(apgd, loss="dlr", targets=4, steps=20),
    "restarts": partial(pgd, restarts=4, random_start=True),
    "fmn": partial(fmn, targets=4, steps=20),
    "nearest": lambda *a, eps, **o: fmn(*a, targets=3, steps=10, **o),
}


@pytest.mark.parametrize("attack", SEVERAL)
def test_of_several_jobs_that_hit_at_once_one_image_is_returned(case, attack, monkeypatch):
    """Rows written twice in one call may mix, on several threads: no call has any."""
    model, _, x, y = case
    write, doubled = torch.Tensor.__setitem__, []

    def checked(tensor, where, values):
        if isinstance(where, torch.Tensor) and where.dtype == torch.long:
            doubled.append(len(where) - len(where.unique()))
        write(tensor, where, values)

    monkeypatch.setattr(torch.Tensor, "__setitem__", checked)
    result = SEVERAL[attack](model, x, y, eps=0.03)
    assert len(doubled) > 10 and sum(doubled) == 0
    assert torch.equal(model(result.inputs).argmax(1) != y, result.fooled)


class HostWaits(TorchDispatchMode):
    """Counts the operations whose result the host must have, and so waits for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        asks = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal")
        masks = args[1] if name in ("aten::index.Tensor", "aten::index_put_") else ()
        self.count += name in asks or any(m is not None and m.dtype == torch.bool for m in masks)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("attack", SEVERAL)
def test_the_host_waits_a_few_times_a_query_and_batches_are_full(case, attack):
    """Whatever the size of the batch: one wait for each mask would be some twenty."""
    model, _, x, y = case
    batches = []
    handle = model.register_forward_hook(lambda _, inputs, __: batches.append(len(inputs[0])))
    with HostWaits() as waits:
        result = SEVERAL[attack](model, x, y, eps=0.03, batch_size=8)
    handle.remove()
    assert bool(result.fooled.any())
    assert waits.count / len(batches) < 12
    assert sum(batches) / len(batches) > 0.85 * 8


EARLY_STOP = {  # each takes nine queries; and the eps
    "apgd": (partial(apgd, steps=8), 0.03),
    "apgd l1": (partial(apgd, steps=8, norm="l1"), 1.0),
    "fmn": (partial(fmn, steps=8), 0.03),
    "square": (partial(square, queries=9), 0.06),
    "noise": (partial(noise, draws=9), 0.2),
    "random search": (partial(random_search, queries=9), 0.2),
}


@pytest.mark.parametrize("attack", EARLY_STOP)
def test_a_sample_is_queried_until_it_is_fooled_and_not_once_more(case, attack):
    """Counted from outside: its queries end with the first one that is wrong and in the ball."""
    model, _, x, y = case
    search, eps = EARLY_STOP[attack]
    norm = search.keywords.get("norm", "linf")
    seen = [[] for _ in x]

    def callback(row, step, at, left):
        inside = distance(at, x[row], norm) <= eps + 1e-4
        hit = (model(at).argmax(1) != y[row]) & inside
        for r in row.unique().tolist():  # of a sample's jobs several may run at once
            seen[r].append((bool(hit[row == r].any()), int((row == r).sum())))

    result = search(model, x, y, eps=eps, callback=callback)
    for queries, fooled in zip(seen, result.fooled.tolist(), strict=True):
        hits, points = zip(*queries, strict=True)
        assert not any(hits[:-1]) and hits[-1] == fooled and sum(points) <= 9
        assert fooled or sum(points) == 9
    assert 0 < int(result.fooled.sum()) < len(x)


@pytest.mark.parametrize(
    "attack",
    [
        pgd,
        partial(race, heats=((2, 3, 1.5),), fmn=(1, 3), apgd=(1, 3)),
        partial(cascade, attacks="fast"),
        partial(spot_check, attack=pgd),
        partial(fmn, steps=2),
    ],
    ids=["pgd", "race", "cascade", "spot check", "fmn"],
)
def test_indices_are_one_a_sample_in_any_sequence(case, attack):
    model, _, x, y = case
    for wrong in ([1, 2], range(9)):
        with pytest.raises(ValueError, match=f"^indices: .* each of 4 samples, got {len(wrong)}$"):
            attack(model, x[:4], y[:4], eps=0.02, indices=wrong)
    listed, tensor = (
        attack(model, x[:4], y[:4], eps=0.02, indices=i)
        for i in ([7, 3, 5, 9], torch.tensor([7, 3, 5, 9]))
    )
    assert torch.equal(listed.inputs, tensor.inputs)


def test_the_callback_of_a_later_stage_names_samples_of_the_batch(case):
    model, _, x, y = case
    stages = [partial(pgd, steps=5), partial(spot_check, attack=partial(pgd, steps=3), samples=5)]
    fooled = cascade(model, x, y, eps=0.025, attacks=stages[:1]).fooled
    met = []

    def callback(row, step, at, left):
        assert bool((distance(at, x[row], "linf") <= 0.025 + 1e-7).all())
        met.append(row)

    cascade(model, x, y, eps=0.025, attacks=stages, callback=callback)
    assert 0 < int(fooled.sum()) < len(x) and not bool(fooled[met[-1]].any())


def test_a_lucky_pass_of_a_random_forward_fools_nothing(case):
    """One PGD that never stops early, whose last image is voted on, is no stronger than `rand`."""
    model, data, _, _ = case
    noisy = Noisy(model, 0.15)

    def whole(model, inputs, labels, **options):
        result = pgd(model, inputs, labels, steps=10, early_stop=False, **options)
        return dataclasses.replace(result, fooled_by=0 * labels)  # let the votes decide

    options = dict(eps=0.02, samples=60, votes=15, **QUIET)
    plain = evaluate(noisy, data, attack=[partial(eot, attack=whole, draws=5)], **options)
    stages = [
        partial(eot, attack=partial(pgd, steps=10), draws=5),
        partial(eot, attack=partial(apgd, loss="margin", steps=10), draws=5),
    ]
    both = evaluate(noisy, data, attack=stages, **options)
    assert both.attacked.count <= plain.attacked.count + 2
    assert both.clean.count > both.attacked.count + 10


def test_eot_takes_radii_a_sample_and_counts_every_draw(case):
    model, _, x, y = case
    eps = torch.full((len(x),), 0.06)
    eps[::2] = 0
    passes = []
    handle = model.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    result = eot(model, x, y, attack=partial(pgd, steps=3), draws=4, eps=eps)
    handle.remove()
    assert sum(passes) == result.forwards and torch.equal(result.inputs[::2], x[::2])
    assert int(result.fooled[::2].sum()) < int(result.fooled[1::2].sum())


def test_a_radius_without_a_dimension_and_searches_with_nothing_left(case):
    model, _, x, y = case
    one = cascade(model, x, y, eps=torch.tensor(0.03), attacks="fast")
    assert torch.equal(one.fooled, cascade(model, x, y, eps=0.03, attacks="fast").fooled)
    flat = nn.Sequential(nn.Unflatten(1, (1, 16, 16)), model)
    found = square(flat, x.flatten(1), y, eps=0.5, queries=30, restarts=2, batch_size=8)
    assert int(found.fooled.sum()) > 70
