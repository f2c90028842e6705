"""What trackers are told: every epoch, the final numbers and figures; and that they cost no run."""

import re
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker

from flatreg import read_report
from flatreg.run.checkpoints import Epoch, read_history
from flatreg.run.cli import main
from flatreg.run.trackers import close_trackers, log_epoch, log_report
from flatreg.run.train import make_accelerator

RECIPE = """
data: {kind: digits, limit: 200, test_limit: 20, validation: 0.2}
model: {name: test_convnext3, args: {kernel_sizes: 3}, mean: [0.5], std: [0.5]}
optimizer: {lr: 1.0e-3}
epochs: 2
batch_size: 50
monitor: {every: 2, samples: 20}
evaluation: {eps: 0.05, attack: fast, curve: [0.02], other_threats: {l2: 0.1}}
baseline: true
log_with: [tensorboard]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    pytest.importorskip("tensorboard")
    folder = tmp_path_factory.mktemp("runs")
    (folder / "small.yaml").write_text(RECIPE)
    assert main(["run", str(folder / "small.yaml"), f"output={folder / 'small'}"]) == 0
    return folder / "small"


def events_of(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    return accumulator.EventAccumulator(str(folder / "flatreg")).Reload()


def scalars(events, name):
    return {event.step: event.value for event in events.Scalars(name)}


def test_tensorboard_holds_every_epoch_and_the_report(run):
    events = events_of(run)
    for row in read_report(run).rows:
        result, told = row.evaluation, f"{row.name}/"
        losses = {epoch.epoch: pytest.approx(epoch.loss, rel=1e-4) for epoch in row.history}
        assert scalars(events, f"{told}loss") == losses and len(losses) == 2
        monitored = row.history[1].monitored.value
        assert scalars(events, f"{told}validation_attacked_accuracy") == {
            1: pytest.approx(monitored)
        }
        expected = {
            "clean_accuracy": result.clean.value,
            "attacked_accuracy": result.attacked.value,
            "attacked_accuracy_low": result.attacked.low,
            "attacked_accuracy_high": result.attacked.high,
            "attacked_accuracy_linf_eps_0.05": result.attacked.value,
            "attacked_accuracy_linf_eps_0.02": result.curve[0].accuracy.value,
            "attacked_accuracy_l2_eps_0.1": result.other_threats[0].attacked.value,
            "eps": 0.05,
            "n": 20,
            "kappa": row.kappa().value,
            "flagged_findings": len(row.flagged_findings),
        }
        found = {name: scalars(events, f"{told}{name}") for name in expected}
        assert found == {name: {2: pytest.approx(v)} for name, v in expected.items()}
    figures = {f"report/{file.stem}" for file in (run / "figures").glob("*.png")}
    assert figures and set(events.Tags()["images"]) == figures


def fail(*_, **__):
    raise ConnectionError("the server\nis gone")


SAID = (
    "flatreg: log_with: {} failed and is told no more; the run goes on: the server is gone\n"
).format


def test_a_tracker_that_fails_costs_a_run_one_line(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("flatreg.run.trial.try_tracker", lambda name: None)
    monkeypatch.setattr(TensorBoardTracker, "log", fail)
    changes = ["epochs=1", "monitor=null", "baseline=false", "evaluation.other_threats={}"]
    recipe, folder = str(run.parent / "small.yaml"), tmp_path / "run"
    assert main(["run", recipe, *changes, f"output={folder}"]) == 0
    assert capsys.readouterr().err.count(SAID("tensorboard")) == 1
    assert len(read_report(folder).rows[0].history) == 1
    assert len(read_history(folder / "checkpoints/flatreg")) == 1


def test_trackers_that_are_not_there_are_named():
    with pytest.raises(ValueError, match=r"log_with: expected one of .*tensorboard.*, got 'paper'"):
        make_accelerator(["paper"])
    with pytest.raises(ValueError, match="log_with: swanlab is not installed"):
        make_accelerator(["swanlab"])


class Told:
    """A tracker that keeps what it is told; `takes` are the ways in which it can."""

    def __init__(self, name, *takes):
        self.name, self.told, self.closed, self.defined = name, [], False, []
        self.tracker = SimpleNamespace(define_metric=lambda *a, **k: self.defined.append((a, k)))
        if "log_images" in takes:
            self.log_images = lambda images, **kw: self.told.append((images, kw))
        if "log_artifact" in takes:
            self.log_artifact = lambda file, where: self.told.append((file, where))

    def log(self, values, **where):
        self.told.append((values, where))

    def finish(self):
        self.closed = True


def told_by(run, *trackers):
    """What the last of `trackers` is told of a run."""
    accelerator = Accelerator(cpu=True)
    accelerator.trackers = list(trackers)
    for arm in ("plain", "flatreg"):
        log_epoch(accelerator, arm, Epoch(0, 0.1, 1.0, 0.5, {"CrossEntropy": 0.5}))
    log_report(accelerator, read_report(run), run)
    close_trackers(accelerator)
    assert trackers[-1].closed and not accelerator.trackers
    return trackers[-1].told


def test_wandb_is_told_of_epochs_by_a_name_of_each_arm(run):
    """It drops what has a smaller step than before, as every arm after the first begins."""
    tracker = Told("wandb", "log_images")
    told = told_by(run, tracker)
    assert not any("step" in where for _, where in told)
    epochs = [{k: v for k, v in values.items() if k.endswith("/epoch")} for values, _ in told[:4]]
    assert epochs == [
        {"plain/epoch": 0},
        {"flatreg/epoch": 0},
        {"plain/epoch": 2},
        {"flatreg/epoch": 2},
    ]
    assert (("plain/*",), {"step_metric": "plain/epoch"}) in tracker.defined


def test_the_page_names_all_that_is_told(run):
    page = (Path(__file__).parent.parent / "docs/sharing.md").read_text(encoding="utf-8")
    told = [name for values, _ in told_by(run, Told("dvclive")) for name in values]
    monitored = ["ARM/validation_attacked_accuracy", "ARM/monitor_seconds"]
    names = {re.sub(r"^(plain|flatreg)/", "ARM/", name) for name in told} | {*monitored}
    names = {name for name in names if not re.search("_eps_|CrossEntropy", name)}
    assert names == set(re.findall(r"`(ARM/\w+)`", page)) - {"ARM/epoch"}


@pytest.mark.parametrize("method", ["log", "log_images", "finish"])
def test_one_that_fails_anywhere_is_let_go_and_the_others_are_told(run, capsys, method):
    broken, whole = Told("comet_ml", "log_images"), Told("mlflow", "log_artifact")
    setattr(broken, method, fail)
    told = told_by(run, broken, whole)
    assert len(told) > 4 and whole.closed
    assert capsys.readouterr().err == SAID("comet_ml")


@pytest.mark.parametrize("name", ["comet_ml", "mlflow", "trackio", "dvclive"])
def test_figures_are_told_where_a_tracker_takes_them(run, name, monkeypatch):
    way = {"comet_ml": ("log_images",), "mlflow": ("log_artifact",)}.get(name, ())
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(Image=lambda file: ("image", file)))
    told = told_by(run, Told(name, *way))
    assert [where["step"] for _, where in told[:4]] == [0, 0, 2, 2]
    files = sorted(map(str, (run / "figures").glob("*.png")))
    names = [f"report/{file.rpartition('/')[2].removesuffix('.png')}" for file in files]
    if name == "comet_ml":
        ((images, where),) = told[4:]
        assert list(images) == names and where == {"step": 2}
        assert all(i.dtype == np.uint8 and i.shape[0] == 1 and i.ndim == 4 for i in images.values())
    elif name == "mlflow":
        assert told[4:] == [(file, "figures") for file in files]
    elif name == "trackio":
        assert told[4:] == [
            ({n: ("image", f) for n, f in zip(names, files, strict=True)}, {"step": 2})
        ]
    else:
        assert not told[4:]


@pytest.mark.skipif(find_spec("wandb") is None, reason="needs wandb")
def test_wandb_offline_keeps_every_epoch_of_every_arm(run, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    accelerator = make_accelerator(["wandb"])
    accelerator.init_trackers("flatreg")
    for arm in ("plain", "flatreg"):
        for number in range(3):
            log_epoch(accelerator, arm, Epoch(number, 0.1, 1.0, 1.0 / (number + 1), {}))
    log_report(accelerator, read_report(run), run)
    close_trackers(accelerator)
    import_module("wandb").teardown()  # its own process has then written all of it
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    told = file.read_bytes()  # protobuf records: a name, and its value as JSON
    for arm in (b"plain", b"flatreg"):
        losses = re.findall(arm + rb"/loss\x82\x01.([\d.]+)", told, re.S)
        assert {float(loss) for loss in losses} == {1.0, 0.5, 1 / 3}
        assert re.search(arm + rb"/attacked_accuracy\x82", told)
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/report/*.png"))
