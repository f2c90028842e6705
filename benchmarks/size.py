"""How large the package is, and how far five everyday journeys travel through it.

    python benchmarks/size.py                       # this checkout
    python benchmarks/size.py ../before ../after    # several checkouts, side by side

Every line of the package counts once: code, docstring, comment, import or blank. A record is a
dataclass, a `NamedTuple`, a `TypedDict` or a pydantic model. A journey is run under
`sys.setprofile`: its files and functions are those of the package whose frames are entered, module
bodies and comprehensions aside. Two files are crossed both ways where each calls into the other.
Journeys take a minute; the numbers do not depend on the machine.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tempfile
import tokenize
from pathlib import Path

RECIPE = """
seed: 0
data: {kind: digits, limit: 64, test_limit: 16}
model: {name: test_convnext3, args: {act_layer: gelu, kernel_sizes: 3}, mean: [0.5], std: [0.5]}
penalties: [{kind: RelativeFlatness}]
optimizer: {lr: 1.0e-3}
epochs: 1
batch_size: 32
evaluation: {eps: 0.05, attack: fast, samples: 16}
"""

SETUP = """
import timm, torch, flatreg
from torch.utils.data import TensorDataset
torch.manual_seed(0)
inputs, labels = torch.rand(16, 3, 32, 32), torch.randint(10, (16,))
model = flatreg.with_normalization(timm.create_model("test_convnext3", num_classes=10))
data = TensorDataset(inputs, labels)
"""
JOURNEYS = {
    "a step: SAM, cross-entropy, two penalties": (
        SETUP
        + """
optimizer = flatreg.SAM(torch.optim.SGD(model.parameters(), lr=0.1))
""",
        """
objective = flatreg.Objective(
    model,
    flatreg.CrossEntropy(),
    [flatreg.RelativeFlatness(), flatreg.OffManifoldCurvature(eps=0.03)],
)
flatreg.backward(optimizer, objective.bind(inputs, labels))
optimizer.step()
""",
    ),
    "flatreg run, one arm": ("", "main(['run', recipe, 'output=' + folder])"),
    "evaluate, fast": (
        SETUP,
        "flatreg.evaluate(model, data, eps=0.03, attack='fast', diagnose=False, progress=False)",
    ),
    "evaluate, with curve and findings": (
        SETUP,
        "flatreg.evaluate(model, data, eps=0.03, attack='fast', curve=[0.01], progress=False)",
    ),
    "flatreg measure": (
        "main(['run', recipe, 'output=' + folder])",
        "main(['measure', folder + '/checkpoints/flatreg', 'samples=16', 'probed=8', "
        "'num_probes=2', 'rank=4'])",
    ),
    "a claim": ("", "claim()"),
}

COMMON = """
import sys, warnings, tempfile, contextlib, io, runpy
from pathlib import Path
warnings.simplefilter("ignore")
ROOT = Path({root!r})
recipe, folder = {recipe!r}, {folder!r}
try:
    from flatreg.run.cli import main
except ImportError:
    from flatreg.cli import main

import importlib, pkgutil, flatreg
for module in pkgutil.walk_packages(flatreg.__path__, "flatreg."):  # imports are no part of a way
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)


def claim():
    script = ROOT / "recipes" / "paper" / "closed_form.py"
    small = ["data.limit=64", "data.test_limit=32", "epochs=1", "evaluation.samples=32"]
    if script.exists():
        sys.argv = [str(script), *small, "variants={{}}", "output=" + folder]
        sys.path.insert(0, str(script.parent))
        runpy.run_path(str(script), run_name="__main__")
    else:
        main(["run", str(script.with_suffix(".yaml")), *small, "variants={{}}", "output=" + folder])
"""

TRACE = """
import json
frames, calls, PACKAGE = set(), set(), str(ROOT / "flatreg") + "/"
SCRIPTS = str(ROOT / "recipes") + "/"

def place(code):
    for base in (PACKAGE, SCRIPTS):
        if code.co_filename.startswith(base):
            return code.co_filename[len(base):]
    return None

def record(frame, event, _):
    if event != "call" or frame.f_code.co_name.startswith("<"):
        return
    here = place(frame.f_code)
    if here is None:
        return
    frames.add((here, frame.f_code.co_qualname if hasattr(frame.f_code, "co_qualname")
                else frame.f_code.co_name))
    caller = frame.f_back
    while caller is not None and place(caller.f_code) is None:
        caller = caller.f_back
    there = caller and place(caller.f_code)
    if there and there != here:
        calls.add((there, here))

def journey():
    exec(compile(BODY, "journey", "exec"), globals())

