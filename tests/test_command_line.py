"""`flatreg evaluate` of any model; what is printed where; help; the first errors of a newcomer."""

import json
import os
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import flatreg
from flatreg.models.weight_files import read_weights
from flatreg.report.rows import read_report
from flatreg.report.summary import of_report
from flatreg.run import help as helps
from flatreg.run.brought import cut_of, short_form
from flatreg.run.cli import COMMANDS, main
from flatreg.run.recipe_sections import EvaluationSettings, Model
from flatreg.run.target import load_target

RECIPE = """
data: {kind: digits, limit: 300, test_limit: 60}
model: {name: test_resnet, mean: [0.5], std: [0.5]}
optimizer: {lr: 3.0e-3}
epochs: 2
batch_size: 100
evaluation: {eps: 0.05, samples: 30, attack: fast}
variants:
  other: {penalties: [{kind: RelativeFlatness, strength: 0.1}]}
"""
DIGITS = ["--data", "digits", "data.limit=300", "data.test_limit=60"]
FAST = ["eps=0.05", "samples=30", "attack=fast"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, what its process printed into pipes, and its model."""
    folder = tmp_path_factory.mktemp("line")
    (folder / "small.yaml").write_text(RECIPE)
    command = [sys.executable, "-m", "flatreg", "run", "small.yaml", "output=run"]
    root = str(Path(__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return folder / "run", done, flatreg.load_model(folder / "run/checkpoints/flatreg")


def test_a_run_in_a_pipe_says_little_and_what_comes_next(run):
    folder, done, _ = run
    lines = done.stderr.splitlines()
    assert len(lines) <= 6 and "\r" not in done.stderr
    assert lines[0].startswith("plan      train 2 arms (other, flatreg), 2 epochs of 3 batches ")
    assert lines[-2].startswith("report    run/report.html, run/report.md")
    (following,) = re.findall(r"^next      (.*)$", done.stderr, re.M)
    for command in following.split("; "):
        verb, place = command.split()[1:3]
        arm = folder / "checkpoints" / Path(place).name  # RUN/ARM
        assert verb in COMMANDS and ((folder.parent / place).is_dir() or arm.is_dir())
    assert done.stdout.startswith("digits, test_resnet, 2 epochs, seed 0; linf eps 0.05, n = 30")


class Carries(nn.Module):
    """A network with its normalisation inside, as RobustBench's have it."""

    def __init__(self, model, names):
        super().__init__()
        for name, value in zip(names, (0.5, 0.5), strict=True):
            self.register_buffer(name, torch.full((1, 1, 1, 1), value))
        self.model = model


def forms(whole):
    """Files as others write them, by name, and the settings that they need besides."""
    bare = whole.get_submodule("model").state_dict()
    half = {"mean": torch.tensor([0.5]), "std": torch.tensor([0.5])}
    given = ["mean=[0.5]", "std=[0.5]"]
    sequential = {f"0.{k}": v for k, v in half.items()} | {f"1.{k}": v for k, v in bare.items()}
    madry = {f"module.model.{k}": v for k, v in bare.items()}
    madry |= {"module.normalizer.new_mean": half["mean"], "module.normalizer.new_std": half["std"]}
    madry |= {f"module.attacker.model.{k}": v + 1 for k, v in bare.items()}
    compiled = {f"module._orig_mod.{k}": v for k, v in bare.items()}
    return {
        "bare.pth": (bare, given),
        "whole.pt": (whole.state_dict(), []),
        "state_dict.pth": ({"state_dict": bare, "epoch": 3}, given),
        "model_state.pth": ({"model_state": bare, "args": {"lr": 0.1}}, given),
        "net.ckpt": ({"net": {f"module.{k}": v for k, v in bare.items()}, "acc": 93.1}, given),
        "lightning.ckpt": ({"state_dict": {f"model.{k}": v for k, v in bare.items()}}, given),
        "compiled.pth": ({"model": compiled, "ema": None}, given),
        "ema.pth.tar": ({"ema": bare}, given),
        "timm.pth.tar": ({"state_dict": bare, "args": Namespace(lr=0.1), "arch": "x"}, given),
        "numpy.pth": ({"net": bare, "acc": np.float64(9.5), "best": np.float32(1)}, given),
        "chosen.pth": (
            {"state_dict": {k: v * 0 for k, v in bare.items()}, "state_dict_ema": bare},
            [*given, "weights_key=state_dict_ema"],
        ),
        "mu.pth": (Carries(whole.get_submodule("model"), ("mu", "sigma")).state_dict(), []),
        "buffers.pth": (Carries(whole.get_submodule("model"), ("mean", "std")).state_dict(), []),
        "sequential.pth": (sequential, []),
        "beside.pth": ({"state_dict": bare, "mean": [0.5], "std": half["std"]}, []),
        "madry.pt": ({"model": madry}, []),
        "counts_no_batches.pth": (
            {k: v for k, v in bare.items() if not k.endswith("num_batches_tracked")},
            given,
        ),
        "half.pth": ({k: v.half() if v.is_floating_point() else v for k, v in bare.items()}, given),
    }


FORMS = list(forms(flatreg.with_normalization(timm.create_model("test_resnet"))))


@pytest.mark.parametrize("form", FORMS)
def test_weights_of_others_are_read_under_their_names(run, tmp_path, form):
    content, settings = forms(run[2])[form]
    torch.save(content, tmp_path / form)
    settings = [*settings, f"weights={tmp_path / form}", *FAST, *DIGITS[2:]]
    target = load_target("test_resnet", "digits", settings, EvaluationSettings)
    images = torch.rand(4, 1, 32, 32)
    slack = 0.02 if form == "half.pth" else 1e-5
    torch.testing.assert_close(target.model.eval()(images), run[2](images), rtol=slack, atol=slack)
    assert target.settings.eps == 0.05 and target.notes == []


def test_two_tensors_of_one_name_are_refused(tmp_path):
    state = {"fc.weight": torch.zeros(2, 2), "module.fc.weight": torch.ones(2, 2)}
    torch.save(state, tmp_path / "both.pth")
    with pytest.raises(ValueError, match=r"two tensors for fc\.weight") as error:
        read_weights(str(tmp_path / "both.pth"))
    assert "\n" not in str(error.value)


def test_a_file_without_its_normalisation_takes_what_the_settings_say(run, tmp_path):
    """A normalisation that the file contradicts is refused, not mended in silence."""
    torch.save(forms(run[2])["mu.pth"][0], tmp_path / "mu.pth")
    settings = [f"weights={tmp_path / 'mu.pth'}", "mean=[0.4]", "std=[0.5]", *FAST]
    with pytest.raises(ValueError, match=r"its mean is \[0.5\], that of the model \[0.4.*: set me"):
        load_target("test_resnet", "digits", settings, EvaluationSettings)


class Pickled:
    """An object whose class a file would have to import."""


def test_what_is_no_file_of_weights_is_refused_in_one_line(run, tmp_path, capsys):
    bare = run[2].get_submodule("model").state_dict()
    torch.save(run[2], tmp_path / "module.pth")
    torch.save({"model": bare, "made_by": Pickled()}, tmp_path / "object.pth")
    torch.save({"state_dict": bare, "model": bare}, tmp_path / "two.pth")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save(bare["fc.weight"], tmp_path / "tensor.pth")
    renamed = {k.replace("fc.", "classifier.fc."): v for k, v in bare.items()}
    torch.save(renamed, tmp_path / "renamed.pth")
    torch.save({k: v for k, v in bare.items() if k != "fc.weight"}, tmp_path / "less.pth")
    seven = {k: v[:7] if k.startswith("fc.") else v for k, v in bare.items()}
    torch.save(seven, tmp_path / "seven.pth")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "empty.pt").write_bytes(b"")
    whole = (tmp_path / "two.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    save_file({k: v.contiguous() for k, v in bare.items()}, tmp_path / "really.safetensors")
    os.rename(tmp_path / "really.safetensors", tmp_path / "renamed_safetensors.pth")
    (tmp_path / "folder.pth").mkdir()
    messages = {
        "module.pth": "holds more than tensors (flatreg.models.normalize.NormalizedModel)",
        "object.pth": "holds more than tensors (test_command_line.Pickled), and nothing is unp",
        "two.pth": "holds state_dict and model: choose one by weights_key=model",
        "none.pth": "found epoch",
        "list.pth": "expected a state dict in",
        "tensor.pth": "got a Tensor",
        "renamed.pth": "fc.weight is not in the file; the nearest name is classifier.fc.weight",
        "less.pth": "fc.weight is not in the file",
        "seven.pth": "seven.pth has no head for 10 classes",
        "text.pth": "is no file of weights",
        "empty.pt": "is no file of weights",
        "cut.pth": "is no file of weights",
        "renamed_safetensors.pth": "is no file of weights",
        "folder.pth": "is a folder",
        "missing.pth": "found none at",
    }
    norm = ["mean=[0.5]", "std=[0.5]", "output=/nonexistent"]
    for name, message in messages.items():
        given = [f"weights={tmp_path / name}", *norm, *FAST]
        assert main(["evaluate", "test_resnet", *DIGITS, *given]) == 2, name
        printed = capsys.readouterr()
        assert message in printed.err and printed.out == "", (name, printed.err)
        assert printed.err.count("\n") == 1 and len(printed.err) < 400, printed.err


def test_a_key_that_is_no_state_dict_is_refused(run, tmp_path):
    torch.save({"model": {"a": torch.ones(2)}, "epoch": 1}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"weights_key: .*a.pth holds model, got 'epoch'"):
        read_weights(str(tmp_path / "a.pth"), "epoch")


def test_a_model_of_others_is_judged_as_the_run_judged_it(run, tmp_path, capsys):
    """The same weights, images and attack: the same verdicts, in a report that a table reads."""
    folder, _, model = run
    torch.save(model.state_dict(), tmp_path / "whole.pth")
    given = [f"weights={tmp_path / 'whole.pth'}", *FAST, f"output={tmp_path / 'out'}"]
    assert main(["evaluate", "test_resnet", *DIGITS, *given]) == 0
    printed = capsys.readouterr()
    found, own = read_report(tmp_path / "out").rows[0], read_report(folder).rows[1]
    assert found.evaluation.verdicts == own.evaluation.verdicts
    assert found.kappa() == own.kappa() and found.history == []
    assert found.seconds_per_epoch is found.time_ratio is found.cost is None
    assert printed.out.startswith("digits, test_resnet, trained elsewhere, ")
    names = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"report.json", "report.md", "report.html", "attacked_accuracy.png"} <= names
    assert "training.png" not in names
    assert main(["table", str(tmp_path / "out")]) == 0
    assert "trained elsewhere" in capsys.readouterr().out
    page = (tmp_path / "out/report.html").read_text()
    assert "trained elsewhere" in page and "0 epochs" not in page and "run recipe.yaml" not in page


