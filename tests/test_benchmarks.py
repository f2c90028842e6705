"""`benchmarks/run.py` knows every benchmark, its arguments and its inputs."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def run():
    spec = importlib.util.spec_from_file_location("benchmarks_run", BENCHMARKS / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_benchmark_is_listed_and_takes_its_arguments(run, capsys):
    scripts = {p.stem: p.read_text() for p in BENCHMARKS.glob("*.py")}
    own = {name for name, text in scripts.items() if "__main__" in text}
    assert set(run.BENCHMARKS) == own - {"run", "child"}
    wrong = [
        (name, option)
        for name, words in run.BENCHMARKS.items()
        for option in re.findall(r"--[\w-]+", words)
        if not re.search(rf"[\"'(]{option[2:]}[\"']|{option}\"", scripts[name])
    ]
    assert not wrong
    assert run.main([]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in run.BENCHMARKS) and "[davda54]" in printed


def test_mistakes_are_named_before_anything_runs(run, capsys):
    assert run.main(["optimizers", "nothing", "davda45=x"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "not known: davda45=",
        "not known: nothing",
        "optimizers needs davda54=PATH",
    ]


def test_all_runs_what_has_its_inputs_and_says_what_failed(run, capsys, monkeypatch):
    ran = []

    def fails_once(command, cwd):
        ran.append(Path(command[1]).stem)
        return subprocess.CompletedProcess(command, int(ran[-1] == "heads"))

    monkeypatch.setattr(run.subprocess, "run", fails_once)
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    assert run.main(["all", "fam=somewhere"]) == 1
    assert "published_flatness" in ran and "optimizers" not in ran
    assert f"{len(ran) - 1} of {len(ran)} benchmarks ran; failed: heads" in capsys.readouterr().out
