"""What a verdict rests on: the images returned, the model and data recorded, the model beneath."""

import copy
import dataclasses
import importlib
import re
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from cases import trained_net
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from flatreg import adaptive_attack_check, binarization_test, compare, evaluate
from flatreg.attacks import apgd, cascade, eot, fmn, noise, pgd, random_search, square
from flatreg.attacks.options import AttackResult
from flatreg.data import loading as sharding
from flatreg.evaluation import attack_path
from flatreg.models.forward import in_float32, local_module
from flatreg.threat import distance

evaluating = importlib.import_module("flatreg.evaluation.evaluate")

QUIET = dict(progress=False, diagnose=False)


@pytest.fixture(scope="module")
def case():
    model, x, y = trained_net(n=80)
    return model, TensorDataset(x, y), x, y


class Noisy(nn.Module):
    """A random forward."""

    def __init__(self, model, size):
        super().__init__()
        self.model, self.size = model, size

    def forward(self, x):
        return self.model(x + self.size * torch.randn_like(x))


class Cold(nn.Module):
    """The same weights and layers, other logits."""

    def __init__(self, model, temperature):
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, x):
        return self.model(x) / self.temperature


# what lies in the folder is of the samples and the model at hand


@pytest.mark.parametrize("changed", ["image", "label", "logits", "layers"])
def test_records_of_other_data_or_another_model_are_not_taken(case, tmp_path, changed):
    model, _, x, y = case
    options = dict(eps=0.02, attack="fast", folder=tmp_path, **QUIET)
    evaluate(Cold(model, 1.0), TensorDataset(x, y), **options)
    other = Cold(model, 2.0 if changed == "logits" else 1.0)
    if changed == "layers":  # the state of another network: nothing is refused, all is done anew
        other = nn.Sequential(model, nn.Softshrink(0.5))
        alone = evaluate(other, TensorDataset(x, y), **options | {"folder": None})
        assert evaluate(other, TensorDataset(x, y), **options).margins == alone.margins
        return
    x, y = x.clone(), y.clone()
    if changed == "image":
        x[3, 0, 0, 0] = 1 - x[3, 0, 0, 0]
    if changed == "label":
        y[3] = (y[3] + 1) % 5
    with pytest.raises(ValueError, match="take another folder") as error:
        evaluate(other, TensorDataset(x, y), **options)
    assert "\n" not in str(error.value)


def test_a_random_forward_goes_on_from_its_records(case, tmp_path):
    model, data, _, _ = case
    options = dict(eps=0.02, attack="fast", votes=3, **QUIET)
    once = evaluate(Noisy(model, 0.1), data, **options, folder=tmp_path)
    again = evaluate(Noisy(model, 0.1), data, **options, folder=tmp_path)
    assert once.verdicts == again.verdicts and once.margins == again.margins


def test_images_are_kept_only_where_they_are_asked_for(case, tmp_path):
    model, data, x, _ = case
    options = dict(eps=0.03, attack="fast", curve=[0.01], other_threats={"l2": 0.2}, **QUIET)
    for name, save in (("lean", False), ("full", True)):
        evaluate(model, data, **options, folder=tmp_path / name, save_inputs=save)
    stored = [
        sum(
            t.numel()
            for f in (tmp_path / n / "state").rglob("*.safetensors")
            for t in load_file(f).values()
        )
        for n in ("lean", "full")
    ]
    assert stored[0] < x.numel() / 4 < stored[1] - stored[0] < 2 * x.numel()


def test_numpy_radii_and_settings_of_any_length_can_be_recorded(case, tmp_path):
    model, data, _, _ = case

    def tried(model, inputs, labels, *, ladder, **options):
        return pgd(model, inputs, labels, steps=2, **options)

    attack = partial(tried, ladder=torch.rand(300))
    result = evaluate(
        model,
        data,
        eps=np.float32(0.03),
        attack=attack,
        curve=[np.float32(0.02)],
        folder=tmp_path,
        **QUIET,
    )
    assert result.n == 80 and len(list(tmp_path.glob("state/*/*.safetensors"))) > 2


# what is returned lies in the ball, and is what was claimed


@pytest.mark.parametrize("steps", [2, 3, 5, 9])
def test_survivors_of_a_search_that_strays_are_in_the_ball(case, tmp_path, steps):
    model, data, x, y = case
    attack = [partial(fmn, steps=steps)]
    options = dict(eps=0.02, attack=attack, folder=tmp_path, save_inputs=True, **QUIET)
    result = evaluate(model, data, **options)
    saved = load_file(tmp_path / "adversarial.safetensors")["inputs"]
    assert float(distance(saved, x, "linf").max()) <= 0.02 + 1e-7
    assert int((model(saved).argmax(1) == y).sum()) == result.attacked.count > 5
    direct = fmn(model, x, y, eps=0.02, steps=steps)
    assert float(distance(direct.inputs, x, "linf").max()) <= 0.02 + 1e-7


