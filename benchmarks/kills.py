"""Runs killed at random moments, and whether they end as a run that was not.

    python benchmarks/kills.py [--kills 50]

Each round is a run of the same recipe in a folder of its own. It is killed (SIGKILL, SIGTERM and
SIGINT in turn) again and again, and then ends. Compared with a run that was not killed: every byte
of the weights and the optimizer, the history but for its seconds, every verdict. Where a kill fell
is read off the folder. The result is benchmarks/kills.json.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from flatreg.data.files import write_json

RECIPE = """
data: {kind: digits, test: 0.8, validation: 0.1}
augment: {crop: 1, flip: true, mixup: 0.4}
model: {name: test_convnext3, args: {kernel_sizes: 3, drop_path_rate: 0.2}, mean: [0.5], std: [0.5]}
criterion: {kind: NFGSM, eps: 0.1}
optimizer: {lr: 3.0e-3, clip_norm: 1.0, wrapper: {kind: LookSAM, rho: 0.05, every: 3}}
epochs: 6
batch_size: 32
ema: 0.9
checkpoint_minutes: 0.003
monitor: {every: 2, samples: 20}
evaluation: {eps: 0.1, samples: 100, attack: fast}
"""
SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
PER_RUN = 5  # kills, after which a run may end


def start(recipe: Path, folder: Path) -> subprocess.Popen[bytes]:
    """A run in a process of its own, with one thread."""
    return subprocess.Popen(
        [sys.executable, "-m", "flatreg", "run", str(recipe), f"output={folder}"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def outcome(folder: Path) -> dict[str, object]:
    """All of a finished run that must not depend on kills."""
    (last,) = folder.glob("checkpoints/flatreg/epoch-*")
    names = ("model.safetensors", "training.safetensors", "average.safetensors", "optimizer.pt")
    files = {name: (last / name) for name in names}
    history = json.loads((last / "history.json").read_text(encoding="utf-8"))
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return {
        "weights": {name: file.read_bytes() for name, file in files.items() if file.exists()},
        "history": [{k: v for k, v in e.items() if "seconds" not in k} for e in history],
        "verdicts": [row["evaluation"]["verdicts"] for row in report["rows"]],
        "left over": [
            p.name for p in folder.rglob("*") if "-partial" in p.name or "within" in p.name
        ],
    }


def fell(folder: Path) -> str:
    """What the run was at when it was killed."""
    if any(folder.rglob(".*-partial*")):
        return "writing a file"
    if any(folder.glob("evaluations/**/*.safetensors")):
        return "evaluation"
    if any(folder.glob("checkpoints/flatreg/within-*")):
        return "training"
    if any(folder.glob("checkpoints/flatreg/epoch-0006")):
        return "evaluation"
    return "training" if any(folder.glob("checkpoints/flatreg/epoch-*")) else "start"


def main() -> None:
    """Kill, continue, compare, and write the counts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    where: Counter[str] = Counter()
    exits: Counter[str] = Counter()
    slowest, runs, different = 0.0, 0, []
    with tempfile.TemporaryDirectory() as scratch, tqdm(total=options.kills) as bar:
        recipe, whole = Path(scratch) / "small.yaml", Path(scratch) / "whole"
        recipe.write_text(RECIPE, encoding="utf-8")
        started = time.monotonic()
        if start(recipe, whole).wait():
            raise SystemExit("the run that is not killed failed")
        seconds, expected = time.monotonic() - started, outcome(whole)
        while bar.n < options.kills:
            folder, killed = Path(scratch) / f"run-{runs}", 0
            while killed < PER_RUN and bar.n < options.kills:
                run, number = start(recipe, folder), SIGNALS[bar.n % len(SIGNALS)]
                try:
                    run.wait(draw.uniform(0.3 * seconds, seconds))
                    break  # it ended before
                except subprocess.TimeoutExpired:
                    sent = time.monotonic()
                    run.send_signal(number)
                    run.wait()
                    slowest = max(slowest, time.monotonic() - sent)
                    where[fell(folder)] += 1
                    exits[f"{number.name}: {run.returncode}"] += 1
                    killed += 1
                    bar.update()
            status = start(recipe, folder).wait()
            found = outcome(folder) if status == 0 else {}
            if status or found != expected:
                wrong = [key for key, value in expected.items() if found.get(key) != value]
                different.append({"run": runs, "status": status, "differ": wrong})
            shutil.rmtree(folder, ignore_errors=True)
            runs += 1
            result = {
                "kills": bar.n,
                "seed": options.seed,
                "runs": runs,
                "runs that ended otherwise": different,
                "where the kills fell": dict(where),
                "exit codes": dict(exits),
                "seconds from signal to exit, at most": round(slowest, 1),
            }
            write_json(Path(__file__).with_suffix(".json"), result)  # after each, as hours may pass
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
