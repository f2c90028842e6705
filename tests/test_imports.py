"""What is imported when: names on first use, torch by no message of the command line."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import flatreg

HEAVY = {
    "accelerate",
    "matplotlib",
    "pydantic",
    "scipy",
    "sklearn",
    "timm",
    "torch",
    "torchvision",
}
CALLS = """
import contextlib, io, json, sys
import flatreg
dir(flatreg), flatreg.run
heavy, calls = set(sys.argv[1].split()), json.loads(sys.argv[2])
loaded = lambda: sorted(heavy & {name.partition(".")[0] for name in sys.modules})
found = [["", loaded()]]
from flatreg.run.cli import main
for arguments in calls:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        with contextlib.suppress(SystemExit):
            main(arguments)
    found.append([text.getvalue(), loaded()])
print(json.dumps(found))
"""
ANSWERS = [
    (["--help"], "usage: flatreg"),
    (["run", "--help"], "optimizer.lr                   number            learning rate"),
    (["evaluate", "--help"], "radius of the ball, in [0,1] pixel units"),
    (["measure", "--help"], "num_probes=32                  integer"),
    (["table", "--help"], "exit codes: 0 done; 2 a mistake"),
    (["--version"], f"flatreg {version('flatreg')}"),
    (["list"], "RelativeFlatness"),
    (["list", "model"], "topic: expected one of criteria"),
    (["train", "a.yaml"], "invalid choice"),
    (["check", "none.yaml"], "none.yaml: No such file"),
    (["run", "torn.yaml"], "torn.yaml:1: not YAML"),
    (["run", "list.yaml"], "expected a mapping, got list"),
    (["check", "good.yaml", "epochs"], "expected key=value, got 'epochs'"),
    (["check", "good.yaml", "epochs=]"], "'epochs=]': the value is not YAML"),
    (["check", "good.yaml", "epochs.a=1"], "epochs.a: no such place"),
    (["sweep", "good.yaml", "--over", "epochs"], "expected key=value,value"),
    (
        ["evaluate", "none"],
        "none: expected a run or an arm, RUN, RUN/ARM or RUN/checkpoints/ARM: found none",
    ),
    (
        ["evaluate", "."],
        ".: expected a run or an arm, RUN, RUN/ARM or RUN/checkpoints/ARM: found no re",
    ),
    (
        ["measure", "resnet19"],
        "a timm model needs --data DATA and eps=8/255; DATA is digits, FILE.npz, FOLD",
    ),
    (["measure", "net", "samples"], "expected key=value, got 'samples'"),
    (["table", "none"], "none: no such run or report.json"),
    (["table", "."], ".: no such run or report.json"),
    (["table", "good.yaml"], "good.yaml: expected the folder of a run or a report.json"),
    (["run"], "required: recipe; write flatreg run recipes/quickstart.yaml, or flatreg run -h\n"),
    ([], "required: command; write flatreg run recipes/quickstart.yaml, or flatreg -h\n"),
    (["runs"], "there is no command 'runs'; did you mean run?; write flatreg run recipes/"),
    (["run", "good"], "good: No such file: expected a recipe, such as recipes/quickstart.yaml; di"),
    (["table"], "required: RUN; write flatreg table runs/quickstart"),
    (["list", "data", "--json"], '{"data": {"digits": '),
    (
        ["list", "attacks", "more"],
        "flatreg list: unrecognized arguments: more; write flatreg",
    ),
    (
        ["evaluate", "net", "--eps=1", "--data", "digits"],
        "--eps=1 (settings are written eps=VAL",
    ),
    (["run", "good.yaml", "output="], "output=: expected a folder or a file, got nothing"),
    (["list", "model", "--json"], '{"error": "topic: expected one of criteria'),
    (["train", "a.yaml", "--json"], '{"error": "flatreg: invalid choice: there is no command '),
    (["--json", "run"], '{"error": "flatreg run: the following arguments are required: recipe; wr'),
    (
        ["run", "a", "--jsn", "--json"],
        '{"error": "flatreg run: unrecognized arguments: --jsn (settings are written jsn=VAL',
    ),
    (["check", "none.yaml", "--json"], '{"error": "none.yaml: No such file'),
]


def fresh(code, *arguments, cwd=None):
    """What a fresh process prints, read as JSON."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=True)
    return json.loads(done.stdout)


def test_the_command_line_answers_without_torch(tmp_path):
    """`import flatreg`, help, the list and every mistake that the arguments show by themselves."""
    (tmp_path / "torn.yaml").write_text("a: [")
    (tmp_path / "list.yaml").write_text("- 1")
    (tmp_path / "good.yaml").write_text("epochs: 1")
    calls = json.dumps([arguments for arguments, _ in ANSWERS])
    found = fresh(CALLS, " ".join(HEAVY), calls, cwd=tmp_path)
    for (arguments, expected), (text, heavy) in zip([([], ""), *ANSWERS], found, strict=True):
        assert expected in text and "Traceback" not in text, arguments
        assert heavy == [], arguments


def test_a_training_step_needs_torch_alone():
    code = """
import json, sys
from flatreg import SAM, CrossEntropy, Objective, RelativeFlatness, backward
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""
    names = set(fresh(code))
    assert "torch" in names and not names & {"accelerate", "matplotlib", "sklearn", "timm"}


def test_every_public_name_is_there_and_documented():
    rooms = {p.name for p in Path(flatreg.__file__).parent.iterdir() if p.is_dir()} | {"threat"}
    public = set(flatreg.__all__) - rooms
    assert 55 <= len(public) <= 75
    for name in public:
        assert getattr(flatreg, name).__doc__, name
    for room in ("attacks", "data", "evaluation", "measures", "optimizers", "terms"):
        module = getattr(flatreg, room)
        assert module.__all__ and all(hasattr(module, name) for name in module.__all__), room
    with pytest.raises(AttributeError, match="no_such_name"):
        flatreg.no_such_name  # noqa: B018
    with pytest.raises(AttributeError, match=r"^module 'flatreg' .*; did you mean Objective[?]$"):
        flatreg.Objectve  # noqa: B018
    assert flatreg.__version__ == version("flatreg")


def test_the_sources_come_from_their_room():
    from flatreg.data import Digits, Torchvision
    from flatreg.data.sources import Digits as own

    assert Digits is own and Torchvision.__module__ == "flatreg.data.torchvision"