with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    exec(compile(BEFORE, "before", "exec"), globals())
    sys.setprofile(record)
    try:
        journey()
    except SystemExit:
        pass
    finally:
        sys.setprofile(None)
files = {f for f, _ in frames}
both = {tuple(sorted(pair)) for pair in calls if pair[::-1] in calls}
print(json.dumps([len(files), len(frames), len(both)]))
"""


def lines_by_kind(path: Path) -> dict[str, int]:
    """Lines of a file: code, docstring, comment, import, blank."""
    text = path.read_text(encoding="utf-8")
    kinds = ["code"] * (text.count("\n") + (not text.endswith("\n") and bool(text)))
    for number, line in enumerate(text.splitlines()):
        if not line.strip():
            kinds[number] = "blank"
    with tokenize.open(path) as stream:
        for token in tokenize.generate_tokens(stream.readline):
            if token.type == tokenize.COMMENT and token.line.strip().startswith("#"):
                kinds[token.start[0] - 1] = "comment"
    tree = ast.parse(text)
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            kinds[node.lineno - 1 : node.end_lineno] = ["import"] * (
                (node.end_lineno or node.lineno) - node.lineno + 1
            )
        elif isinstance(node, documented) and ast.get_docstring(node) is not None:
            first = node.body[0]
            end = first.end_lineno or first.lineno
            kinds[first.lineno - 1 : end] = ["docstring"] * (end - first.lineno + 1)
    return {k: kinds.count(k) for k in ("code", "docstring", "comment", "import", "blank")}


def is_record(node: ast.ClassDef) -> bool:
    """Whether a class is a dataclass, a NamedTuple, a TypedDict or a pydantic model."""
    names = [ast.unparse(part) for part in (*node.decorator_list, *node.bases)]
    kinds = ("dataclass", "record", "NamedTuple", "TypedDict", "BaseModel", "_Config", "_Method")
    return any(name.split("(")[0].split(".")[-1] in kinds for name in names)


def size(root: Path) -> dict[str, int]:
    """Lines, files, records, names and rooms of the package below `root`."""
    package = root / "flatreg"
    files = sorted(package.rglob("*.py"))
    total: dict[str, int] = {}
    records = functions = dynamic = 0
    for path in files:
        for kind, count in lines_by_kind(path).items():
            total[kind] = total.get(kind, 0) + count
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            records += isinstance(node, ast.ClassDef) and is_record(node)
            functions += isinstance(node, ast.FunctionDef)
            dynamic += isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "getattr",
                "hasattr",
            )
    aside = ("__init__", "__main__", "py", "__pycache__")
    entries = {p.name.split(".")[0] for p in package.iterdir()} - set(aside)
    names = run(root, "import flatreg; print(len(flatreg.__all__))")
    return {
        "lines": sum(total.values()),
        **{f"  {kind}": count for kind, count in total.items()},
        "comments per 1,000 lines of code": round(1000 * total["comment"] / total["code"]),
        "files": len(files),
        "entries in flatreg/": len(entries),
        "records": records,
        "functions": functions,
        "getattr and hasattr": dynamic,
        "fmt: skip": sum(path.read_text(encoding="utf-8").count("fmt: skip") for path in files),
        "public names": names,
    }


def run(root: Path, code: str):
    """What `code` prints last, as JSON, in a fresh process that sees the package at `root`."""
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{root}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def journey(root: Path, before: str, body: str) -> str:
    """Files, functions and pairs of files crossed both ways."""
    with tempfile.TemporaryDirectory() as scratch:
        recipe = Path(scratch) / "small.yaml"
        recipe.write_text(RECIPE, encoding="utf-8")
        common = COMMON.format(root=str(root), recipe=str(recipe), folder=f"{scratch}/run")
        code = f"{common}\nBEFORE = {before!r}\nBODY = {body!r}\n{TRACE}"
        files, functions, both = run(root, code)
    return f"{files} / {functions} / {both}"


def main() -> None:
    """Print one column a checkout."""
    roots = [Path(path).resolve() for path in sys.argv[1:]] or [Path(__file__).parents[1]]
    columns = []
    for root in roots:
        column = {name: str(value) for name, value in size(root).items()}
        for name, (before, body) in JOURNEYS.items():
            column[name] = journey(root, before, body)
        columns.append(column)
    width = max(len(name) for name in columns[0])
    print(f"{'':<{width}}" + "".join(f"{root.name:>16}" for root in roots))
    for name in columns[0]:
        if name == next(iter(JOURNEYS)):
            print("journeys: files / functions / pairs of files crossed both ways")
        print(f"{name:<{width}}" + "".join(f"{column[name]:>16}" for column in columns))


if __name__ == "__main__":
    main()
