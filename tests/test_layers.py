"""Imports point one way: from what is measured to what is reported."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "flatreg"

# Each place may import from those before it and from its own kind. A package counts as one place,
# but for what stands lower than the rest of it.
LAYERS = [
    {"threat", "models.precision", "models.state", "models.double_backward", "models.normalize"},
    {"models.heads", "models.forward", "data.files", "data.loading"},
    {"measures", "optimizers"},
    {"attacks", "terms.protocol"},
    {"terms"},
    {"evaluation"},
    {"data"},
    {"claims"},
    {"models", "run.settings", "run.recipe", "run.wrappers", "run.checkpoints"},
    {"run.build", "run.train"},
    {"run.sweep", "run.target", "run.catalogue"},
    {"report"},
    {"run"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
ONLY_IN = {
    "accelerate": {"run"},
    "matplotlib": {"report"},
    "timm": {"run", "data", "models", "optimizers"},
    "sklearn": {"data", "evaluation", "measures"},
    "yaml": {"run"},
}


def level(module):
    """Of the longest part of a dotted name below `flatreg` that has one."""
    parts = module.split(".")
    names = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next(LEVEL[name] for name in names if name in LEVEL)


def dotted(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """Modules imported when the file runs: not those under `if TYPE_CHECKING`."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


FILES = sorted(p for p in PACKAGE.rglob("*.py") if room(p) not in ("__init__", "__main__"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_point_downwards(path):
    for module in imports(path):
        parts = module.split(".")
        if parts[0] == "flatreg":
            assert level(module.removeprefix("flatreg.")) <= level(dotted(path)), (
                f"{path.name} imports {module}"
            )
        elif parts[0] in ONLY_IN:
            assert room(path) in ONLY_IN[parts[0]], f"{path.name} imports {module}"


def test_there_is_no_cycle():
    graph = {}
    for path in FILES:
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        graph[name.removesuffix(".__init__")] = {
            m for m in imports(path) if m.startswith("flatreg.")
        }
    done, open_ = set(), []

    def visit(name):
        assert name not in open_, f"cycle: {' -> '.join([*open_[open_.index(name) :], name])}"
        if name in done:
            return
        open_.append(name)
        for other in graph.get(name, ()):
            visit(other)
        open_.pop()
        done.add(name)

    for name in graph:
        visit(name)


def test_files_and_functions_keep_their_size():
    for path in FILES:
        source = path.read_text()
        assert source.count("\n") <= 400, f"{path.name} is too long"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.body[0].end_lineno  # without the docstring
                assert length <= 60, f"{path.name}: {node.name} has {length} lines"


def test_nothing_unpickles():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load"):
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert (
                    keywords.get("weights_only") == "True"
                    or keywords.get("allow_pickle") == "False"
                )
            assert not (isinstance(node, ast.Import) and node.names[0].name == "pickle")
