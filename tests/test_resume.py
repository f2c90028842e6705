"""A killed evaluation goes on where it was, and ends as if nothing had happened."""

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import Noisy, trained_net
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import TensorDataset

from flatreg import evaluate
from flatreg.attacks import AttackResult, apgd, pgd, square
from flatreg.data import files as atomic
from flatreg.evaluation.results import model_info, read_evaluation, write_evaluation
from flatreg.evaluation.resume import CachedWork, ResumeCache, digest

STAGES = (
    partial(pgd, steps=5),
    partial(apgd, steps=10),
    partial(apgd, loss="dlr", targets=3, steps=10),
)
OPTIONS = dict(
    eps=0.03,
    attack=STAGES,
    curve=[0.01, 0.05],
    other_threats={"l2": 0.2},
    batch_size=8,
    progress=False,
)


class Killed(BaseException):
    """As SIGKILL would: nothing catches it."""


class Mortal(torch.nn.Module):
    """Dies after so many passes."""

    def __init__(self, model, passes):
        super().__init__()
        self.model, self._left = model, passes

    def forward(self, x):
        self._left -= 1
        if self._left < 0:
            raise Killed
        return self.model(x)


@pytest.fixture(scope="module")
def case():
    model, x, y = trained_net(n=48)
    return model, TensorDataset(x, y), x, y


def content(result):
    """All but the time it took."""
    return dataclasses.replace(result, seconds=0.0, waiting_seconds=0.0)


def test_a_killed_evaluation_ends_like_the_one_that_was_not(case, tmp_path):
    model, data, _, _ = case
    whole = content(
        evaluate(Mortal(model, 10**9), data, **OPTIONS, save_inputs=True, folder=tmp_path / "whole")
    )
    deaths = 0
    for passes in (3, 30, 50, 60, 90, 150, 300, 10**9):
        try:
            result = evaluate(
                Mortal(model, passes), data, **OPTIONS, folder=tmp_path / "cut", save_inputs=True
            )
        except Killed:
            deaths += 1
            assert not (tmp_path / "cut/evaluation.json").exists()
    assert deaths >= 5
    assert content(result) == whole
    assert content(read_evaluation(tmp_path / "cut")) == whole
    one, two = (load_file(tmp_path / f / "adversarial.safetensors") for f in ("whole", "cut"))
    assert torch.equal(one["inputs"], two["inputs"])


def test_another_batch_size_picks_up_what_is_there(case, tmp_path):
    model, data, _, _ = case
    whole = evaluate(model, data, **OPTIONS)
    with pytest.raises(Killed):
        evaluate(Mortal(model, 150), data, **OPTIONS, folder=tmp_path)
    found = len(list(tmp_path.glob("state/*/*.safetensors")))
    (state,) = (json.loads(file.read_text()) for file in tmp_path.glob("state/*/state.json"))
    assert found > 3 and state["attack"][0] == "pgd(steps=5)"
    resumed = evaluate(Mortal(model, 10**9), data, **OPTIONS | {"batch_size": 33}, folder=tmp_path)
    assert resumed.verdicts == whole.verdicts


def test_another_evaluation_in_the_folder_has_a_state_of_its_own(case, tmp_path):
    model, data, _, _ = case
    quick = dict(attack=STAGES[:1], progress=False, diagnose=False, folder=tmp_path)
    first = evaluate(model, data, eps=0.03, **quick)
    changed, _, _ = trained_net(n=48)
    with torch.no_grad():
        changed[-1].bias.add_(0.5)
    for n, (other, options) in enumerate(
        [
            (model, dict(eps=0.04)),
            (model, dict(eps=0.03, seed=1)),
            (model, dict(eps=0.03, samples=30)),
            (changed, dict(eps=0.03)),
        ]
    ):
        fresh = evaluate(other, data, **quick | options)
        alone = evaluate(other, data, **quick | options | {"folder": None})
        assert content(fresh) == content(alone) != content(first)
        states = [json.loads(f.read_text()) for f in tmp_path.glob("state/*/state.json")]
        assert len(states) == n + 2
    untouched = evaluate(Mortal(model, 10**9), data, eps=0.03, **quick)
    assert untouched.verdicts == first.verdicts


