"""Which samples of a loader are judged, against a loop over it; what a data set may give."""

import dataclasses
import os
import signal
import time

import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from cases import trained_net
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from flatreg import (
    AttackedAccuracy,
    accuracy_curve,
    adaptive_attack_check,
    binarization_test,
    evaluate,
)
from flatreg.data.loading import map_style
from flatreg.evaluation.geometry import measure

QUIET = dict(progress=False, diagnose=False)
EPS = dict(eps=0.02, attack="fast")
HELD = [*range(12, 24)]


@pytest.fixture(scope="module")
def case():
    """Of 24 samples the first half has wrong labels: what is visited shows in the accuracy."""
    model, x, y = trained_net()
    with torch.no_grad():
        y = model(x).argmax(1)[:24]
    y = torch.where(torch.arange(24) < 12, (y + 1) % 5, y)
    return model, TensorDataset(x[:24], y)


class Every(Sampler):
    """A sampler of a user's own, with a stream of its own."""

    def __init__(self, indices, shuffle=False):
        self.indices, self.shuffle = indices, shuffle
        self.generator = torch.Generator().manual_seed(0)

    def __len__(self):
        return len(self.indices)

    def __iter__(self):
        order = range(len(self.indices))
        if self.shuffle:
            order = torch.randperm(len(self.indices), generator=self.generator).tolist()
        return iter([self.indices[i] for i in order])


class Cut(Every):
    """One that leaves out the half, another one each time."""

    def __iter__(self):
        return iter([*super().__iter__()][::2])


class Endless(Every):
    def __iter__(self):
        while True:
            yield from self.indices


ROWS = range(24)
VISITED = {
    "plain": lambda d: DataLoader(d, 5),
    "shuffled": lambda d: DataLoader(d, 6, shuffle=True, drop_last=True),
    "subset, random": lambda d: DataLoader(d, 5, sampler=SubsetRandomSampler(HELD)),
    "subset, tensor": lambda d: DataLoader(d, 5, sampler=SubsetRandomSampler(torch.tensor(HELD))),
    "sequential of fewer": lambda d: DataLoader(d, 5, sampler=SequentialSampler(range(7))),
    "random of fewer": lambda d: DataLoader(d, 5, sampler=RandomSampler(range(7))),
    "list": lambda d: DataLoader(d, 5, sampler=HELD[::-1]),
    "tensor": lambda d: DataLoader(d, 5, sampler=torch.tensor(HELD)),
    "batches of a list": lambda d: DataLoader(d, batch_sampler=BatchSampler(HELD, 5, True)),
    "list of batches": lambda d: DataLoader(d, batch_sampler=[[3, 4], [20]]),
    "own": lambda d: DataLoader(d, 5, sampler=Every(HELD)),
    "own, shuffled": lambda d: DataLoader(d, 5, sampler=Every(HELD, shuffle=True)),
    "own, batches": lambda d: DataLoader(d, batch_sampler=Every([[1, 2], [15, 16, 17]], True)),
    "tail dropped": lambda d: DataLoader(d, 7, drop_last=True),
    "own, tail dropped": lambda d: DataLoader(d, 7, drop_last=True, sampler=Every(HELD)),
    "one process": lambda d: DataLoader(d, 5, sampler=DistributedSampler(d, 1, 0)),
    "prepared": lambda d: Accelerator(cpu=True).prepare(DataLoader(d, 5, shuffle=True)),
    "prepared, seedable": lambda d: Accelerator(
        cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True)
    ).prepare(DataLoader(d, 5, shuffle=True)),
    "of a part": lambda d: DataLoader(Subset(d, HELD), 5),
    "joined": lambda d: DataLoader(ConcatDataset([d, d]), 5, sampler=[30, 40, 2]),
}
REFUSED = {
    "WeightedRandomSampler": lambda d: WeightedRandomSampler([1.0] * 24, 24),
    "RandomSampler": lambda d: RandomSampler(d, replacement=True),
    "a RandomSampler": lambda d: RandomSampler(d, num_samples=10),
    "DistributedSampler": lambda d: DistributedSampler(d, 4, 1),
    "Cut": lambda d: Cut(HELD, shuffle=True),
    "each once": lambda d: Endless([3, 4]),
    "from 0 to 23, each once": lambda d: [1, 2, 24],
    "from 0 to 23, each once, got": lambda d: Every([5, 5, 6]),
}


def visited(loader):
    """Labels and number of samples of a loop over the loader."""
    labels = [label for _, y in loader for label in y.tolist()]
    return sorted(labels)


@pytest.mark.parametrize("name", VISITED)
def test_the_samples_of_a_loader_are_those_it_visits(case, name):
    _, data = case
    loader = VISITED[name](data)
    expected = visited(loader)
    restore = torch.get_rng_state()
    dataset, indices, _ = map_style(loader)
    assert torch.equal(restore, torch.get_rng_state())
    assert sorted(int(dataset[i][1]) for i in indices) == expected and indices == sorted(indices)