def test_what_an_attack_of_yours_leaves_outside_is_replaced_and_what_it_claims_is_refused(case):
    model, data, x, y = case

    def strays(model, inputs, labels, **options):
        far = (inputs + 0.5).clamp(0, 1)
        return AttackResult(far, torch.full_like(labels, -1), len(inputs), 0)

    result = evaluate(model, data, eps=0.02, attack=strays, **QUIET)
    assert result.attacked == result.clean
    assert result.attacked_margins == [
        m if v > -2 else None for m, v in zip(result.margins, result.verdicts, strict=True)
    ]

    def claims(model, inputs, labels, **options):
        return dataclasses.replace(strays(model, inputs, labels), fooled_by=0 * labels)

    with pytest.raises(RuntimeError, match="left its threat model"):
        cascade(model, x, y, eps=0.02, attacks=[claims])


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


# samples leave when fooled, whatever attacks them

LEAVING = {  # each takes nine looks; and the eps
    "apgd": (partial(apgd, steps=8), 0.03),
    "apgd l1": (partial(apgd, steps=8, norm="l1"), 1.0),
    "fmn": (partial(fmn, steps=8), 0.03),
    "square": (partial(square, queries=9), 0.06),
    "noise": (partial(noise, draws=9), 0.2),
    "random search": (partial(random_search, queries=9), 0.2),
}


@pytest.mark.parametrize("attack", LEAVING)
def test_a_sample_is_looked_at_until_it_is_fooled_and_not_once_more(case, attack):
    """Counted from outside: its looks end with the first one that is wrong and in the ball."""
    model, _, x, y = case
    search, eps = LEAVING[attack]
    norm = search.keywords.get("norm", "linf")
    seen = [[] for _ in x]

    def callback(row, step, at, left):
        inside = distance(at, x[row], norm) <= eps + 1e-4
        hit = (model(at).argmax(1) != y[row]) & inside
        for r in row.unique().tolist():  # of a sample's jobs several may look at once
            seen[r].append((bool(hit[row == r].any()), int((row == r).sum())))

    result = search(model, x, y, eps=eps, callback=callback)
    for looks, fooled in zip(seen, result.fooled.tolist(), strict=True):
        hits, points = zip(*looks, strict=True)
        assert not any(hits[:-1]) and hits[-1] == fooled and sum(points) <= 9
        assert fooled or sum(points) == 9
    assert 0 < int(result.fooled.sum()) < len(x)


# random forwards


def test_a_random_forward_is_not_flattered_by_lucky_looks(case):
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


# the model beneath its wrappers


def test_mixed_precision_is_seen_through_at_any_depth(case):
    model, data, x, _ = case
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare(copy.deepcopy(model))
    wrappers = (
        ModelEmaV3(prepared),
        torch.optim.swa_utils.AveragedModel(prepared),
        nn.Sequential(nn.Identity(), prepared),
    )
    expected = model(x)
    for wrapped in wrappers:
        before = [dict(m.__dict__) for m in wrapped.modules()]
        assert not torch.equal(wrapped(x), expected)
        with in_float32(wrapped) as module:
            assert torch.equal(module(x), expected)
        assert [m.__dict__ for m in wrapped.modules()] == before
    seen = set()
    head = [m for m in prepared.modules() if isinstance(m, nn.Linear)][-1]
    hook = head.register_forward_hook(lambda *args: seen.add(args[2].dtype))
    result = evaluate(prepared, data, eps=0.03, attack="fast", **QUIET)
    adaptive_attack_check(prepared, data, result, steps=2, restarts=1, slices=0, progress=False)
    binarization_test(prepared, data, eps=0.1, attack="fast", samples=2, inner=5, progress=False)
    attack_path(prepared, x[:4], data.tensors[1][:4], eps=0.03)
    hook.remove()
    assert seen == {torch.float32}


def test_shards_of_fsdp2_are_refused_and_ddp_is_found_under_compile(case, tmp_path):
    _, data, _, _ = case
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        plain = trained_net(n=80)[0]
        nested = torch.compile(DistributedDataParallel(plain), backend="eager")
        assert local_module(nested) is plain
        with in_float32(nested) as module:
            assert module is plain
        sharded = fully_shard(trained_net(n=80)[0], mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="whole weights, got a model under FSDP2") as error:
            evaluate(sharded, data, eps=0.03, attack="fast", **QUIET)
    finally:
        torch.distributed.destroy_process_group()
    assert "\n" not in str(error.value)


def test_buffers_and_streams_come_back(case):
    """Of a forward that counts its passes, in place and by a new tensor."""
    model, data, _, _ = case

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model
            self.register_buffer("passes", torch.zeros(()))
            self.register_buffer("renewed", torch.zeros(()))

        def forward(self, x):
            self.passes += 1
            self.renewed = self.renewed + 1
            return self.model(x)

    counting = Counting()
    counting(data.tensors[0])
    kept = counting.renewed
    torch.manual_seed(5)
    state = torch.get_rng_state()
    evaluate(counting, data, eps=0.03, attack="fast", **QUIET)
    assert float(counting.passes) == 1 and counting.renewed is kept and float(kept) == 1
    assert torch.equal(torch.get_rng_state(), state)