def test_a_curve_and_another_threat_cost_only_themselves(case, tmp_path):
    model, data, _, _ = case
    options = dict(eps=0.03, attack=STAGES, progress=False, folder=tmp_path)
    first = evaluate(model, data, **options)
    more = dict(curve=[0.01, 0.05], other_threats={"l2": 0.2})
    passes, count = [], model.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    grown = evaluate(model, data, **options, **more)
    spent, passes[:] = sum(passes), []
    evaluate(model, data, **options | more | {"folder": None})
    count.remove()
    assert spent < sum(passes) - first.forwards / 2
    assert (grown.verdicts, grown.forwards) == (first.verdicts, first.forwards)
    assert content(grown) == content(evaluate(model, data, **options | more | {"folder": None}))


SCRIPT = """
import sys, time
sys.path.insert(0, sys.argv[1])
import torch
from test_resume import OPTIONS, content
from cases import trained_net
from flatreg import evaluate

class Slow(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, x):
        time.sleep(0.01)
        return self.model(x)

torch.set_num_threads(1)
model, x, y = trained_net(n=48)
print("begins", flush=True)
evaluate(Slow(model), torch.utils.data.TensorDataset(x, y), **OPTIONS, folder=sys.argv[2])
"""


def test_an_evaluation_that_is_killed_for_good_goes_on(case, tmp_path):
    """SIGKILL, wherever it strikes; the last call is left to end."""
    model, data, _, _ = case
    script, folder = tmp_path / "script.py", tmp_path / "kept"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(Path(__file__).parent), str(folder)]
    kept = []
    for seconds in (0.4, 1.1):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "begins\n"
            time.sleep(seconds)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        kept.append(len(list(folder.glob("state/*/*.safetensors"))))
    assert 0 < kept[1] and kept[0] <= kept[1]
    assert not (folder / "evaluation.json").exists()
    alive = Mortal(model, 10**9)
    resumed = evaluate(alive, data, **OPTIONS, folder=folder)
    assert resumed.verdicts == evaluate(alive, data, **OPTIONS).verdicts
    assert read_evaluation(str(folder)) == resumed
    write_evaluation(resumed, str(tmp_path / "again"))
    assert read_evaluation(tmp_path / "again") == resumed


def test_a_record_that_cannot_be_read_is_work_to_do_again(tmp_path):
    def work(rows):
        done.append(list(rows))
        return CachedWork({"value": torch.tensor(rows) * 2.0}, forwards=len(rows))

    def rows(cache, indices):
        missing = cache.missing("some work", indices)
        return cache.rows("some work", indices, work(missing) if missing else None)

    done = []
    cache = ResumeCache(tmp_path, {"a": 1})
    assert rows(cache, [5, 3, 8])["value"].tolist() == [0.0, 2.0, 4.0]
    assert rows(ResumeCache(tmp_path, {"a": 1}), [8, 5])["value"].tolist() == [4.0, 0.0]
    assert done == [[0, 1, 2]]
    again = ResumeCache(tmp_path, {"a": 1})
    assert rows(again, [3, 9])["value"].tolist() == [2.0, 2.0]
    assert done == [[0, 1, 2], [1]] and (again.forwards, again.read_forwards) == (1, 3)
    for file in tmp_path.glob("*/*.safetensors"):
        file.write_bytes(file.read_bytes()[:40])
    fresh = ResumeCache(tmp_path, {"a": 1})
    assert fresh.read_forwards == 0
    rows(fresh, [5, 3, 8])
    assert done[-1] == [0, 1, 2]