def test_every_entrance_judges_what_the_loader_visits(case):
    """Half of the labels are wrong, and the sampler leaves these out."""
    model, data = case
    loader = DataLoader(data, 5, sampler=SubsetRandomSampler(HELD))
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in loader)
    assert (
        right == 12 and sum(int((model(x).argmax(1) == y).sum()) for x, y in DataLoader(data)) < 13
    )
    result = evaluate(model, loader, **EPS, progress=False)
    assert result.indices == HELD and result.clean.value == 1
    assert all(finding.n <= 12 for finding in result.findings)
    assert AttackedAccuracy(loader, **EPS)(model, 0).verdicts == result.verdicts
    (point,) = accuracy_curve(model, loader, eps=[0.02], attack="fast", progress=False)
    assert point.accuracy.n == 12
    assert set(evaluate(model, loader, samples=5, **EPS, **QUIET).indices) < set(HELD)
    card = measure(model, loader, eps=0.02, parts=["kappa"], progress=False)
    assert (card.n, card.kappa.by_outcome.right.n) == (12, 12)
    test = binarization_test(model, loader, eps=0.2, attack="fast", inner=9, progress=False)
    assert test.n <= 12
    options = dict(steps=2, restarts=1, slices=0, progress=False)
    assert set(adaptive_attack_check(model, loader, result, **options).indices) <= set(HELD)
    other = DataLoader(data, 5, sampler=[*range(12)])
    with pytest.raises(ValueError, match="expected the data that was evaluated, it has no sample"):
        adaptive_attack_check(model, other, result, **options)


def test_a_samplers_own_stream_is_not_moved(case):
    _, data = case
    one, other = (DataLoader(data, 5, sampler=Every(HELD, shuffle=True)) for _ in range(2))
    map_style(one)
    assert [y.tolist() for _, y in one] == [y.tolist() for _, y in other]


@pytest.mark.parametrize("name", REFUSED)
def test_samplers_of_other_samples_each_time_are_refused(case, name):
    model, data = case
    loader = DataLoader(data, 5, sampler=REFUSED[name](data))
    with pytest.raises(ValueError, match=name) as error:
        evaluate(model, loader, **EPS, **QUIET)
    assert "\n" not in str(error.value) and "torch.utils.data.Subset" in str(error.value)