def test_one_arm_is_judged_alone(run, tmp_path, capsys):
    folder, _, _ = run
    for place in (folder / "checkpoints/other", folder / "other"):
        assert (
            main(["evaluate", str(place), "eps=0.02", f"output={tmp_path / place.parent.name}"])
            == 0
        )
        (row,) = read_report(tmp_path / place.parent.name).rows
        assert row.name == "other" and row.evaluation.eps == 0.02 and len(row.history) == 2
    capsys.readouterr()
    assert main(["evaluate", str(folder), "seed=3", "samples=9", "--json", "--quiet"]) == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert printed.err == "" and printed.out.count("\n") == 1
    assert document["folder"] == str(folder / "evaluation")
    assert [arm["arm"] for arm in document["arms"]] == ["other", "flatreg"]
    assert {arm["attacked"]["n"] for arm in document["arms"]} == {9}
    assert read_report(folder / "evaluation").rows[0].evaluation.seed == 3


def images_in(folder, count, size=24):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (size, size, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


@pytest.mark.parametrize("inside", ["", "test", "val"])
def test_a_folder_without_training_images_is_enough(tmp_path, capsys, inside):
    images_in(tmp_path / "set" / inside, 3)
    model = timm.create_model("test_resnet", num_classes=2)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    command = ["evaluate", "test_resnet", "--data", str(tmp_path / "set"), "size=32", "eps=1/255"]
    command += [f"weights={tmp_path / 'w.pth'}", "attack=fast", f"output={tmp_path / 'out'}"]
    assert main([*command, "data.workers=1"]) == 0
    report = read_report(tmp_path / "out")
    assert report.rows[0].evaluation.n == 6 and report.rows[0].input_curvature is None
    assert report.recipe["data"]["workers"] == 1 and report.recipe["data"]["crop_pct"] == 0.95
    assert sorted(report.rows[0].evaluation.labels) == [0, 0, 0, 1, 1, 1]
    assert report.rows[0].evaluation.waiting_seconds > 0
    measured = [*command[1:5], "eps=1/255", command[6], command[8], "parts=[kappa]", "num_probes=2"]
    assert main(["measure", *measured, "data.workers=0", "rank=0"]) == 0
    capsys.readouterr()
    assert main(["measure", *measured, "data.workers=0"]) == 2
    assert "no training images to fit a manifold to: write rank=0" in capsys.readouterr().err
    assert main([*command, "split=train"]) == 2
    assert "found no" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["evaluate", "measure"])
