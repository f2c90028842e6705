import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import yaml

import flatreg
from flatreg import load_recipe
from flatreg.data.files import alone_in
from flatreg.report.rows import SCHEMA, read_report
from flatreg.report.tables import percent
from flatreg.report.text import table
from flatreg.run import build, commands
from flatreg.run import trial as trials
from flatreg.run.cli import main
from flatreg.run.recipe import dump_recipe
from flatreg.run.sweep import read_sweep
from flatreg.run.train import make_accelerator, train

RECIPE = """
data: {kind: digits, limit: 400, test_limit: 60}
model: {name: test_vit, args: {img_size: 32, embed_dim: 32, depth: 1}, mean: [0.5], std: [0.5]}
penalties:
  - {kind: MarginBound, strength: 1, eps: 0.05}
optimizer: {lr: 3.0e-3}
epochs: 2
batch_size: 128
evaluation: {eps: 0.05, samples: 40, attack: fast, curve: [0.1]}
baseline: true
variants:
  relative-flatness: {penalties: [{kind: RelativeFlatness, strength: 0.1}]}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run: (recipe file, run folder)."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "small.yaml").write_text(RECIPE)
    assert main(["run", str(folder / "small.yaml"), f"output={folder / 'run'}"]) == 0
    return folder / "small.yaml", folder / "run"


def test_a_run_that_goes_on_with_another_torch_says_so(finished, tmp_path, capsys):
    file, folder = finished
    shutil.copytree(folder, run := tmp_path / "run")
    known = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps(known | {"torch": "2.0"}))
    for _ in range(2):
        assert main(["run", str(file), f"output={run}"]) == 0
    told = f"began in another environment (torch 2.0, then {known['torch']}): it continues"
    assert capsys.readouterr().err.count(told) == 1
    after = json.loads((run / "environment.json").read_text())
    assert after == known | {"torch": f"2.0, then {known['torch']}"}


def test_a_run_leaves_everything_in_its_folder(finished):
    _, folder = finished
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    for name in (
        "recipe.yaml",
        "environment.json",
        "report.json",
        "report.md",
        "figures/attacked_accuracy.png",
        "figures/training.png",
        "figures/attack_path.png",
        "checkpoints/plain/epoch-0002/model.safetensors",
        "checkpoints/relative-flatness/epoch-0002/history.json",
        "checkpoints/flatreg/epoch-0002/optimizer.pt",
    ):
        assert name in names
    assert not any("partial" in name for name in names)
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["penalties"][0]["step"] == 0.5
    assert json.loads((folder / "environment.json").read_text())["processes"] == "1"
    raw = json.loads((folder / "report.json").read_text())
    assert raw["schema"] == SCHEMA and [row["name"] for row in raw["rows"]] == [
        "plain",
        "relative-flatness",
        "flatreg",
    ]
    text = (folder / "report.md").read_text()
    assert "figures/attack_path.png" in text and "relative-flatness" in text


def test_the_table_fits_and_sets_arms_beside_their_twin(finished):
    report = read_report(finished[1])
    text = table(report)
    assert max(map(len, text.split("\n"))) <= 100
    rows = {line.split()[0]: line for line in text.split("\n") if line.strip()}
    assert rows["plain"].endswith("1.00x")
    for row in report.rows:
        assert f"{100 * row.evaluation.attacked.value:.1f} [" in rows[row.name]
        assert row.time_ratio == pytest.approx(
            row.seconds_per_epoch / report.rows[0].seconds_per_epoch
        )
    assert report.rows[0].penalties == [] and report.rows[2].penalties[0]["kind"] == "MarginBound"


def test_running_again_reports_the_same_without_training(finished, capsys):
    recipe, folder = finished
    before = read_report(folder)
    with (folder / "recipe.yaml").open("a") as file:
        file.write("# a comment: the recipe is the same\n")
    assert main(["run", str(recipe), f"output={folder}"]) == 0
    after = read_report(folder)
    from_python = flatreg.run_recipe(flatreg.load_recipe(recipe), str(folder))
    assert from_python.rows[0].evaluation.verdicts == after.rows[0].evaluation.verdicts
    for one, two in zip(before.rows, after.rows, strict=True):
        assert one.evaluation.verdicts == two.evaluation.verdicts and one.history == two.history
    assert "upper bound" in capsys.readouterr().out


def test_the_path_of_a_recipe_is_no_recipe(tmp_path):
    with pytest.raises(TypeError, match=r"is loaded, got a str: write run_recipe.flatreg.load_rec"):
        flatreg.run_recipe("recipes/quickstart.yaml", tmp_path)


def test_another_recipe_may_not_go_on_in_the_folder(finished, capsys):
    recipe, folder = finished
    before = (folder / "report.json").read_bytes()
    assert main(["run", str(recipe), f"output={folder}", "epochs=3"]) == 2
    assert "holds the run of another recipe" in capsys.readouterr().err
    assert (folder / "report.json").read_bytes() == before


def test_evaluate_judges_again_under_another_threat(finished, tmp_path, capsys):
    _, folder = finished
    assert (
        main(
            [
                "evaluate",
                str(folder),
                "evaluation.eps=0.02",
                "evaluation.curve=[]",
                f"output={tmp_path}",
            ]
        )
        == 0
    )
    again = read_report(tmp_path)
    assert (
        again.rows[0].evaluation.eps == 0.02 and read_report(folder).rows[0].evaluation.eps == 0.05
    )
    assert main(["evaluate", str(folder), "epochs=9"]) == 2
    assert "evaluate takes settings of the evaluation" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "none")]) == 2


def test_check_prints_every_mistake_and_exits_2(finished, capsys):
    recipe = finished[0]
    wrong = recipe.with_name("wrong.yaml")
    wrong.write_text(
        RECIPE.replace("strength: 1,", "strength: -1,")
        .replace("lr: 3.0e-3", "lr: fast")
        .replace("kind: RelativeFlatness", "kind: Flatness")
    )
    assert main(["check", str(wrong)]) == 2
    printed = capsys.readouterr()
    lines = printed.err.strip().split("\n")
    assert printed.out == "" and [line.split(": ")[:2] for line in lines] == [
        [f"{wrong}:5", "penalties.0.strength"],
        [f"{wrong}:6", "optimizer.lr"],
        [f"{wrong}:12", "variants.relative-flatness.penalties.0"],
    ]
    assert main(["check", str(recipe)]) == 0
    assert "ok: test_vit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data={kind: array, path: none.npz}"], "found none at none.npz"),
        (["model.name=no_such_net"], "Unknown model"),
        (
            ["model.name=test_convnext3", "model.args={kernel_sizes: 3}", "data.size=16"],
            "model test_convnext3 does not take images of shape (1, 16, 16)",
        ),
        (["evaluation.eps=8"], "for 8 grey levels of 255 write 8/255"),
        (["evaluation.atack=fast"], "evaluation.atack: there is no such setting"),
        (["data.path=x"], "data.path: there is no such setting"),
        (["penalties.0.kind=Flat"], "penalties.0: expected kind 'RelativeFlatness', 'LayerFl"),
        (["penalties.0=MarginBound"], "penalties.0: expected a mapping with a kind"),
        (["model.mean=null", "model.std=null"], "has 3 channels, the images have 1: set mean and"),
        (["log_with=[mlfloww]"], "log_with: expected one of"),
        (
            ["penalties=[{kind: LayerFlatness, layers: [nowhere]}]"],
            "expected linear layers or convolutions of NormalizedModel, got ['nowhere']",
        ),
        (
            [
                "variants={twin: {penalties: [{kind: MarginBound, eps: 0.1}]}, again: {penalties: ["
                "{kind: MarginBound, eps: 0.1}]}}"
            ],
            "variants.twin: the same training as the arm again: a variant is the plain arm with",
        ),
    ],
)
def test_user_errors_are_one_line_without_a_traceback(finished, capsys, overrides, message):
    assert main(["check", str(finished[0]), *overrides]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error and "Traceback" not in error


def test_an_arm_is_built_once_and_trained_as_if_it_had_not_been_tried_out(tmp_path, monkeypatch):
    """Trying out an objective moves no buffer of a BatchNorm, no weight and no random stream."""
    (tmp_path / "small.yaml").write_text(
        "data: {kind: digits, limit: 100, test_limit: 20}\n"
        "model: {name: test_resnet, mean: [0.5], std: [0.5]}\n"
        "optimizer: {lr: 0.01, wrapper: {kind: RandomSAM, rho: 0.05}}\n"
        "augment: {crop: 1}\nema: 0.5\nepochs: 1\nbatch_size: 50\nbaseline: true\n"
        "penalties: [{kind: LayerFlatness, strength: 0.1}]\n"
        "evaluation: {eps: 0.05, attack: fast, samples: 10}\n"
    )
    recipe, built, real = load_recipe(tmp_path / "small.yaml"), [], build.build_model
    monkeypatch.setattr(build, "build_model", lambda *a, **k: built.append(a[0]) or real(*a, **k))
    commands.run_recipe(recipe, tmp_path / "run")
    assert len(built) == len(recipe.arms()) == 2
    splits = recipe.data.load()
    for name, arm in recipe.arms().items():
        alone = tmp_path / name
        train(build.build_training(recipe, name, arm, splits), alone, make_accelerator())
        for file in ("model.safetensors", "training.safetensors"):
            end = f"epoch-0001/{file}"
            found = (tmp_path / "run/checkpoints" / name / end).read_bytes()
            assert found == (alone / end).read_bytes()


def test_normalised_inputs_are_named(finished, tmp_path, capsys):
    import numpy as np

    x = np.random.default_rng(0).normal(size=(40, 32, 32)).astype(np.float32)
    y = np.arange(40) % 10
    np.savez(tmp_path / "n.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    data = f"data={{kind: array, path: {tmp_path / 'n.npz'}}}"
    assert main(["check", str(finished[0]), data]) == 2
    assert "images must be uint8 or float in [0, 1]" in capsys.readouterr().err


def test_a_run_that_cannot_start_leaves_its_folder_to_the_next(finished, tmp_path, capsys):
    recipe, _ = finished
    for mistake in ("batch_size=5000", "optimizer.name=adamwonder", "model.args={no_such: 1}"):
        assert main(["run", str(recipe), f"output={tmp_path / 'run'}", mistake]) == 2
        assert "\n" not in capsys.readouterr().err.strip()
        assert not (tmp_path / "run").exists()


def test_a_run_cut_short_is_not_judged(finished, tmp_path, capsys):
    shutil.copytree(finished[1], tmp_path / "run")
    arm = tmp_path / "run/checkpoints/flatreg"
    history = json.loads((arm / "epoch-0002/history.json").read_text())
    (arm / "epoch-0002/history.json").write_text(json.dumps(history[:1]))
    (arm / "epoch-0002/digests.json").unlink()
    assert main(["evaluate", str(tmp_path / "run")]) == 2
    assert "expected 2 epochs, found 1" in capsys.readouterr().err


def test_an_interrupt_says_how_to_go_on(finished, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "run_recipe", interrupted)
    assert main(["run", str(finished[0])]) == 130
    assert "continues from there" in capsys.readouterr().err


def test_an_interrupted_sweep_says_how_to_go_on(finished, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "sweep", interrupted)
    assert main(["sweep", str(finished[0]), "--over", "epochs=1,2"]) == 130
    assert "continues from there" in capsys.readouterr().err


def test_a_sweep_leaves_a_table_a_figure_and_a_file(finished, tmp_path, capsys):
    """Overrides stand on both sides of --over."""
    recipe = str(finished[0])
    changes = ["data.validation=0.1", "evaluation.attack=fast"], ["epochs=1", "penalties=[]"]
    output = f"output={tmp_path / 's'}"
    over = ["--over", "optimizer.lr=0.003,1.0e-9"]
    assert main(["sweep", recipe, *changes[0], *over, *changes[1], output]) == 0
    printed = capsys.readouterr().out
    result = read_sweep(tmp_path / "s")
    assert [t.value for t in result.trials] == [0.003, 1e-9]
    assert result.recipe["epochs"] == 1 and result.recipe["data"]["validation"] == 0.1
    for trial in result.trials:
        assert percent(trial.evaluation.attacked) in printed
    assert f"best      {result.best} by attacked accuracy" in printed
    assert (tmp_path / "s/sweep.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "s/environment.json").read_text())["processes"] == "1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["epochs=1", "--over", "optimizer.lr=1,2"], "data.validation > 0"),
        (["data.validation=0.1", "--over", "optimizer.lr"], "expected key=value,value"),
        (["data.validation=0.1", "--over", "optimizer.lr=1,x"], "optimizer.lr=x: optimizer.lr: "),
        (["data.validation=0.1", "--over", "batch_size=64,5000"], "expected at most the"),
        (["data.validation=0.1", "--over", "model.name=test_vit,dream"], "Unknown model"),
    ],
)
def test_a_sweep_that_cannot_finish_does_not_start(finished, tmp_path, capsys, arguments, message):
    assert main(["sweep", str(finished[0]), *arguments, f"output={tmp_path / 's'}"]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not (tmp_path / "s").exists()


def test_a_manifold_is_tried_out_fitted(finished, capsys):
    curved = "penalties=[{{kind: OffManifoldCurvature, strength: 1, eps: 0.05, manifold: {}}}]"
    local = "{kind: LocalPCAManifold, rank: 2}"
    check = ["check", str(finished[0]), "data={kind: digits}"]
    assert main([*check, curved.format(local)]) == 0
    assert main([*check, curved.format("{kind: PCAManifold, rank: 1024}")]) == 0
    capsys.readouterr()
    assert main([*check, curved.format("{kind: PCAManifold, rank: 1025}")]) == 2
    error = capsys.readouterr().err.strip()
    assert "rank must be at most 1024" in error and "\n" not in error


def test_unknown_options_are_refused(finished, capsys):
    for arguments in (["run", str(finished[0]), "--over", "a=1"], ["sweep", str(finished[0])]):
        with pytest.raises(SystemExit):
            main(arguments)
    assert "unrecognized arguments: --over" in capsys.readouterr().err


def test_two_runs_do_not_write_into_one_folder(finished, tmp_path, capsys):
    """The second says so and touches nothing; once the first is gone, killed or not, it may."""
    recipe, folder = finished
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != ".lock"}
    hold = (
        "import sys, time; from pathlib import Path; from flatreg.data.files import alone_in\n"
        "with alone_in(Path(sys.argv[1]), True): print('held', flush=True); time.sleep(600)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        assert main(["run", str(recipe), f"output={folder}"]) == 2
        assert "another run is writing there" in capsys.readouterr().err
        assert main(["evaluate", str(folder), f"output={folder}"]) == 2
        assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != ".lock"} == before
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    with alone_in(folder, True):
        assert (folder / ".lock").exists()


def test_a_run_that_began_meanwhile_is_not_gone_on_with(finished, tmp_path, monkeypatch, capsys):
    """It wrote its recipe between the first look into the folder and the lock."""
    folder, real = tmp_path / "run", trials.build_training

    def meanwhile(*arguments):
        folder.mkdir(exist_ok=True)
        recipe = load_recipe(finished[0], ["seed=99"])
        (folder / "recipe.yaml").write_text(dump_recipe(recipe))
        return real(*arguments)

    monkeypatch.setattr(trials, "build_training", meanwhile)
    assert main(["run", str(finished[0]), f"output={folder}"]) == 2
    assert "holds the run of another recipe" in capsys.readouterr().err
    assert not (folder / "checkpoints").exists()


def test_a_run_in_a_posix_locale_ends_as_in_any_other(finished, tmp_path):
    """Reports hold "±": files are UTF-8 in every locale, and a terminal prints what it can."""
    recipe, folder = finished
    copy = tmp_path / "rün"
    shutil.copytree(folder, copy)
    (copy / "report.json").unlink()
    environment = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    environment |= {"PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "flatreg", "run", str(recipe), f"output={copy}"]
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    assert b"plain" in done.stdout and done.stdout.isascii()
    assert "±" in (copy / "report.md").read_text(encoding="utf-8")


def leaf(*lines):
    """A recipe of small parts that `check` takes."""
    return "\n".join(
        (
            "data: {kind: digits, limit: 100, test_limit: 20}",
            "model: {name: test_resnet, mean: [0.5], std: [0.5]}",
            "optimizer: {lr: 0.01}",
            "epochs: 1",
            "batch_size: 50",
            "evaluation: {eps: 0.05, attack: fast}",
            *lines,
        )
    )


@pytest.mark.parametrize("command", ["check", "run"])
def test_every_arm_is_tried_and_every_mistake_told(tmp_path, capsys, monkeypatch, command):
    """Also by `run`, before it trains anything; nothing is left behind."""
    file = tmp_path / "wrong.yaml"
    file.write_text(
        leaf(
            "augment: {crop: 1000000000}",
            "baseline: true",
            "variants:",
            "  other: {model: {name: test_convnext3, args: {kernel_sizes: 3}}}",
            "  none: {model: {name: no_such_net}}",
        ).replace("lr: 0.01", "lr: 0.01, args: {betas: [0.9]}")
    )
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main([command, str(file)]) == 2
    lines = capsys.readouterr().err.strip().split("\r")[-1].split("\n")
    name = str(file) if command == "check" else "recipe"
    assert lines == [
        f"{name}: augment.crop: expected at most the 32 pixels, got 1000000000",
        f"{name}: optimizer adamw: IndexError: list index out of range",
        f"{name}: arm other: model test_convnext3: its normalisation has 3 channels, the images "
        "have 1: set mean and std to lists of 1",
        f"{name}: arm none: model no_such_net: Unknown model (no_such_net)",
    ]
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize(
    ("extra", "output", "message"),
    [
        ([], "wrong.yaml/run", "output: expected a folder, "),
        ([], "/proc/flatreg", "output: the checkpoints take "),
        (["log_with=[tensorbord]"], "run", "'tensorbord'; did you mean tensorboard?"),
        (["augment.crop=33"], "run", "augment.crop: expected at most the 32 pixels, got 33"),
        (["batch_size=101"], "run", "batch_size: expected at most the 100 training images"),
        (["optimizer.name=sgdd"], "run", "optimizer sgdd: "),
        (["optimizer.name=adahessian"], "run", "optimizer adahessian: it needs second derivat"),
        (["optimizer={name: sgd, lr: 1, args: {momentum: x}}"], "run", "optimizer sgd: "),
        (["data.size=20000"], "run", "more than half of this machine's"),
    ],
)
def test_check_tries_what_a_run_needs(tmp_path, capsys, monkeypatch, extra, output, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.yaml").write_text(leaf())
    assert main(["check", "wrong.yaml", *extra, f"output={output}"]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error and error.startswith("wrong.yaml: ")
    assert [path.name for path in tmp_path.iterdir()] == ["wrong.yaml"]


def test_the_test_split_goes_through_every_arm(tmp_path, capsys, monkeypatch):
    """Its images may have another size than those the model was built for."""
    rng = np.random.default_rng(0)
    y = np.arange(40) % 4
    x, smaller = (rng.integers(0, 256, (40, size, size), np.uint8) for size in (32, 24))
    np.savez(tmp_path / "sizes.npz", x_train=x, y_train=y, x_test=smaller, y_test=y)
    (tmp_path / "sizes.yaml").write_text(leaf().replace("batch_size: 50", "batch_size: 20"))
    monkeypatch.chdir(tmp_path)
    given = ["data={kind: array, path: sizes.npz}", "model.name=test_vit"]
    assert main(["check", "sizes.yaml", *given, "model.args={img_size: 32}"]) == 2
    error = capsys.readouterr().err.strip()
    assert "24" in error and "32" in error and "\n" not in error


def test_a_tracker_is_tried_and_leaves_no_run(tmp_path, capsys, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(leaf("log_with: [tensorboard]"))
    assert main(["check", "small.yaml"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["small.yaml"]
    monkeypatch.setattr(
        "accelerate.tracking.TensorBoardTracker.start",
        lambda self: (_ for _ in ()).throw(OSError("no room")),
    )
    assert main(["check", "small.yaml"]) == 2
    assert "small.yaml: log_with tensorboard: no room" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.args={eps: 0}", "a step with a gradient of 0 leaves a weight that is not fin"),
        (
            "penalties=[{kind: JacobianNorm, strength: 1e38, eps: 1.0}]",
            " is not finite on the first images",
        ),
    ],
)
def test_check_finds_what_is_not_finite_before_the_training(finished, capsys, override, message):
    assert main(["check", str(finished[0]), override]) == 2
    assert message in capsys.readouterr().err


def test_one_image_a_step_is_too_few_for_batch_norm(tmp_path, capsys):
    (tmp_path / "small.yaml").write_text(leaf())
    assert main(["check", str(tmp_path / "small.yaml"), "accumulation=50"]) == 2
    error = capsys.readouterr().err.strip()
    assert "BatchNorm needs more than one image" in error and "\n" not in error