class Pictures(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        image = pytest.importorskip("PIL.Image")
        return image.new("L", (16, 16)), 0


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


class PrefetchLoader:
    """As timm's: no DataLoader, and it normalises what one gives."""

    def __init__(self, loader):
        self.loader, self.dataset = loader, loader.dataset

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        return iter(self.loader)


def dropping(rows):
    return default_collate([row for row in rows if int(row[1]) > 0])


def named(rows):
    x, y = default_collate(rows)
    return {"image": x, "label": y}


WRONG = {
    r"a fixed subset": lambda d: DataLoader(Stream()),
    r"give its \.loader": lambda d: PrefetchLoader(DataLoader(d, 5)),
    r"TensorDataset\(images, labels\)": lambda d: d.tensors,
    r"got a Tensor: give .*TensorDataset": lambda d: d.tensors[0],
    r"got a dict: give .*TensorDataset": lambda d: {"train": d},
    r"got one with batch_size=None": lambda d: DataLoader(d, batch_size=None),
    r"images as tensors, the data gives images of PIL": lambda d: Pictures(),
    r"got torch.int64 of shape .* give labels.argmax": lambda d: TensorDataset(
        d.tensors[0], nn.functional.one_hot(d.tensors[1], 5)
    ),
    r"a list of 3: give a loader whose collate_fn": lambda d: [(x, y, 7) for x, y in d],
    r"a dict of image, label": lambda d: DataLoader(d, 5, collate_fn=named),
    r"samples, the collate function makes": lambda d: DataLoader(d, 5, collate_fn=dropping),
    r"got probabilities of shape \(\d+, 5\)": lambda d: TensorDataset(
        d.tensors[0], nn.functional.one_hot(d.tensors[1], 5).float()
    ),
    r"give images / 255": lambda d: TensorDataset(255 * d.tensors[0], d.tensors[1]),
    r"e\+04: give images / 65535": lambda d: TensorDataset(
        (65535 * (d.tensors[0] / d.tensors[0].amax())).to(torch.uint16), d.tensors[1]
    ),
    r"to 1\.00000012: .* give images\.clamp": lambda d: TensorDataset(
        (d.tensors[0] / d.tensors[0].amax()) * (1 + 2**-23), d.tensors[1]
    ),
    r"images of one size, the data gives several": lambda d: [
        (x[..., : x.shape[-1] - i % 2], int(y)) for i, (x, y) in enumerate(d)
    ],
    r"normalise inside the model": lambda d: TensorDataset(4 * d.tensors[0] - 2, d.tensors[1]),
    r"images\.clamp\(0, 1\)": lambda d: TensorDataset(1.05 * d.tensors[0], d.tensors[1]),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_no_data_is_refused_in_one_line(case, message):
    model, data = case
    for entrance in (evaluate, measure):
        options = EPS | QUIET if entrance is evaluate else dict(eps=0.02, progress=False)
        with pytest.raises(ValueError, match=message) as error:
            entrance(model, WRONG[message](data), **options)
        assert "\n" not in str(error.value)


def same(one, other):
    """All but the times."""
    times = {name: getattr(other, name) for name in ("seconds", "waiting_seconds")}
    return dataclasses.replace(one, **times) == other


def test_images_with_a_graph_are_read_and_an_eps_of_text_is_refused(case):
    model, data = case
    x, y = data.tensors
    leaf = x.clone().requires_grad_()
    plain = evaluate(model, data, **EPS, **QUIET)
    for images in (leaf, leaf * 1.0):
        assert same(evaluate(model, [*zip(images, y, strict=True)], **EPS, **QUIET), plain)
    for eps in ("8/255", [0.1]):
        with pytest.raises(TypeError, match=r"^eps: expected a number, as 8 / 255, got ['\[]"):
            evaluate(model, data, eps=eps, **QUIET)


def test_labels_in_a_column_and_images_of_bytes_are_read(case):
    model, data = case
    x, y = (255 * data.tensors[0]).round().byte(), data.tensors[1]
    with torch.no_grad():
        right = int((model(x / 255).argmax(1) == y).sum())
    plain = evaluate(model, TensorDataset(x, y), **EPS, **QUIET)
    assert plain.clean.value == right / 24
    for labels in (y[:, None], y.float(), y.int(), y[:, None].double()):
        again = evaluate(model, TensorDataset(x, labels), **EPS, **QUIET)
        assert same(again, plain)


class Dying(Dataset):
    """A data set whose worker ends at one sample, in some way."""

    def __init__(self, data, end):
        self.data, self.end = data, end

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        if index == 17:
            self.end()
        image, label = self.data[index]
        return image, int(label)


class Unsendable(Exception):
    def __init__(self, one, two):
        self.unsendable = lambda: (one, two)


def raising(error):
    def end():
        raise error

    return end


def odd(rows):
    return [lambda: rows, lambda: rows]  # cannot be sent: torch would wait for ever


def failing(rows):
    raise IndexError("no\nrows")


def starts_badly(worker):
    raise OSError("no\ndisk")


ENDS = {
    "killed": (lambda: os.kill(os.getpid(), signal.SIGKILL), {}, "DataLoader worker .*num_workers"),
    "segfault": (lambda: os.kill(os.getpid(), signal.SIGSEGV), {}, "DataLoader worker"),
    "left": (lambda: os._exit(3), {}, "DataLoader worker"),
    "raised": (raising(KeyError("no\nfile")), {}, r"raised KeyError: 'no\\nfile'"),
    "raised a line more": (raising(OSError("no\nfile")), {}, "raised OSError: no file: num_work"),
    "cannot be sent": (raising(Unsendable(1, 2)), {}, "raised Unsendable"),
    "StopIteration": (raising(StopIteration()), {}, "raised StopIteration"),
    "hangs": (lambda: time.sleep(60), {"timeout": 0.5}, "timed out after 0.5 seconds"),
    "collates badly": (print, {"collate_fn": failing}, "raised IndexError: no rows"),
    "starts badly": (print, {"worker_init_fn": starts_badly}, "died: OSError: no disk"),
    "spawned": (lambda: None, {"multiprocessing_context": "spawn"}, "cannot be started"),
}


@pytest.mark.parametrize("how", ENDS)
def test_a_worker_that_dies_ends_the_evaluation_with_its_cause(case, how):
    model, data = case
    end, options, message = ENDS[how]
    loader = DataLoader(Dying(data, end), 4, num_workers=2, **options)
    entrances = (
        lambda: evaluate(model, loader, **EPS, **QUIET),
        lambda: AttackedAccuracy(loader, **EPS)(model, 0),
    )
    for run in entrances[: 1 if how == "hangs" else 2]:  # torch waits 5 s for one that does
        began = time.perf_counter()
        with pytest.raises(RuntimeError, match=message) as error:
            run()
        assert "\n" not in str(error.value) and time.perf_counter() - began < 20


def test_what_workers_collate_is_checked_where_it_is_made(case):
    model, data = case
    wrong = {"expected images as a tensor, the data gives a function": odd}
    wrong |= {"a dict of image, label": named, "samples, the collate function makes": dropping}
    for message, collate in wrong.items():
        loader = DataLoader(data, 5, num_workers=1, collate_fn=collate)
        with pytest.raises(ValueError, match=message):
            evaluate(model, loader, **EPS, **QUIET)
    with pytest.raises(ValueError, match="the data gives images of PIL"):
        evaluate(model, DataLoader(Pictures(), num_workers=1), **EPS, **QUIET)
    plain = evaluate(model, data, **EPS, **QUIET)
    both = evaluate(model, DataLoader(data, 5, num_workers=2), **EPS, **QUIET)
    assert same(both, plain)


def test_an_error_of_the_data_in_this_process_is_the_users_own(case):
    model, data = case
    with pytest.raises(KeyError, match="no file"):
        evaluate(model, DataLoader(Dying(data, raising(KeyError("no file"))), 4), **EPS, **QUIET)
    with pytest.raises(RuntimeError, match="the data raised StopIteration"):
        evaluate(model, Dying(data, raising(StopIteration())), **EPS, **QUIET)
