"""All benchmarks by one command: what there is, what it needs, and running it.

    python benchmarks/run.py                              # the list
    python benchmarks/run.py heads penalties              # these, one after the other
    python benchmarks/run.py all davda54=PATH/TO/sam.py   # all whose inputs are given

Every benchmark writes where it writes when it is called by itself: into the `.json` beside it, the
page or the figure that its docstring names. Machine and versions are printed first. Ends with
status 1 if one of them fails; the others are run all the same.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
# Name to arguments; what stands in braces is an input, given as key=value.
BENCHMARKS = {
    "arm_times": "{recipe}",
    "attack_path": "--checkpoints {checkpoints} --images {cifar10} --run {cifar10_run} "
    "--figure docs/figures/attack_path.png",
    "attacked_models": "{scratch}",
    "attacks": "--peer --ours --checkpoints {checkpoints} --cifar {cifar10} "
    "--runs digits={digits_run} cifar={cifar10_run} pairs={pairs_run} vit={vit_run} "
    "fashion={fashion_run}",
    "derivatives": "--output benchmarks/derivatives.json",
    "feature_bounds": "--output docs/figures/bound_curve.png",
    "findings": "--checkpoints {checkpoints} --cifar {cifar10} --digits {digits_run} "
    "--output benchmarks/findings.json",
    "fuzz": "",
    "fuzz_data": "",
    "gpu": "--data {cifar10} --davda54 {davda54}",
    "heads": "--output benchmarks/heads.json --docs docs/heads.md",
    "import_time": "",
    "kills": "",
    "masking": "--output benchmarks/masking.json",
    "optimizers": "--davda54 {davda54} --output benchmarks/optimizers.json",
    "penalties": "--output benchmarks/penalties.json",
    "processes": "",
    "published_flatness": "--fam {fam}",
    "scaling": "--check",
    "size": "",
    "streaming": "{scratch} rounds=12 batches=12",
    "verified_bounds": "--weights {sdp_weights} --data {sdp_data}",
}


def inputs_of(name: str) -> list[str]:
    """Names of the inputs that a benchmark needs."""
    return re.findall(r"\{(\w+)\}", BENCHMARKS[name])


def listing() -> str:
    """One line a benchmark: its name, what it asks, the inputs it needs."""
    lines = []
    for name in BENCHMARKS:
        docstring = (
            ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text(encoding="utf-8"))) or ""
        )
        needs = f" [{', '.join(inputs_of(name))}]" if inputs_of(name) else ""
        lines.append(f"{name:20}{docstring.splitlines()[0]}{needs}")
    return "\n".join([*lines, "[..]: inputs, as key=PATH; see the docstring of the script"])


def main(arguments: list[str]) -> int:
    """Run what is named."""
    given = dict(word.split("=", 1) for word in arguments if "=" in word)
    names = [word for word in arguments if "=" not in word]
    if not names:
        print(listing())
        return 0
    if names == ["all"]:
        names = [name for name in BENCHMARKS if given.keys() >= set(inputs_of(name))]
    known = {key for name in BENCHMARKS for key in inputs_of(name)}
    mistakes = [f"not known: {name}" for name in names if name not in BENCHMARKS]
    mistakes += [f"not known: {key}=" for key in given if key not in known]
    for name in BENCHMARKS.keys() & names:
        mistakes += [f"{name} needs {key}=PATH" for key in inputs_of(name) if key not in given]
    if mistakes:
        print(*sorted(mistakes), sep="\n", file=sys.stderr)
        return 2
    from side_by_side import describe_machine  # which imports torch: not for the list

    print(json.dumps(describe_machine("cpu"), indent=2), flush=True)
    failed = []
    for name in names:
        print(f"== {name}", flush=True)
        words = [word.format(**given) for word in BENCHMARKS[name].split()]
        script = [sys.executable, str(HERE / f"{name}.py"), *words]
        if subprocess.run(script, cwd=HERE.parent).returncode:
            failed.append(name)
    print(f"{len(names) - len(failed)} of {len(names)} benchmarks ran", *failed, sep="; failed: ")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
