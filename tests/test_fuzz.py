"""Some cases of the script that mutates recipes and command lines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="sdists come without benchmarks")
def test_mutated_recipes_and_command_lines_are_taken_or_refused_in_one_line(tmp_path):
    command = [sys.executable, "benchmarks/fuzz.py", "--recipes", "100", "--commands", "60"]
    command += ["--output", str(tmp_path / "counts.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads((tmp_path / "counts.json").read_text(encoding="utf-8"))
    for kind, cases in (("recipe", 100), ("command", 60)):
        assert sum(counts[kind].values()) == cases and counts[kind].keys() == {"taken", "refused"}