# progress


def test_the_bar_bounds_the_evaluations_own_threat(case, monkeypatch):
    model, data, _, _ = case
    texts = []

    class Bar(evaluating.tqdm):
        def set_postfix_str(self, s="", refresh=True):
            texts.append(s)

    monkeypatch.setattr(evaluating, "tqdm", Bar)
    attack = [partial(pgd, steps=5), partial(apgd, steps=5)]
    options = dict(eps=0.02, attack=attack, other_threats={"l2": 0.3}, batch_size=5, diagnose=False)
    result = evaluate(model, data, **options)
    bounds = [float(re.search(r"<= ([\d.]+)%", t)[1]) / 100 for t in texts if "accuracy" in t]
    assert len(bounds) >= 8  # two stages on each of four blocks
    left = [v == -1 for v in result.verdicts]
    for block, bound in enumerate(bounds[1::2]):  # before the last stage of a block
        end = 20 * (block + 1)
        assert sum(left[:end]) / end <= bound + 5e-4
    assert bounds[-1] <= result.stages[0].accuracy.value + 5e-4


# fetching


def test_images_are_fetched_as_the_loader_does(case, monkeypatch):
    """Its workers and its collate function, in its subset's order, one batch ahead."""
    model, data, x, y = case
    made = []

    class Spy(DataLoader):
        def __init__(self, *args, **options):
            made.append((args[1], options))
            super().__init__(*args, **options)

    loader = DataLoader(data, batch_size=3, shuffle=True, num_workers=2)
    dataset, loading = sharding.map_style(loader)
    monkeypatch.setattr(sharding, "DataLoader", Spy)
    found = list(sharding.batches(model, dataset, list(range(7, 80)), 30, loading))
    ((size, options),) = made
    assert (size, options["num_workers"]) == (8, 2) and options["collate_fn"] is loader.collate_fn
    assert [len(batch.indices) for batch in found] == [32, 32, 9]
    assert [i for batch in found for i in batch.indices] == list(range(7, 80))
    assert torch.equal(torch.cat([batch.inputs for batch in found]), x[7:])
    assert torch.equal(torch.cat([batch.labels for batch in found]), y[7:])


# input that cannot be judged


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m, x, y: (nn.Sequential(m, nn.Linear(5, 1)), x, 0 * y), "two classes at least"),
        (lambda m, x, y: (m, x, y + 5), "below the 5 classes of the model, got labels from 5"),
        (lambda m, x, y: (Half(m), x, y), "verdicts are float32: the model returns torch.bfloat16"),
    ],
)
def test_what_cannot_be_judged_is_refused_in_one_line(case, spoil, message):
    model, x, y = spoil(case[0], case[2], case[3])
    with pytest.raises(ValueError, match=message) as error:
        evaluate(model, TensorDataset(x, y), eps=0.03, attack="fast", **QUIET)
    assert "\n" not in str(error.value)


class Half(nn.Module):
    """A forward with an autocast of its own."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(x)


def test_mistakes_in_the_call_are_named(case):
    model, data, x, y = case
    with pytest.raises(ValueError, match="votes must be >= 1, got -1"):
        evaluate(model, data, eps=0.03, attack="fast", votes=-1, **QUIET)
    with pytest.raises(ValueError, match="a search of one point at least, got 0"):
        pgd(model, x, y, eps=0.03, steps=-1)
    with pytest.raises(ValueError, match="float16 logits"):
        pgd(copy.deepcopy(model).half(), x.half(), y, eps=0.03)
    pairs = [{"image": image, "label": label} for image, label in zip(x, y, strict=True)]
    with pytest.raises(ValueError, match=r"batches of \(images, labels\), the data gives a dict"):
        evaluate(model, pairs, eps=0.03, attack="fast", **QUIET)
    one = evaluate(model, data, eps=0.03, attack="fast", **QUIET)
    with pytest.raises(ValueError, match="their labels differ"):
        compare(one, dataclasses.replace(one, labels=[(v + 1) % 5 for v in one.labels]))


def test_logits_that_are_no_number_are_never_right(case):
    model, x = case[0], case[2]

    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x) * float("nan")

    with torch.no_grad():
        labels = Broken()(x).argmax(1)  # what argmax would say
    result = evaluate(Broken(), TensorDataset(x, labels), eps=0.03, attack="fast", **QUIET)
    assert result.clean.count == result.attacked.count == 0
    assert bool(pgd(Broken(), x, labels, eps=0.03).fooled.all())


def test_a_radius_without_a_dimension_and_searches_with_nothing_left(case):
    model, _, x, y = case
    one = cascade(model, x, y, eps=torch.tensor(0.03), attacks="fast")
    assert torch.equal(one.fooled, cascade(model, x, y, eps=0.03, attacks="fast").fooled)
    flat = nn.Sequential(nn.Unflatten(1, (1, 16, 16)), model)
    found = square(flat, x.flatten(1), y, eps=0.5, queries=30, restarts=2, batch_size=8)
    assert int(found.fooled.sum()) > 70