def test_a_full_disk_leaves_what_was_written(case, tmp_path, monkeypatch):
    model, data, _, _ = case
    written = atomic.save_file
    calls = []

    def full(tensors, path, metadata=None):
        calls.append(path)
        if len(calls) > 4:
            Path(path).write_bytes(b"half a record")
            raise OSError(28, "No space left on device")
        written(tensors, path, metadata)

    monkeypatch.setattr(atomic, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        evaluate(model, data, **OPTIONS, folder=tmp_path)
    monkeypatch.undo()
    assert len(list(tmp_path.glob("state/*/*.safetensors"))) == 4
    resumed = evaluate(model, data, **OPTIONS, folder=tmp_path)
    assert content(resumed) == content(evaluate(model, data, **OPTIONS))


QUIET = dict(progress=False, diagnose=False)
QUICK = dict(eps=0.03, attack=STAGES[:1], **QUIET)


def test_records_copied_from_another_identity_are_not_taken(case, tmp_path):
    model, data, *_ = case
    expected = evaluate(model, data, **QUICK)
    evaluate(model, data, **QUICK, folder=tmp_path)
    (own,) = (tmp_path / "state").iterdir()
    evaluate(trained_net(n=48, seed=5)[0], data, **QUICK, folder=tmp_path)
    (other,) = {*(tmp_path / "state").iterdir()} - {own}
    for record in own.glob("linf*"):
        record.unlink()
    for record in other.glob("linf*"):
        shutil.copy(record, own)
    assert content(evaluate(model, data, **QUICK, folder=tmp_path)) == content(expected)


def test_a_folder_is_of_one_evaluation_which_sweeps_what_was_left_half_written(case, tmp_path):
    model, data, *_ = case
    names = (f"{name}.0123{atomic.PARTIAL}" for name in (".a", "state/a/.b", "other/.c"))
    *left, others = (tmp_path / name for name in names)  # the last is of who holds that folder
    for file in (*left, others, others.with_name(".lock")):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    with atomic.alone_in(tmp_path, True):
        with pytest.raises(ValueError, match=r"another run is writing there.*in Python folder="):
            evaluate(model, data, **QUICK, folder=tmp_path)
    evaluate(model, data, **QUICK, folder=tmp_path)
    assert not any(file.exists() for file in left) and others.exists()


def test_a_file_system_without_locks_is_written_all_the_same(tmp_path, monkeypatch):
    def acquire(lock, **_):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(atomic.FileLock, "acquire", acquire)
    with atomic.alone_in(tmp_path / "a", True):
        assert (tmp_path / "a").is_dir()


def test_a_folder_that_cannot_be_one_is_refused_before_any_attack(case, tmp_path):
    model, data, *_ = case
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=r"expected a folder that can be written, got .*folder="):
            evaluate(Mortal(model, 0), data, **QUICK, folder=folder)
    (tmp_path / "evaluation.json").mkdir()
    with pytest.raises(OSError, match=r"evaluation\.json: .* a folder is in its place: move it"):
        evaluate(model, data, **QUICK, folder=tmp_path)


def test_a_model_that_changes_directory_moves_no_folder(case, tmp_path, monkeypatch):
    class Moves(Cold):
        def forward(self, x):
            os.chdir(tmp_path)
            return super().forward(x)

    (tmp_path / "start").mkdir()
    monkeypatch.chdir(tmp_path / "start")
    model, data, *_ = case
    result = evaluate(Moves(model, 1.0), data, **QUICK, folder="here")
    assert read_evaluation(tmp_path / "start/here") == result


class Cold(nn.Module):
    """The same weights and layers, other logits."""

    def __init__(self, model, temperature):
        super().__init__()
        self.model, self._temperature = model, temperature

    def forward(self, x):
        return self.model(x) / self._temperature


class Rounds(nn.Module):
    """The same weights, layers and logits; with `straight` attacks follow its gradients."""

    def __init__(self, model, straight):
        super().__init__()
        self.model, self.straight = model, straight

    def forward(self, x):
        rounded = (255 * x).round() / 255
        return self.model(x + (rounded - x).detach() if self.straight else rounded)


class Straight(Rounds):
    def forward(self, x):
        return self.model(x + ((255 * x).round() / 255 - x).detach())


def test_another_forward_of_the_same_weights_and_logits_shares_no_records(case, tmp_path):
    model, data, _, _ = case
    options = dict(eps=0.1, attack="fast", **QUIET)
    Straight.__name__ = "Rounds"  # as one that was defined anew
    results = []
    for other in (Rounds(model, False), Rounds(model, True), Straight(model, False)):
        results.append(evaluate(other, data, **options, folder=tmp_path))
        assert content(results[-1]) == content(evaluate(other, data, **options))
    assert results[0].attacked.value > results[1].attacked.value == results[2].attacked.value


class Shifted(nn.Module):
    """Its buffer is not in its state."""

    def __init__(self, model, shift):
        super().__init__()
        self.model = model
        self.register_buffer("shift", torch.tensor(shift), persistent=False)

    def forward(self, x):
        return self.model(x + self.shift)


