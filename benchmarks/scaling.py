"""What a step costs on N devices, computed from one device's seconds and from the bytes sent.

    python benchmarks/scaling.py --check    # measures 1, 2, 3 processes here beside the formula
    python benchmarks/scaling.py --seconds 0.10 --parameters 25.6e6 --bandwidth 40e9

A step of a method takes p passes, each forward and backward, of c seconds on the images of one
device, and averages the gradient k times. A ring sends, of W bytes among N devices,

    R(N) = 2 (N - 1) / N * W / bandwidth + 2 (N - 1) * latency

The step then takes between p c + max(0, k R - b), where the last backward pass of b = 2/3 c hides
what is sent, and p c + k R, where nothing is hidden.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

HERE = Path(__file__).parent
# Passes of a step, and averages of the gradient. A pass of an attack takes the gradient in the
# inputs, and no weight's: it is counted as a whole pass, which is too much by the weights' third.
METHODS = {
    "plain": (1, 1),
    "SAM": (2, 1),
    "SAM, sync_perturbation": (2, 2),
    "OffManifoldCurvature (3 passes)": (4, 1),
    "PGD-10 training": (11, 1),
}
CHECKED = ("plain", "SAM", "SAM, sync_perturbation")
DEVICES = (8, 16, 32, 64, 128, 256, 512)


def reduce_seconds(processes: int, size: float, bandwidth: float, latency: float) -> float:
    """Seconds of averaging `size` bytes over a ring."""
    sent = 2 * (processes - 1) / processes * size
    return sent / bandwidth + 2 * (processes - 1) * latency


def step_seconds(passes: int, reduces: int, compute: float, reduce: float) -> tuple[float, float]:
    """Least and most seconds of a step: all that can be hidden is hidden, or nothing."""
    hidden = max(0.0, reduces * reduce - 2 / 3 * compute)
    return passes * compute + hidden, passes * compute + reduces * reduce


def table(seconds: float, parameters: float, bandwidth: float, latency: float) -> str:
    """Markdown: the share of a step that computes, for every method and number of devices."""
    lines = ["| method | " + " | ".join(map(str, DEVICES)) + " |"]
    lines.append("|---" * (len(DEVICES) + 1) + "|")
    for name, (passes, reduces) in METHODS.items():
        cells = []
        for devices in DEVICES:
            reduce = reduce_seconds(devices, 4 * parameters, bandwidth, latency)
            least, most = step_seconds(passes, reduces, seconds, reduce)
            low, high = (100 * passes * seconds / whole for whole in (most, least))
            cells.append(f"{low:.0f} to {high:.0f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def work(folder: Path) -> None:
    """One process: steps of two methods, the time of averages, and the first writes them."""
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch.nn.parallel import DistributedDataParallel

    import flatreg

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    world = dist.get_world_size()
    net = torch.nn.Sequential(
        torch.nn.Linear(1024, 2048),
        torch.nn.ReLU(),
        torch.nn.Linear(2048, 2048),
        torch.nn.ReLU(),
        torch.nn.Linear(2048, 10),
    )
    x, y = torch.rand(128, 1024), torch.randint(10, (128,))
    found: dict[str, float] = {"parameters": sum(p.numel() for p in net.parameters())}
    ddp = DistributedDataParallel(net)
    runs: dict[str, Callable[[], object]] = {}
    for name in CHECKED:
        base = torch.optim.SGD(net.parameters(), lr=1e-3)
        sharp = flatreg.SAM(base, sync_perturbation="sync" in name)
        optimizer = base if name == "plain" else sharp

        def step(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
            flatreg.backward(optimizer, lambda: F.cross_entropy(model(x), y), model=model)
            for p in net.parameters():
                p.grad = None

        runs[name] = partial(step, optimizer, ddp)
        runs[f"{name}, alone"] = partial(step, optimizer, net)
    for name, count in (("whole", int(found["parameters"])), ("one number", 1)):
        runs[name] = partial(dist.all_reduce, torch.zeros(count))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(12):  # by turns: other programs may use the machine
        for name, run in runs.items():
            dist.barrier()
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    found |= {name: sorted(times[2:])[5] for name, times in seconds.items()}
    if dist.get_rank() == 0:
        (folder / f"{world}.json").write_text(json.dumps(found), encoding="utf-8")


def check() -> None:
    """Measure 1, 2 and 3 processes, and write them beside what the formula says."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for processes in (1, 2, 3):
            start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
            runner = str(HERE.parent / "tests/run_and_exit.py")
            command = [sys.executable, *start, str(processes), runner, __file__, "--work", name]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run(command, env=environment, check=True, capture_output=True)
            found = json.loads((Path(name) / f"{processes}.json").read_text(encoding="utf-8"))
            latency = found["one number"] / max(1, 2 * (processes - 1))
            size = 4 * found["parameters"]
            spent = max(found["whole"] - found["one number"], 1e-9)
            bandwidth = 2 * (processes - 1) / processes * size / spent
            reduce = 0.0
            if processes > 1:
                reduce = reduce_seconds(processes, size, bandwidth, latency)
            for method in CHECKED:
                passes, reduces = METHODS[method]
                compute = found[f"{method}, alone"] / passes
                least, most = step_seconds(passes, reduces, compute, reduce)
                row = {"processes": processes, "method": method, "measured": found[method]}
                row |= {"computed, hidden": least, "computed, not hidden": most}
                rows.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
                print(rows[-1])
    about = {"cores": os.cpu_count(), "load": os.getloadavg()[0], "torch": torch.__version__}
    text = json.dumps({"machine": about, "rows": rows}, indent=1)
    (HERE / "scaling.json").write_text(text + "\n", encoding="utf-8")


def main() -> None:
    """Print the table, or check the formula."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--seconds", type=float, default=0.10, help="of one pass on one device")
    parser.add_argument("--parameters", type=float, default=25.6e6)
    parser.add_argument("--bandwidth", type=float, default=40e9, help="bytes a second")
    parser.add_argument("--latency", type=float, default=20e-6, help="seconds of one hop")
    options = parser.parse_args()
    if options.work:
        work(options.work)
    elif options.check:
        check()
    else:
        settings = options.seconds, options.parameters, options.bandwidth, options.latency
        print(table(*settings))


if __name__ == "__main__":
    main()