def test_data_of_other_classes_are_refused(run, tmp_path, capsys, verb):
    images_in(tmp_path / "set", 2)
    arm = str(run[0] / "checkpoints/other")
    sizes = ["data.size=32", "data.channels=1", "data.workers=0", "eps=0.1"]
    assert main([verb, arm, "--data", str(tmp_path / "set"), *sizes]) == 2
    error = capsys.readouterr().err
    assert "data: expected the 10 classes of the model, got 2 (cat, dog)" in error


def test_short_forms_are_settings_of_a_recipe(tmp_path):
    assert short_form("digits", {}) == {"kind": "digits"}
    assert short_form("a/b.npz", {}) == {"kind": "array", "path": "a/b.npz"}
    cifar = {"kind": "torchvision", "name": "CIFAR10", "root": "~/x:y"}
    assert short_form("cifar10:~/x:y", cut_of(Model(name="resnet18"))) == cifar
    folder = short_form(str(tmp_path), cut_of(Model(name="resnet18.a1_in1k")))
    assert (folder["size"], folder["crop_pct"], folder["interpolation"]) == (224, 0.95, "bicubic")
    pets = short_form("oxfordiiitpet:data", cut_of(Model(name="convnext_atto")))
    assert pets["size"] == 224 and pets["workers"] >= 1
    assert short_form("hfds/a/b", cut_of(Model(name="convnext_atto")))["kind"] == "timm"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["resnet19", "--data", "digits", "eps=0.1"],
            "Unknown model resnet19: .*; did you mean re",
        ),
        (
            ["test_resnet", *DIGITS, "eps=0.1", *["mean=[0.5]", "std=[0.5]"]],
            "the weights are random",
        ),
        (
            ["test_resnet", "--data", "nowhere", "eps=0.1"],
            "--data: expected digits, FILE.npz, FOLDE",
        ),
        (["test_resnet", "--data", "cifar11:x", "eps=0.1"], "did you mean CIFAR10?"),
        (["test_resnet", "--data", "digits"], "needs eps=, the radius"),
        (["test_resnet", "--data", "cifar10", "eps=0.1"], "; did you mean cifar10:ROOT?"),
        (["test_resnet", "--data", "", "eps=0.1"], "--data: expected digits, .*got ''"),
        (["RUN/recipe.yaml", *DIGITS, "eps=0.1"], "got a file: write the name of its timm model"),
        (["test_resnet", *DIGITS, "eps=-1"], "eps: Input should be greater than 0, got -1"),
        (["test_resnet", *DIGITS, "eps=0.1", "curve=0.1"], "valid list, got 0.1: write [0.1]"),
        (["test_resnet", *DIGITS, "eps=0.1", "curve=null"], "valid list, got None: write []"),
        (["test_resnet", *DIGITS, "eps=0.1", "samples=few"], "unable to parse .*, got 'few'"),
        (["test_resnet", *DIGITS, "eps=0.1", "atack=fast"], "no setting atack: .* mean attack?"),
        (["test_resnet", *DIGITS, "eps=0.1", "attack=fst"], "expected one of fast, .* mean fast?"),
        (["test_resnet", *DIGITS, "eps=0.1", "rank=3"], "no setting rank: expected one of eps, "),
        (["test_resnet", *DIGITS, "eps=0.1", "data.sice=3"], "data.sice: .*did you mean size?"),
        (["test_resnet", "--data", "digits", "eps=8"], "for 8 grey levels of 255 write 8/255"),
        (["RUN", "epochs=3"], "evaluate takes settings of the evaluation .*got 'epochs'"),
        (["RUN", "optimizer.lr=3"], "evaluate takes settings of the evaluation"),
        (["RUN", "data.siez=8"], "data.siez: there is no such setting; did you mean size?"),
        (["RUN", "eps=x"], "evaluation.eps: "),
        (
            ["RUN/nothing"],
            "RUN/ARM or RUN/checkpoints/ARM: ARM is one of flatreg, other; a timm model",
        ),
        (
            ["RUN/.."],
            "expected a run or an arm, RUN, RUN/ARM or RUN/checkpoints/ARM: found no reci",
        ),
        (["RUN/checkpoints"], "ARM is one of flatreg, other"),
    ],
)
def test_mistakes_are_one_line(run, capsys, arguments, message):
    arguments = [argument.replace("RUN", str(run[0])) for argument in arguments]
    assert main(["evaluate", *arguments, "output=/nonexistent"]) == 2
    printed = capsys.readouterr()
    message = re.escape(message).replace(r"\.\*", ".*")
    assert re.search(message, printed.err) and printed.out == "", printed.err
    assert printed.err.count("\n") == 1


