"""Mutated recipes and command lines: each is taken, or refused in one line, within 30 s of a core.

`python benchmarks/fuzz.py` checks 2,000 mutated recipes and runs 300 mutated command lines, each in
a process of its own, and writes the counts to `fuzz.json`. `--only recipe 17` runs one case and
prints it with what came; `--recipes 100 --commands 60` runs so many. The case of a number is always
the same. It ends with status 1 if a case ends in another way. `fuzz_data.py` does it to data and
models.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import yaml
from child import outcome

import flatreg.run.commands  # noqa: F401  # once, and not in every case
from flatreg.data.files import write_json
from flatreg.run.catalogue import FILE, TOPICS
from flatreg.run.cli import main as flatreg_main

CASES = {"recipe": 2000, "command": 300}
CPU_SECONDS, WALL_SECONDS = 30, 90  # a whole run takes 5 to 19; the machine may have other work
MEMORY = 2**34  # bytes of addresses: what asks for more is told so
BASES = (
    {
        "data": {"kind": "digits", "limit": 60, "test_limit": 20, "validation": 0.3},
        "model": {"name": "test_vit", "args": {"img_size": 32, "embed_dim": 32, "depth": 1}},
        "augment": {"crop": 2, "flip": True, "mixup": 0.2},
        "penalties": [{"kind": "MarginBound", "strength": 1, "eps": "8/255"}],
        "optimizer": {"lr": 0.001, "wrapper": {"kind": "SAM", "rho": 0.05}, "args": {"eps": 1e-8}},
        "epochs": 2,
        "batch_size": 20,
        "monitor": {"every": 1, "samples": 5},
        "evaluation": {"eps": 0.05, "attack": "fast", "curve": [0.1]},
        "baseline": True,
    },
    {
        "data": {"kind": "digits", "limit": 60, "test_limit": 20},
        "model": {"name": "test_resnet", "mean": [0.5], "std": [0.5]},
        "criterion": {"kind": "NFGSM", "eps": 0.1},
        "optimizer": {"name": "sgd", "lr": 0.1, "clip_norm": 1.0, "warmup_epochs": 1},
        "epochs": 3,
        "batch_size": 20,
        "ema": 0.9,
        "evaluation": {"eps": 0.5, "norm": "l2", "other_threats": {"linf": 0.1}},
        "variants": {"trades": {"criterion": {"kind": "TRADES", "eps": 0.1}}},
    },
)
BASES[0]["model"] |= {"mean": [0.5], "std": [0.5]}  # type: ignore[operator]
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, -0.0, 1e-300, 1e300, 10**12, 2**63, 10**400, 2**31, 1e-3),
    *("", " ", "x", "8/255", "1/0", "nan", ".inf", "1e400", "-1", "hf-hub:a/b", "../../etc/passwd"),
    *("file:///etc/passwd", "x" * 3000, "\x00", "\x1b[2J", "ü", "\ud800", "a\nb", "$x$", "`|<b>"),
    *(
        [],
        {},
        [[]],
        [None],
        {"kind": None},
        {"kind": []},
        {"": 1},
        [1] * 200,
        {"a": {"b": {"c": 1}}},
    ),
)
PIECES = ("!!python/object:os.x ", "!!timestamp x", "!!binary ", "&a ", "*a", "<<: ", "? ", "- ")
PIECES += (
    "{",
    "}",
    "[",
    "]",
    ":",
    ": ",
    "\n",
    "\t",
    "#",
    "'",
    '"',
    "%",
    "@",
    "---\n",
    "\x00",
    "|\n",
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values below one."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def replace(raw: Any, rng: random.Random) -> None:
    """Put another value somewhere: an odd one, or a kind that stands in the catalogue."""
    *parents, last = rng.choice(places(raw))
    for key in parents:
        raw = raw[key]
    kinds = json.loads(FILE.read_text(encoding="utf-8"))
    kind = rng.choice([name for topic in TOPICS for name in kinds[topic]])
    raw[last] = rng.choice((*ODD, kind, {"kind": kind}, {"kind": kind, "eps": 0.1}))


def remove(raw: Any, rng: random.Random) -> None:
    """Remove a value."""
    *parents, last = rng.choice(places(raw))
    for key in parents:
        raw = raw[key]
    del raw[last]


def rename(raw: Any, rng: random.Random) -> None:
    """Misspell a key, or put it elsewhere."""
    *parents, last = rng.choice([p for p in places(raw) if isinstance(p[-1], str)])
    for key in parents:
        raw = raw[key]
    at = rng.randrange(len(last) + 1)
    raw[rng.choice((last[:at] + last[at + 1 :], last[:at] + "e" + last[at:], "kind"))] = raw.pop(
        last
    )


def copy(raw: Any, rng: random.Random) -> None:
    """Put what stands at one place at another."""
    (*parents, last), source = rng.choice(places(raw)), rng.choice(places(raw))
    value, target = json.loads(json.dumps(raw)), raw
    for key in source:
        value = value[key]
    for key in parents:
        target = target[key]
    target[last] = value


CHANGES: tuple[Callable[[Any, random.Random], None], ...] = (replace, replace, remove, rename, copy)


def mutated_text(text: str, rng: random.Random) -> str:
    """The text with a piece inserted, removed or doubled."""
    start = rng.randrange(len(text))
    end = min(len(text), start + rng.choice((1, 1, 3, 30)))
    return rng.choice(
        (
            text[:start] + rng.choice(PIECES) * rng.choice((1, 1, 2, 200)) + text[start:],
            text[:start] + text[end:],
            text[:end] + text[start:],
            text[:start],
        )
    )


def recipe(number: int, root: Path) -> list[str]:
    """Arguments that check a mutated recipe."""
    rng = random.Random(number)
    raw = json.loads(json.dumps(rng.choice(BASES)))
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        if places(raw):
            rng.choice(CHANGES)(raw, rng)
    text = yaml.safe_dump(raw, sort_keys=False) or "\n"
    if rng.random() < 0.4:
        text = mutated_text(text, rng)
    file = root / "recipe.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    return ["check", str(file), f"output={root / 'run'}"]


def command(number: int, root: Path) -> list[str]:
    """Mutated arguments."""
    rng = random.Random(10**6 + number)
    (root / "recipe.yaml").write_text(yaml.safe_dump(rng.choice(BASES)), encoding="utf-8")
    (root / "run" / "checkpoints" / "plain").mkdir(parents=True)
    (root / "run" / "recipe.yaml").write_text(yaml.safe_dump(BASES[0]), encoding="utf-8")
    (root / "run" / "report.json").write_text(rng.choice(("", "{}", "[1]")), encoding="utf-8")
    file, run, nowhere = (str(root / name) for name in ("recipe.yaml", "run", "recipe.yaml/none"))
    words = list(
        rng.choice(
            (
                ("list",),
                ("list", rng.choice(TOPICS)),
                ("--help",),
                ("--version",),
                ("check", file, "epochs=3", "penalties.0.strength=0.5", f"output={run}2"),
                ("run", file, "epochs=1", f"output={nowhere}"),
                ("run", file, f"output={run}", "seed=4"),
                ("sweep", file, "--over", "optimizer.lr=0.1,0.2", f"output={nowhere}"),
                ("evaluate", run, "evaluation.eps=0.02", f"output={run}3"),
                ("measure", f"{run}/checkpoints/plain", "samples=20", f"output={run}4"),
                ("measure", "test_resnet", "--data", "digits", "eps=8", "mean=[0.5]", "std=[0.5]"),
                ("table", run, f"output={root / 'page.md'}", "--results", f"{run}5"),
            )
        )
    )
    odd = [str(one) for one in ODD if one is not None] + ["--over", "--data", "=", "a=", "-x", "--"]
    odd += ["epochs=1e400", "a.b.c=1", "seed=[", "data.0=1", "penalties.9.x=1", "output=", "\udcff"]
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(words) + 1)
        change = rng.randrange(4)
        if change == 0:
            words.insert(at, rng.choice(odd))
        elif change == 1 and at < len(words) and not words[at].startswith("output="):
            words[at] = mutated_text(words[at], rng) if words[at] else "x"
        elif change == 2 and at < len(words) and words[at] not in ("run", "sweep"):
            if not words[at].startswith("output="):
                del words[at]
        else:
            words.append(f"{rng.choice(('epochs', 'model.name', 'x', 'eps'))}={rng.choice(odd)}")
    return words


MAKERS = {"recipe": recipe, "command": command}


def judged(status: int, out: str, err: str) -> tuple[str, str]:
    """How a case ended: taken, refused, or what is wrong with it."""
    text = err.split("\r")[-1].strip() or err.strip()
    if status == 0:
        return "taken", ""
    lines = text.split("\n")
    if "Traceback" in err or ("unexpected " in err and "--traceback" in err):
        return "traceback", text[-500:]
    if status != 2 or out.strip() or not text:
        return "wrong", f"status {status}: {out[-200:]} {text[-300:]}"
    if lines[0].startswith("usage: "):
        lines = [line for line in lines if "error: " in line]
    long = [line for line in lines if len(line) > 1200 or not line.isprintable() or not line]
    return (
        ("wrong", f"not a line that a person reads: {long[0][:500]!r}") if long else ("refused", "")
    )


def attempt(kind: str, number: int, root: Path) -> tuple[str, str]:
    """Run a case and judge how it ended."""
    os.chdir(root)
    arguments, out, err = MAKERS[kind](number, root), io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = flatreg_main(arguments)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except BaseException:
            status = 1
            err.write(traceback.format_exc())
    return judged(status, out.getvalue(), err.getvalue())


def run(kind: str, number: int) -> tuple[str, str]:
    """The outcome of a case in a child process."""
    limits = {"seconds": WALL_SECONDS, "memory": MEMORY, "cpu_seconds": CPU_SECONDS}
    return outcome(lambda root: attempt(kind, number, root), **limits)


def main() -> int:
    """Run all cases, print what is wrong, write the counts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs=2, metavar=("KIND", "NUMBER"), help="one case")
    for kind, cases in CASES.items():
        parser.add_argument(f"--{kind}s", type=int, default=cases, dest=kind, help="how many")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    if options.only:
        kind, number = options.only[0], int(options.only[1])
        with tempfile.TemporaryDirectory() as root:
            arguments = MAKERS[kind](number, Path(root))
            print(arguments)
            print((Path(root) / "recipe.yaml").read_bytes().decode("utf-8", "backslashreplace"))
            sys.stdout.flush()
        print(*run(kind, number))
        return 0
    counts = {kind: Counter[str]() for kind in CASES}
    wrong = 0
    for kind in CASES:
        for number in range(getattr(options, kind)):
            found, text = run(kind, number)
            counts[kind][found] += 1
            if found not in ("taken", "refused"):
                wrong += 1
                print(f"{kind} {number}: {found}: {text}", flush=True)
    write_json(
        options.output, {kind: dict(sorted(found.items())) for kind, found in counts.items()}
    )
    print(counts)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