def test_another_buffer_that_the_state_lacks_shares_no_records(case, tmp_path):
    model, data, _, _ = case
    options = dict(eps=0.02, attack="fast", **QUIET)
    for shift in (0.0, 0.005):  # logits change by less than is noticed of records
        other = Shifted(model, shift)
        kept = evaluate(other, data, **options, folder=tmp_path)
        assert kept.attacked_margins == evaluate(other, data, **options).attacked_margins


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
    with pytest.raises(ValueError, match="write another folder: output=DIR") as error:
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
    assert result.n == 48 and len(list(tmp_path.glob("state/*/*.safetensors"))) > 2


def test_csv_and_images_let_anyone_score_them(case, tmp_path):
    model, data, x, _ = case
    result = evaluate(
        model,
        data,
        eps=0.03,
        attack=STAGES,
        samples=70,
        folder=tmp_path,
        save_inputs=True,
        progress=False,
        diagnose=False,
    )
    lines = list(csv.DictReader((tmp_path / "samples.csv").read_text().splitlines()))
    images = load_file(tmp_path / "adversarial.safetensors")
    assert images["index"].tolist() == result.indices == [int(line["index"]) for line in lines]
    assert float((images["inputs"] - x[result.indices]).abs().max()) <= 0.03 + 1e-6
    predicted = model(images["inputs"]).argmax(1).tolist()
    assert predicted == [int(line["attacked_prediction"]) for line in lines]
    for line, verdict, prediction in zip(lines, result.verdicts, predicted, strict=True):
        wrong = prediction != int(line["label"])
        assert wrong == (line["fooled_by"] != "survived") == (verdict != -1)
        assert (line["fooled_by"] == "wrong when clean") == (verdict == -2)
        assert (line["attacked_kappa"] == "") == (verdict == -2)
    assert {line["fooled_by"] for line in lines} >= {"survived", "pgd(steps=5)"}
    with pytest.raises(ValueError, match="save_inputs needs a folder"):
        evaluate(model, data, eps=0.03, save_inputs=True)


def test_robustbench_finds_its_keys(case):
    model, data, _, _ = case
    result = evaluate(model, data, eps=8 / 255, attack=STAGES[:1], progress=False, diagnose=False)
    info = model_info(result, name="small", architecture="small_net", dataset="blobs")
    keys = [
        "link",
        "name",
        "authors",
        "additional_data",
        "number_forward_passes",
        "dataset",
        "venue",
        "architecture",
        "eps",
        "clean_acc",
        "reported",
        "autoattack_acc",
        "unreliable",
    ]
    assert list(info)[: len(keys)] == keys and info["eps"] == "8/255"
    assert info["clean_acc"] == f"{result.clean.count / 0.48:.2f}"
    assert info["autoattack_acc"] == info["reported"] == f"{result.attacked.count / 0.48:.2f}"
    assert info["attack"] == ["pgd(steps=5)"] and not info["unreliable"]
    odd = model_info(
        dataclasses.replace(result, eps=0.5, norm="l2"), name="", architecture="", dataset=""
    )
    assert odd["eps"] == "0.5"


def test_the_own_threat_among_the_others_is_attacked_once(case, tmp_path):
    model, data, _, _ = case
    options = dict(eps=0.03, attack="fast", **QUIET)
    alone = evaluate(model, data, **options)
    both = evaluate(model, data, **options, other_threats={"linf": 0.03})
    assert (both.forwards, both.backwards) == (alone.forwards, alone.backwards)
    assert both.other_threats[0].verdicts == alone.verdicts


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"key": "some work"}])
def test_a_file_of_another_program_is_no_record(tmp_path, metadata):
    folder = ResumeCache(tmp_path, {"a": 1}).folder
    save_file({"z": torch.zeros(1)}, str(folder / "foreign.safetensors"), metadata)
    assert ResumeCache(tmp_path, {"a": 1}).missing("some work", [3]) == [0]


def shifted(model, inputs, labels, *, eps, by, **options):
    """An attack of a user's own: one point, as far as `by` says."""
    by = by() if callable(by) else by
    by = torch.as_tensor(by).reshape(-1, *inputs.shape[1:]).mean(0)
    images = (inputs + eps * by.clamp(-1, 1)).clamp(0, 1)
    with torch.no_grad():
        fooled = model(images).argmax(1) != labels
    return AttackResult(images, fooled.long() - 1, len(inputs), 0)


