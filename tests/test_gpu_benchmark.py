"""The benchmark for a GPU in miniature, on the CPU: its rows, and that a second call goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from flatreg.optimizers.methods import METHODS

ROOT = Path(__file__).parent.parent
ARMS = ["plain", "N-FGSM", "MarginBound", "curvature", "PGD-10"]


def start(folder, *arguments):
    script = [str(ROOT / "tests/run_and_exit.py"), str(ROOT / "benchmarks/gpu.py")]
    places = ["--state", str(folder / "state"), "--output", str(folder / "gpu.json")]
    return subprocess.Popen(
        [sys.executable, *script, "--miniature", *places, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def result(folder, *arguments):
    process = start(folder, *arguments)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    return json.loads((folder / "gpu.json").read_text(encoding="utf-8"))


def killed_in_training(folder):
    """Seconds of the epochs of the plain arm that were taken when the process was killed."""
    process, file = start(folder, "--parts", "training"), folder / "state/plain.pt"
    end = time.monotonic() + 120
    while not file.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    return torch.load(file, weights_only=True)["seconds"]


def test_every_row_is_measured_once_by_calls_that_go_on(tmp_path):
    taken = killed_in_training(tmp_path)
    whole = result(tmp_path)
    assert not whole["unfinished"]
    assert {"cpu", "gpu", "driver", "torch", "timm", "flatreg", "date"} <= whole["machine"].keys()
    assert whole["machine"]["miniature"]

    checks = whole["checks"]
    for name in ("float16, GradScaler", "bfloat16", "channels_last", "torch.compile", "FSDP2"):
        assert checks[name].keys() == {"SAM", "MarginBound"}
        assert all(row["number"] < float(row["expected"][1:]) for row in checks[name].values())
    wrappers = {method.__name__ for method in METHODS}
    assert wrappers <= checks["bits"].keys() & checks["host reads"].keys()
    assert "MarginBound" in checks["host reads"]
    judged = [row for rows in checks.values() for row in rows.values() if row["ok"] is not None]
    assert len(judged) > 35 and all(row["ok"] for row in judged), checks
    assert checks["host reads"]["a loop that reads"]["number"] == 1

    (steps,) = (rows for name, rows in whole["speed"].items() if name != "standard")
    assert wrappers | {"SAM of the paper, written here", "PGDAT, 10 steps"} <= steps.keys()
    for row in steps.values():
        assert "refused" in row or row["ratio"]["n"] == 2, row
    (cascade,) = whole["speed"]["standard"].values()
    assert cascade["ours"]["n"] == 4

    arms = whole["training"]["arms"]
    assert list(arms) == ARMS
    for row in arms.values():
        assert row["attacked"]["n"] == 8 and len(row["epochs"]) == 2 and row["ratio"] > 0
    assert arms["plain"]["epochs"][: len(taken)] == taken

    again = result(tmp_path)
    for part in ("checks", "speed", "training", "unfinished"):
        assert again[part] == whole[part]


def test_a_call_without_time_measures_nothing_and_says_so(tmp_path):
    found = result(tmp_path, "--minutes", "0", "--parts", "training")
    assert found["unfinished"] == [f"training / arms / {arm}" for arm in ARMS]
    assert found["training"] == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "cuda,speed"], "--parts: expected some of checks,speed,training, got cuda"),
        (["--data", "nowhere.npz"], "nowhere.npz"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path, arguments, message):
    process = start(tmp_path, *arguments)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and message in text and text.count("\n") == 1, text
