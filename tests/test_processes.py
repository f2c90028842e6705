"""The processes of one launch: what ends one ends all, and is said once."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import DistributedType
from accelerate.commands.config.config_args import load_config_from_file
from torch import distributed as dist

from flatreg.run import processes
from flatreg.run.recipe import load_recipe
from flatreg.run.train import make_accelerator

ROOT = Path(__file__).parent.parent
RUN = [
    *(ROOT / "recipes/quickstart.yaml", "epochs=1", "batch_size=24"),
    *("data.limit=120", "data.test_limit=24", "optimizer.warmup_epochs=0", "evaluation.curve=[]"),
    *("model.name=test_vit", "model.args={img_size: 32, embed_dim: 32, depth: 1}"),
    *("evaluation.attack=fast", "baseline=false", "variants={}"),
]
FAULTY = """
import os, signal, sys
from flatreg.evaluation.evaluator import Evaluator
from flatreg.run import epoch, processes, trial
from flatreg.run.cli import program

processes._SHARED = 1.0
owner, name, kind, rank, *arguments = sys.argv[1:]

def faulty(*arguments, **keywords):
    if os.environ["RANK"] == rank and kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ["RANK"] == rank:
        raise ValueError("this process alone") if kind == "refused" else KeyError("a fault")
    return inner(*arguments, **keywords)

if owner != "nothing":
    owner = {"trial": trial, "epoch": epoch, "Evaluator": Evaluator}[owner]
    inner = getattr(owner, name)
    setattr(owner, name, faulty)
sys.argv = ["flatreg", *arguments]
sys.exit(program())
"""


def start(tmp_path, faults, arguments, *options):
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", *options, script, *faults, *arguments]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([str(part) for part in command], env=environment, **pipe)


def said(output):
    """Lines of flatreg, and of tracebacks through it; torchrun has a traceback of its own."""
    lines = output.replace("\r", "\n").splitlines()
    return [line for line in lines if line.startswith("flatreg: ") or str(ROOT / "flatreg") in line]


UNEXPECTED = "recipe: arm margin-bound: unexpected KeyError: 'a fault' (--traceback shows where)"
CASES = {
    "refused": (2, "epoch", "_clipped_norm", "1", "flatreg: this process alone"),
    "killed": (3, "Evaluator", "_attack", "0", "Signal 9 (SIGKILL)"),
    "broken": (2, "trial", "build_training", "1", f"flatreg: process 1 of 2: {UNEXPECTED}"),
}


@pytest.mark.parametrize("kind", CASES)
def test_a_process_that_ends_ends_all_and_says_why_once(tmp_path, kind):
    count, owner, name, rank, words = CASES[kind]
    options = "--standalone", f"--nproc_per_node={count}"
    arguments = "run", *RUN, f"output={tmp_path / 'run'}"
    launch = start(tmp_path, (owner, name, kind, rank), arguments, *options)
    output = launch.communicate(timeout=300)[0]  # a collective that waits does so for longer
    assert launch.returncode != 0
    assert output.count(words) == 1, output[-3000:]
    if kind == "killed":
        assert all("interrupted by SIGTERM" in line for line in said(output)), said(output)
    else:
        assert said(output) == [words], said(output)


@pytest.mark.parametrize("shared", [False, True])
def test_two_machines(tmp_path, shared):
    """Two launchers: without a common folder both refuse; a mistake on one is told on both."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    launches = []
    for node in (0, 1):
        folder = tmp_path if shared else tmp_path / str(node)
        folder.mkdir(exist_ok=True)
        options = "--nnodes=2", f"--node_rank={node}", f"--master_port={port}"
        options += "--master_addr=127.0.0.1", "--nproc_per_node=1"
        faults = ("epoch", "_clipped_norm", "refused", "1") if shared else ("nothing", "", "", "")
        arguments = "run", *RUN, f"output={folder / 'run'}"
        launches.append(start(folder, faults, arguments, *options))
    for launch in launches:
        output = launch.communicate(timeout=100)[0]
        assert launch.returncode != 0
        (line,) = said(output)
        assert ("this process alone" if shared else "choose a folder that all machines") in line
    assert shared or not (tmp_path / "0/run").exists()


@pytest.mark.parametrize(
    ("size", "accumulation", "mixup", "count", "choices"),
    [
        (24, 1, 0.0, 3, None),
        (24, 2, 0.2, 3, None),
        (64, 1, 0.0, 3, "63 or 66"),
        (12, 6, 0.0, 4, "24"),
        (20, 2, 0.2, 3, "12 or 24"),
    ],
)
def test_a_batch_that_cannot_be_shared_out_is_refused(size, accumulation, mixup, count, choices):
    settings = f"batch_size={size}", f"accumulation={accumulation}", f"augment.mixup={mixup}"
    recipe = load_recipe(ROOT / "recipes/quickstart.yaml", settings)
    if choices is None:
        processes.check_batch(recipe, count)
        return
    with pytest.raises(ValueError, match=rf"of all processes.*got {size}: write .*: {choices}$"):
        processes.check_batch(recipe, count)


def test_processes_that_do_not_find_each_other_are_refused(monkeypatch):
    # Up to 1.11 at least Accelerate refuses it itself, and writes to the environment before.
    monkeypatch.setattr(os, "environ", os.environ.copy() | {"WORLD_SIZE": "2"})
    words = r"2 processes were started.*ACCELERATE_USE_CPU=true|`MASTER_ADDR` env was not set"
    with pytest.raises(ValueError, match=words):
        processes.join()


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_engines_that_own_parameters_are_refused_where_they_are_configured(monkeypatch, engine):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(ValueError, match=rf"configured for {engine}: choose MULTI_GPU"):
        make_accelerator()


CONFIGURATIONS = sorted((ROOT / "recipes/accelerate").glob("*.yaml"))


@pytest.mark.parametrize("file", CONFIGURATIONS, ids=lambda file: file.stem)
def test_accelerate_reads_the_configurations(file):
    """Every key is one that it knows, and the processes are those that the comment names."""
    found = load_config_from_file(str(file))
    assert found.num_processes == {"one_machine": 8, "two_machines": 16, "fsdp2": 8}[file.stem]
    assert found.num_machines == (2 if file.stem == "two_machines" else 1)
    expected = DistributedType.FSDP if file.stem == "fsdp2" else DistributedType.MULTI_GPU
    assert found.distributed_type == expected
    if file.stem == "fsdp2":
        assert found.fsdp_config["fsdp_version"] == 2


def test_there_are_configurations():
    assert len(CONFIGURATIONS) == 3


@pytest.mark.parametrize("numbered", [True, False])
def test_one_process_of_torchrun_is_not_called_lost(monkeypatch, capsys, numbered):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    accelerator = processes.join()
    monkeypatch.setenv("MASTER_PORT", "29500")
    if numbered:
        monkeypatch.setenv("LOCAL_RANK", "0")
    processes.warn_of_lost_processes(accelerator)
    assert bool(capsys.readouterr().err) is not numbered


def test_errors_of_collectives_are_told_from_others():
    lost = [
        RuntimeError("[../gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]"),
        dist.DistBackendError("NCCL communicator was aborted"),
        dist.DistNetworkError("The client socket has timed out"),
    ]
    assert all(map(processes.is_of_lost_peer, lost))
    wrapped = ValueError("could not be written")
    wrapped.__cause__ = lost[0]
    assert processes.is_of_lost_peer(wrapped)
    for other in (RuntimeError("out of memory"), ValueError("eps"), KeyboardInterrupt(), None):
        assert not processes.is_of_lost_peer(other)
