"""Wall time of an evaluation by 1, 2 and 3 processes, where the survivors lie with one of them.

    python benchmarks/processes.py          # writes benchmarks/processes.json
    python benchmarks/processes.py --quick  # a tenth of the work, prints only

A network is trained on digits by N-FGSM for a few seconds. From the test images as many are
taken that survive a PGD as are fooled by it, and sorted so that every second, or third, sample
survives: dealt out by turns, as `evaluate` deals them, all survivors lie with the first process.
"still" holds each process to the samples that it was dealt first; "anew" shares out the survivors
before each attack. Where the machine has fewer free cores than processes, the CPU seconds of the
busiest process say what the wall time would be.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

HERE = Path(__file__).parent


def network() -> torch.nn.Module:
    """A small convolutional network, the same in every process."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, padding=1),
        torch.nn.GELU(),
        torch.nn.Conv2d(16, 32, 3, stride=2, padding=1),
        torch.nn.GELU(),
        torch.nn.Flatten(),
        torch.nn.LazyLinear(10),
    )


def prepare(folder: Path, eps: float) -> None:
    """Train, and keep weights, survivors and others."""
    import flatreg
    from flatreg.data import Digits

    splits = Digits().load()
    images, labels = splits.train.images.float() / 255, splits.train.labels
    net = network()
    net(images[:2])
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    objective = flatreg.Objective(net, flatreg.NFGSM(eps=eps))
    for _ in range(12):
        for rows in torch.randperm(len(images)).split(64):
            flatreg.backward(optimizer, objective.bind(images[rows], labels[rows]))
            optimizer.step()
            optimizer.zero_grad()
    images, labels = splits.test.images.float() / 255, splits.test.labels
    found = flatreg.attacks.pgd(net.eval(), images, labels, eps=eps, steps=20, loss="margin")
    right = net(images).argmax(1) == labels
    torch.save(
        {
            "net": net.state_dict(),
            "images": images,
            "labels": labels,
            "survive": right & ~found.fooled,
        },
        folder / "case.pt",
    )


def work(folder: Path, eps: float, anew: bool, size: int) -> None:
    """One process of a launch: evaluate, and print the seconds on the first."""
    from accelerate import PartialState

    import flatreg
    from flatreg.attacks import apgd, pgd, square
    from flatreg.data.sharing import gather
    from flatreg.evaluation import evaluator

    state = PartialState(cpu=True)
    if not anew:
        evaluator.in_equal_shares = lambda batch, compute: compute(batch) if batch.indices else {}
    kept = torch.load(folder / "case.pt", weights_only=True)
    net, every = network(), state.num_processes
    net(kept["images"][:2])
    net.load_state_dict(kept["net"])
    hold, fall = (flag.nonzero().flatten() for flag in (kept["survive"], ~kept["survive"]))
    count, others = size // 3, iter(fall.repeat(9).tolist())
    order = []
    for row in hold.repeat(9)[:count].tolist():
        order += [row, *(next(others) for _ in range(max(every, 2) - 1))]
    data = torch.utils.data.TensorDataset(kept["images"][order], kept["labels"][order])
    stages = [
        partial(pgd, loss="margin", steps=10),
        partial(apgd, loss="dlr", targets=9, steps=50),
        partial(square, queries=1000),
    ]
    options = {"eps": eps, "attack": stages, "diagnose": False, "progress": False}
    flatreg.evaluate(net, data, samples=8, batch_size=64, **options)  # warm
    state.wait_for_everyone()
    started, worked = time.perf_counter(), time.process_time()
    result = flatreg.evaluate(net, data, batch_size=64, **options)
    seconds, busy = time.perf_counter() - started, time.process_time() - worked
    busiest = max(gather({"busy": [busy]})["busy"])
    if state.is_main_process:
        found = {"seconds": seconds, "busiest": busiest, "n": result.n}
        found["survivors"] = result.attacked.count
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")


def launched(folder: Path, eps: float, processes: int, anew: bool, size: int) -> dict[str, float]:
    """Seconds of one evaluation by so many processes."""
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    runner = str(HERE.parent / "tests/run_and_exit.py")
    arguments = [__file__, "--work", folder, "--eps", eps, "--size", size]
    command = [sys.executable, *start, runner, *map(str, arguments), *(["--anew"] if anew else [])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    found: dict[str, float] = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path)
    parser.add_argument("--anew", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--size", type=int, default=90)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.eps, options.anew, options.size)
        return
    size, repeats = (18, 1) if options.quick else (options.size, 2)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, options.eps)
        cases = [(1, True), (2, False), (2, True), (3, False), (3, True)]
        times: dict[tuple[int, bool], list[dict[str, float]]] = {case: [] for case in cases}
        for _ in range(repeats):  # side by side: the machine may be shared
            for case in cases:
                times[case].append(launched(folder, options.eps, *case, size))
        for (processes, anew), found in times.items():
            seconds = sorted(one["seconds"] for one in found)
            rows.append(
                {
                    "processes": processes,
                    "survivors shared out": "anew" if anew else "still",
                    "seconds": [round(s, 2) for s in seconds],
                    "CPU seconds of the busiest process": round(
                        min(o["busiest"] for o in found), 2
                    ),
                    "n": found[0]["n"],
                    "survivors": found[0]["survivors"],
                }
            )
            print(rows[-1])
    if not options.quick:
        about = {"cores": os.cpu_count(), "load": os.getloadavg()[0], "torch": torch.__version__}
        text = json.dumps({"machine": about, "rows": rows}, indent=1)
        (HERE / "processes.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
