"""CPU seconds that `import flatreg` and the command line take before they do any work.

    python benchmarks/import_time.py [repetitions]

Each line is the median over fresh processes of the CPU time (user and system) of one process, so
that a busy machine changes it little. `import torch, timm, accelerate` stands beside as the least
that a training needs.
"""

import resource
import statistics
import subprocess
import sys

PYTHON = {
    "nothing": "pass",
    "import torch": "import torch",
    "import torch, timm, accelerate": "import torch, timm, accelerate",
    "import flatreg": "import flatreg",
    "from flatreg import SAM": "from flatreg import SAM",
    "from flatreg import *": "from flatreg import *",
}
COMMANDS = {
    "flatreg --help": ["--help"],
    "flatreg --version": ["--version"],
    "flatreg list": ["list"],
    "flatreg train (no such verb)": ["train"],
    "flatreg check none.yaml (no such file)": ["check", "none.yaml"],
}


def cpu_seconds(arguments: list[str]) -> float:
    """CPU time of `python ARGUMENTS`, its children included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print a line for each way to start."""
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    started = {name: ["-c", code] for name, code in PYTHON.items()}
    started |= {name: ["-m", "flatreg", *words] for name, words in COMMANDS.items()}
    print(f"median CPU seconds of {repetitions} processes")
    for name, arguments in started.items():
        seconds = statistics.median(cpu_seconds(arguments) for _ in range(repetitions))
        print(f"{name:<40}{seconds:6.2f}", flush=True)


if __name__ == "__main__":
    main()