def test_a_run_that_is_not_complete_says_how_to_go_on(run, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text((run[0] / "recipe.yaml").read_text())
    assert main(["evaluate", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "expected 2 epochs, found 0: the run is not complete" in error
    assert f"flatreg run {tmp_path}/recipe.yaml output={tmp_path} continues it" in error


def test_an_error_under_json_is_a_document_too(run, capsys):
    assert main(["evaluate", "--json", str(run[0]), "eps=9"]) == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out)["error"] in printed.err


def test_an_interruption_under_json_is_a_document_too(run, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("flatreg.run.evaluation.evaluate", interrupted)
    assert main(["evaluate", "--json", str(run[0])]) == 130
    assert json.loads(capsys.readouterr().out)["error"].startswith("interrupted; the same command")


def test_a_measurement_under_json_is_its_card(run, tmp_path, capsys):
    arm = str(run[0] / "checkpoints/flatreg")
    small = ["samples=20", "parts=[kappa]", "rank=0", f"output={tmp_path}"]
    assert main(["--quiet", "measure", arm, *small, "--json"]) == 0
    printed = capsys.readouterr()
    card = json.loads(printed.out)
    assert card["n"] == 20 and card["folder"] == str(tmp_path) and printed.err == ""
    assert main(["measure", arm, *small]) == 0
    printed = capsys.readouterr()
    assert "kappa" in printed.out and printed.err.startswith("card      ")


def test_check_and_table_have_documents(run, capsys):
    assert main(["check", str(run[0] / "recipe.yaml"), "--json", "--quiet"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["arms"] == ["other", "flatreg"] and document["test_images"] == 60
    assert main(["table", str(run[0]), "--json", "--quiet"]) == 0
    (section,) = json.loads(capsys.readouterr().out)["sections"]
    assert {arm["row"] for arm in section["arms"]} == {"other", "flatreg"}


def test_penalties_that_differentiate_twice_are_refused_with_compile(run, capsys):
    """By `check`, which trains nothing, as by the run."""
    twice = "{kind: LayerFlatness, strength: 1, method: double_backward}"
    recipe = str(run[0] / "recipe.yaml")
    command = ["check", recipe, "model.compile=true", "variants={}"]
    assert main([*command, f"penalties=[{twice}]"]) == 2
    assert "differentiates twice, and torch.compile has no second" in capsys.readouterr().err
    assert main([*command, "penalties=[{kind: RelativeFlatness, strength: 1}]"]) == 0


def test_help_knows_every_setting(capsys):
    """After a change of a setting, `python -m flatreg.run.help` writes settings.json again."""
    types = json.loads(json.dumps(helps.read_types()))
    assert types == json.loads(helps.FILE.read_text())
    for command, groups in helps.GROUPS.items():
        for group, meanings in groups.items():
            assert types[command][group].keys() == meanings.keys(), (command, group)
    for command in COMMANDS:
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        text = capsys.readouterr().out
        assert end.value.code == 0 and "exit codes: 0 done; 2 a mistake" in text
        settings = text[text.find("settings, as") :].splitlines()
        assert max(map(len, settings)) <= helps.WIDTH


def test_every_command_has_its_example():
    with pytest.raises(SystemExit):
        main(["nonsense"])
    for name, example in COMMANDS.items():
        assert shlex.split(example)[:2] == ["flatreg", name]


def test_the_examples_of_the_page_run(tmp_path, monkeypatch, capsys):
    """In the order of the page, with a small recipe under the name of the quickstart's."""
    page = (Path(__file__).parent.parent / "docs/command_line.md").read_text()
    blocks = re.findall(r"^```\n(.*?)^```", page, re.M | re.S)
    examples = [shlex.split(line) for block in blocks for line in block.splitlines()]
    assert {words[1] for words in examples} == set(COMMANDS)
    monkeypatch.chdir(tmp_path)
    small = RECIPE.partition("variants")[0].replace("limit: 300, test_limit: 60", "limit: 100")
    small = small.replace("batch_size: 100", "batch_size: 50").replace("samples: 30", "samples: 5")
    small += "arm: margin-bound\npenalties: [{kind: RelativeFlatness, strength: 1}]\n"
    Path("recipes").mkdir()
    Path("recipes/quickstart.yaml").write_text(small)
    model = timm.create_model("test_convnext3", in_chans=1, num_classes=10)
    torch.save(model.state_dict(), "weights.pth")
    for _, *words in examples:
        assert main(words) == 0, (words, capsys.readouterr().err)
        out = capsys.readouterr().out
        assert out if "--json" not in words else json.loads(out)


@pytest.mark.parametrize(("split", "images"), [("train", "training"), ("validation",) * 2])
def test_a_report_says_which_images_it_is_about(run, tmp_path, capsys, split, images):
    torch.save(run[2].state_dict(), tmp_path / "w.pt")
    command = ["evaluate", "test_resnet", *DIGITS, *FAST, f"weights={tmp_path / 'w.pt'}"]
    command += [f"split={split}", "data.validation=0.2", f"output={tmp_path / 'out'}"]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith(f"digits ({images} images), test_resnet, ")
    assert of_report(read_report(tmp_path / "out"))["split"] == split
    for name in ("report.md", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        assert f"{images} images" in text and "n test images" not in text
        assert not re.search(r"[0-9] test images", text)
