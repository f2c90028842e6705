"""The plan of the house: imports point one way, and rooms, files and functions keep their size."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "flatreg"
FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if p.name != "__main__.py"]
FILES.remove(PACKAGE / "__init__.py")
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}

# Each place may import from those before it and from its own kind. A package counts as one place,
# but for what stands lower than the rest of it.
LAYERS = [
    {
        "threat",
        "data.configuration",
        "data.text",
        "data.progress",
        "models.entrance",
        "models.compiled",
        "models.precision",
        "models.state",
        "models.pass_start",
        "models.double_backward",
        "models.derivative_check",
        "models.normalize",
        "models.hub",
    },
    {
        "models.heads",
        "models.forward",
        "terms.protocol",
        "data.files",
        "data.sharing",
        "data.loading",
    },
    {"measures", "optimizers"},
    {"attacks"},
    {"terms"},
    {"evaluation"},
    {"data"},
    {
        "models",
        "run.places",
        "run.settings",
        "run.interrupt",
        "run.catalogue",
        "run.recipe",
        "run.recipe_sections",
        "run.checkpoints",
        "run.fine_tuning",
        "run.trackers",
    },
    {"run.build", "run.epoch", "run.processes", "run.train"},
    {"run.brought", "run.sweep", "run.target", "run.trial"},
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


def dotted(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def level(module):
    """Of the longest part of a dotted name below `flatreg` that has one."""
    parts = module.split(".")
    names = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next(LEVEL[name] for name in names if name in LEVEL)


def imports(path):
    """Modules that the file imports at any time: not those under `if TYPE_CHECKING`."""
    typing_only = {
        id(inner)
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(TREES[path]):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


def test_imports_point_downwards():
    wrong = []
    for path in FILES:
        for module in imports(path):
            first = module.split(".")[0]
            room = path.relative_to(PACKAGE).parts[0]
            if first == "flatreg" and module != "flatreg":
                fits = level(module.removeprefix("flatreg.")) <= level(dotted(path))
            else:
                fits = first not in ONLY_IN or room in ONLY_IN[first]
            if not fits:
                wrong.append(f"{dotted(path)} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_there_is_no_cycle():
    graph = {
        f"flatreg.{dotted(path)}": {m for m in imports(path) if m.startswith("flatreg.")}
        for path in FILES
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


def test_rooms_files_and_functions_keep_their_size():
    aside = {"__init__.py", "__init__.pyi", "__main__.py", "py.typed", "__pycache__"}
    rooms = {entry.name for entry in PACKAGE.iterdir()} - aside
    assert len(rooms) <= 10, sorted(rooms)
    assert len(FILES) <= 150, len(FILES)
    large = []
    for path in FILES:
        source = path.read_text(encoding="utf-8")
        assert "fmt: skip" not in source, path.name
        if source.count("\n") > 420:  # a file ends where its subject ends, at about 400
            large.append(f"{dotted(path)} has {source.count(chr(10))} lines")
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.body[0].end_lineno  # without the docstring
                if length > 60:
                    large.append(f"{dotted(path)}: {node.name} has {length} lines")
    assert not large, "\n".join(large)


def test_nothing_unpickles():
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load"):
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert (
                    keywords.get("weights_only") == "True"
                    or keywords.get("allow_pickle") == "False"
                ), path
            assert not (isinstance(node, ast.Import) and node.names[0].name == "pickle"), path


def test_text_files_are_utf_8_in_every_locale():
    """Bytes, or an encoding by name; `Image.open` and `os.open` are no text."""
    places = [PACKAGE.parent / place for place in ("benchmarks", "recipes/paper")]
    scripts = [path for place in places for path in sorted(place.rglob("*.py"))]
    wrong = []
    for path in [*FILES, *scripts]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            last = called.rpartition(".")[2]
            given = {keyword.arg for keyword in node.keywords}
            modes = [a.value for a in node.args if isinstance(a, ast.Constant)]
            binary = any(isinstance(mode, str) and "b" in mode for mode in modes)
            text = last in ("read_text", "write_text") or called in ("open", "path.open")
            if text and "encoding" not in given and not binary:
                wrong.append(f"{path.relative_to(PACKAGE.parent)}:{node.lineno}: {called}")
    assert not wrong, "\n".join(wrong)
