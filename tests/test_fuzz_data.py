"""Every fifth case of the script that mutates data sets and makes odd models."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from flatreg import evaluate

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="sdists come without benchmarks")
def test_mutated_sets_and_odd_models_are_read_right_or_refused(tmp_path):
    command = [sys.executable, "benchmarks/fuzz_data.py", "--every", "5"]
    command += ["--output", str(tmp_path / "counts.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads((tmp_path / "counts.json").read_text(encoding="utf-8"))
    assert sum(counts["sets"].values()) == 30 and sum(counts["models"].values()) == 12
    for what, kinds in (("sets", {"read", "refused"}), ("models", {"read", "refused"})):
        assert kinds <= counts[what].keys()


class Sparse(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x.flatten(1)).to_sparse()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (torch.nn.LazyLinear(5), "'weight' of LazyLinear has none"),
        (torch.nn.Linear(4, 5, device="meta"), "'weight' of Linear has none"),
        (Sparse(4, 5), "expected dense logits, the model returns torch.sparse_coo"),
    ],
)
def test_weights_without_values_and_sparse_logits_are_refused(model, message):
    data = TensorDataset(torch.rand(8, 1, 2, 2), torch.arange(8) % 2)
    with pytest.raises(ValueError, match=message) as error:
        evaluate(model, data, eps=0.1, attack="fast", progress=False)
    assert "\n" not in str(error.value)