class Shift:
    def __init__(self, by):
        self.by = by

    def __call__(self, model, inputs, labels, *, eps, **options):
        return shifted(model, inputs, labels, eps=eps, by=self.by)


def closure(by):
    def attack(model, inputs, labels, *, eps, **options):
        return shifted(model, inputs, labels, eps=eps, by=by)

    return attack


SETTINGS = {
    "tensor": lambda by: partial(shifted, by=by),
    "array": lambda by: partial(shifted, by=by.numpy()),
    "function": lambda by: partial(shifted, by=lambda: by),
    "object": Shift,
    "closure": closure,
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_attacks_that_look_alike_in_words_share_no_records(case, tmp_path, kind):
    model, data, x, y = case
    far = torch.ones(5 * x[0].numel())
    near = far.clone()
    near[10:-10] = 0  # what `repr` of a long tensor leaves out
    by_hand = []
    for by in (far, near):
        attack = SETTINGS[kind](by)
        result = evaluate(model, data, eps=0.3, attack=attack, folder=tmp_path, **QUIET)
        with torch.no_grad():
            moved = (x + 0.3 * by.reshape(5, *x.shape[1:]).mean(0)).clamp(0, 1)
            right = (model(x).argmax(1) == y) & (model(moved).argmax(1) == y)
        by_hand.append(int(right.sum()))
        assert result.attacked.value == pytest.approx(by_hand[-1] / len(y))
    assert by_hand[0] != by_hand[1]


def test_a_state_of_more_than_tensors_is_kept_apart(tmp_path):
    """Quantised weights and an extra state: the same state is found again, another is not."""
    x, y = torch.rand(8, 3, 4, 4), torch.arange(8) % 3
    options = dict(eps=0.1, attack=partial(square, queries=3), folder=tmp_path, **QUIET)

    def quantised(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})

    for build in (quantised, Extra):
        for seed in (0, 1, 0):
            model = build(seed)
            with torch.no_grad():
                right = float((model(x).argmax(1) == y).float().mean())
            assert evaluate(model, TensorDataset(x, y), **options).clean.value == right
    states = [json.loads(f.read_text())["model"] for f in tmp_path.glob("state/*/state.json")]
    assert len(set(states)) == 4


class Extra(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.seed = seed
        torch.manual_seed(0)
        self.layer = nn.Linear(48, 3)

    def forward(self, x):
        return self.layer(x.flatten(1)).roll(self.seed, 1)

    def get_extra_state(self):
        return {"seed": self.seed}

    def set_extra_state(self, state):
        self.seed = state["seed"]


def test_digests_are_of_content():
    """Equal for equal content, whatever the process; cycles, shared parts and modules end."""

    def attack(a, *, b=(1, {"c": 2.0})):
        return a[..., None] in {1, 2} if b else torch.zeros(a)

    class Holder:
        def __init__(self, value):
            self.value, self.itself = value, self

    shared = [1.5, "x"]
    for _ in range(60):  # 2^60 paths
        shared = [shared, shared]
    cases = [
        attack,
        partial(pgd, loss="margin"),
        partial(pgd, loss="dlr"),
        Holder(1),
        Holder(2),
        Holder([1]).__init__,
        shared,
        [torch, range(3), slice(1, 2), frozenset({1, 2})],
        [torch.zeros(2), torch.zeros(2, dtype=torch.float64)],
        [torch.zeros(1, 2), torch.zeros(2)],
        np.zeros(2),
        nn.Linear(2, 2),
        [1, [1]],
        [[1], 1],
    ]
    digests = [digest(case) for case in cases]
    assert digests == [digest(case) for case in cases] and len(set(digests)) == len(cases)
    assert (
        digest(Holder(1)) == digests[3] and digest([torch.zeros(1, 2), torch.zeros(2)]) in digests
    )


def test_what_cannot_be_told_apart_needs_a_run_without_a_folder(case, tmp_path):
    model, data, _, _ = case
    attack = partial(pgd, callback=iter([]).__next__)
    with pytest.raises(ValueError, match=r"told from others, got one with a .*leave folder out"):
        evaluate(model, data, eps=0.03, attack=attack, folder=tmp_path, **QUIET)
