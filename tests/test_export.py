"""What leaves a run: an exported folder, its card, and the push of both to a stand-in Hub."""

import json
import os
import re
import shutil
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from unittest import mock

import huggingface_hub
import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config

import flatreg
from flatreg.attacks.spot_check import SpotChecked
from flatreg.data.files import load_whole, save_whole
from flatreg.data.images import ImageArrays, Splits
from flatreg.report.model_card import Details, model_card
from flatreg.run.build import create
from flatreg.run.checkpoints import Continued, Epoch, read_built, save_checkpoint, save_spec
from flatreg.run.cli import main
from flatreg.run.export import PushSettings, push
from flatreg.run.recipe_sections import Model

RECIPE = """
data: {kind: digits, limit: 200, test_limit: 30}
model: {name: test_resnet, mean: [0.4914], std: [0.21], args: {act_layer: silu}}
criterion: {kind: NFGSM, eps: 0.02}
penalties: [{kind: RelativeFlatness, strength: 0.01}]
optimizer: {lr: 3.0e-3, wrapper: {kind: RandomSAM}}
epochs: 2
batch_size: 50
ema: 0.5
evaluation:
  {eps: 0.02, attack: fast, curve: [0.01], other_threats: {l2: 0.1}, save_inputs: true}
baseline: true
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "small.yaml").write_text(RECIPE)
    assert main(["run", str(folder / "small.yaml"), f"output={folder / 'small'}"]) == 0
    return folder / "small"


@pytest.fixture
def folder(run, tmp_path):
    """A folder with the exported model of the run and its card."""
    assert main(["card", f"{run}/flatreg", "license=apache-2.0", f"output={tmp_path / 'out'}"]) == 0
    return tmp_path / "out"


def images_of(count=5):
    return torch.rand(count, 1, 32, 32, generator=torch.Generator().manual_seed(3))


def by_overlay(folder):
    """The model by timm's name of the network and the path of its weights."""
    config = json.loads((folder / "config.json").read_text())
    overlay = config["pretrained_cfg"] | {"file": str(folder / "model.safetensors")}
    return timm.create_model(
        config["architecture"],
        pretrained=True,
        pretrained_cfg_overlay=overlay,
        **config.get("model_args", {}),
    )


def by_folder(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True)


def by_hub(folder):
    """The model from the Hub, whose files are those of the folder."""

    def fetched(repo_id, filename, **_):
        assert repo_id == "me/robust"
        return str(folder / filename)

    with mock.patch("timm.models._hub.hf_hub_download", fetched):
        return timm.create_model("hf-hub:me/robust", pretrained=True)


@pytest.mark.parametrize("load", [by_folder, by_overlay, by_hub])
def test_timm_loads_what_the_run_reports(run, tmp_path, load):
    """The averaged weights, to the bit, without a network, and how images have to be prepared."""
    assert flatreg.export(run / "flatreg", tmp_path) == tmp_path
    trained, model = flatreg.load_model(run / "checkpoints/flatreg"), load(tmp_path).eval()
    config = resolve_model_data_config(model)
    assert (config["mean"], config["std"]) == ([0.4914], [0.21]) or (
        config["mean"],
        config["std"],
    ) == ((0.4914,), (0.21,))
    assert tuple(config["input_size"]) == (1, 32, 32)
    images = images_of()
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    assert torch.equal(model((images - mean) / std), trained(images))
    shown = [path.name for path in tmp_path.iterdir() if path.name != ".lock"]
    assert sorted(shown) == ["config.json", "model.safetensors"]


def test_one_process_of_several_may_export(run, tmp_path, monkeypatch):
    def gather(_):
        raise AssertionError("the others do not call it: this one would wait for them for ever")

    monkeypatch.setattr("flatreg.data.files.gather", gather)
    assert (flatreg.export(run / "flatreg", tmp_path) / "model.safetensors").is_file()


def kept(tmp_path, name, *, shape=(3, 32, 32), classes=3, class_names=None, **spec):
    """Checkpoints of a network with random weights, as a training leaves them."""
    channels = shape[0]
    labels = torch.arange(classes)
    few = ImageArrays(torch.zeros(classes, *shape, dtype=torch.uint8), labels)
    splits = Splits(few, few, few, classes, class_names)
    model_spec = Model(name=name, mean=[0.5] * channels, std=[0.25] * channels, **spec)
    torch.manual_seed(1)
    model = create(model_spec, classes, channels, pretrained=False)
    for buffer_name, values in model.named_buffers():
        if "running_var" in buffer_name:  # a mean would leave few activations above 0
            values.add_(torch.rand_like(values))
    folder = tmp_path / "checkpoints/arm"
    save_spec(model_spec, model, splits, folder)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    save_checkpoint(folder, Continued(model, optimizer), [Epoch(0, 0.1, 1.0, 1.0, {})])
    return folder


VIT = {"img_size": 32}
KINDS = {
    "grey": ("test_resnet", {"shape": (1, 32, 32)}),
    "four channels": ("test_resnet", {"shape": (4, 32, 32)}),
    "activation": ("test_efficientnet", {"args": {"act_layer": "silu", "drop_rate": 0.2}}),
    "pooling": ("test_resnet", {"args": {"global_pool": "catavgmax"}}),
    "frozen": ("test_efficientnet", {"frozen_statistics": True, "freeze": ["conv_stem"]}),
    "runtime": ("test_resnet", {"channels_last": True, "compile": True}),
    "attention": ("test_vit", {"args": VIT | {"global_pool": "avg", "class_token": False}}),
    "not square": ("test_vit", {"args": {"img_size": [32, 64]}, "shape": (3, 32, 64)}),
    "any size": ("test_vit", {"args": {"dynamic_img_size": True}, "shape": (3, 64, 64)}),
    "own wide": ("wide_resnet28_10", {"args": {"depth": 10, "width": 1, "act_layer": "silu"}}),
    "own": ("cifar_resnet18", {"shape": (1, 32, 32)}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_network_comes_back(tmp_path, kind):
    name, about = KINDS[kind]
    folder = kept(tmp_path, name, **about)
    try:
        out = flatreg.export(folder, tmp_path / "out")
    except ValueError as error:
        if timm.__version__ in ("1.0.29", "1.0.30") and "does not load" in str(error):
            pytest.skip(str(error))  # these drop some arguments of a network, without a word
        raise
    trained = flatreg.load_model(folder)
    images = torch.rand(3, *about.get("shape", (3, 32, 32)))
    logits = trained(images)
    assert (logits.std(0) > 0).all()
    for load in (by_folder, by_overlay, by_hub):
        assert torch.equal(load(out).eval()((images - 0.5) / 0.25), logits), load


def test_class_names_and_the_cut_of_images_are_in_the_configuration(tmp_path):
    names = ("cat", "dog", "chæval \U0001f40e")
    out = flatreg.export(kept(tmp_path, "test_resnet", class_names=names), tmp_path / "out")
    model = by_folder(out)
    assert tuple(model.pretrained_cfg["label_names"]) == names
    assert model.pretrained_cfg["num_classes"] == 3
    picture = Image.new("RGB", (50, 40), "white")
    transform = create_transform(**resolve_model_data_config(model))
    assert torch.equal(transform(picture), torch.full((3, 32, 32), (1 - 0.5) / 0.25))


def test_what_timm_does_not_load_back_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    folder, out = kept(tmp_path, "test_resnet"), tmp_path / "out"
    refused = pytest.raises(
        ValueError, match="does not load test_resnet back as it was trained: weights"
    )
    with refused as error, monkeypatch.context() as patch:
        load = timm.create_model

        def another(name, **settings):
            model = load(name, **settings)
            if name.startswith("local-dir:"):
                model.fc.bias.data[0] += 1e-3
            return model

        patch.setattr(timm, "create_model", another)
        flatreg.export(folder, out)
    assert "\n" not in str(error.value) and [p.name for p in out.iterdir()] == [".lock"]


def test_an_export_that_is_killed_leaves_no_weights_with_the_configuration_of_others(
    tmp_path, monkeypatch
):
    folder, out, moved = kept(tmp_path, "test_resnet"), tmp_path / "out", []

    def killed(source, target):
        moved.append(target)
        if len(moved) == 2:
            shutil.copytree(os.path.dirname(source), out / ".export-x.flatreg-partial")
            raise KeyboardInterrupt
        return real(source, target)

    flatreg.export(folder, out)
    real = os.replace
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        flatreg.export(folder, out)
    assert not (out / "config.json").exists()
    flatreg.export(folder, out)
    assert sorted(p.name for p in out.iterdir()) == [".lock", "config.json", "model.safetensors"]


def test_the_card_has_the_numbers_of_the_report(run, folder):
    row = {row.name: row for row in flatreg.read_report(run).rows}["flatreg"]
    found, text = row.evaluation, (folder / "README.md").read_text()
    card = ModelCard(text).data
    assert (card.library_name, card.license) == ("timm", "apache-2.0")
    clean, attacked, other = card.eval_results
    assert (clean.metric_type, clean.metric_value) == ("accuracy", round(found.clean.value, 4))
    assert attacked.metric_type == other.metric_type == "attacked_accuracy"
    assert attacked.metric_value == round(found.attacked.value, 4)
    about = attacked.metric_args
    assert (about["norm"], about["eps"], about["n"]) == ("linf", 0.02, 30)
    assert about["interval_95"] == [round(found.attacked.low, 4), round(found.attacked.high, 4)]
    assert about["cascade"] == [stage.attack for stage in found.stages]
    assert (other.metric_args["norm"], other.metric_args["eps"]) == ("l2", 0.1)
    assert attacked.dataset_name == "digits"
    plain = next(row for row in flatreg.read_report(run).rows if row.name == "plain")
    for one in (row, plain):
        assert f"{100 * one.evaluation.attacked.value:.1f} [" in text
    for part in ("upper bound on robust accuracy", "`NFGSM` + `RelativeFlatness`", "`RandomSAM`"):
        assert part in text
    assert "are of another evaluation" not in text and "of other data" not in text
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.S)[1])
    assert recipe == yaml.safe_load((run / "recipe.yaml").read_text())


def test_the_code_in_the_card_counts_what_the_card_says(run, folder, monkeypatch, capsys):
    """In another folder, as whoever downloads it does it: with timm, torch and safetensors."""
    monkeypatch.chdir(folder)
    use, score = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    found = {"images": images_of()}
    exec(use, found)
    assert torch.equal(
        found["logits"], flatreg.load_model(run / "checkpoints/flatreg")(images_of())
    )
    exec(score, {})
    attacked = flatreg.read_report(run).rows[-1].evaluation.attacked
    assert 0 < attacked.count < 30
    said = f"{attacked.count} of 30"
    assert capsys.readouterr().out == f"{said} attacked images are classified right\n"
    assert f"The code below counts {said}." in (folder / "README.md").read_text()
    assert len(score.strip().splitlines()) <= 16


def test_names_mean_nothing_to_the_card(run, tmp_path):
    name = "<img src=x> --- [a](b) **c**: '\""
    given = [f"name={json.dumps(name)}", "datasets=me/digits"]
    assert main(["card", f"{run}/flatreg", *given, f"output={tmp_path}"]) == 0
    text = (tmp_path / "README.md").read_text()
    assert ModelCard(text).data.datasets == ["me/digits"]
    assert ModelCard(text).data.model_name == name
    title = next(line for line in text.splitlines() if line.startswith("# "))
    assert r"\<img src=x>" in title and r"[a\](b) \*\*c\*\*" in title


def details_of(run, **changes):
    built = read_built(run / "checkpoints/flatreg")
    return Details(
        name="net",
        built=built.model_copy(update=changes),
        license=None,
        trained_on="digits",
        datasets=[],
        base_model=None,
        has_images=False,
        weights="0" * 64,
        recipe="epochs: 1\n```\n# title",
        evaluation=None,
        environment={},
    )


def test_the_card_says_whom_a_spot_check_attacked(run):
    report = flatreg.read_report(run)
    row = report.rows[-1]
    assert "spot check" not in model_card(report, row, details_of(run))
    *before, last = row.evaluation.stages
    stages = [*before, replace(last, spot_check=SpotChecked(312, 64, 12))]
    row = replace(row, evaluation=replace(row.evaluation, stages=stages))
    text = model_card(report, row, details_of(run))
    assert "fooled none: it would fool at most 3.8% (95% confidence)." in text
    assert "a spot check runs on some of these" in text and "survive every attack" not in text


def test_names_of_classes_mean_nothing_to_the_card(run):
    report = flatreg.read_report(run)
    names = ("<b>cat", "a|b", "dog\n# title", *"0123456")
    text = model_card(report, report.rows[-1], details_of(run, class_names=names))
    assert r"\<b>cat, a\|b, dog # title, 0, 1" in text
    assert "````yaml\nepochs: 1\n```\n# title\n````" in text


def test_places_on_the_machine_stay_there(run, tmp_path):
    """A recipe names folders of its owner, which a public page does not."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    recipe = yaml.safe_load((copy / "recipe.yaml").read_text())
    recipe["data"] = {"kind": "array", "path": "/home/me/secret/set.npz"}
    recipe["model"]["weights"] = "/home/me/secret/start.safetensors"
    started = {"name": "local-dir:/home/me/secret/net", "pretrained": True}
    recipe["variants"] = {"other": {"model": started}}
    (copy / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    raw = json.loads((copy / "report.json").read_text())
    raw["recipe"]["data"] = {"kind": "array", "path": "/home/me/secret/later.npz"}
    for row in raw["rows"]:
        row["model"] |= {"name": "hf-hub:me/start@v1", "pretrained": True}
    (copy / "report.json").write_text(json.dumps(raw))
    assert main(["card", f"{copy}/flatreg"]) == 0
    text = (copy / "export/flatreg/README.md").read_text()
    names = ("set.npz", "start.safetensors", "local-dir:net", "later.npz")
    assert all(name in text for name in names)
    assert "secret" not in text and ModelCard(text).data.base_model == "me/start"


def test_a_card_quotes_the_report_that_it_is_told_to(run, tmp_path):
    """`flatreg evaluate` writes another beside the run's, with images of its own."""
    shutil.copytree(run, tmp_path / "run")
    changes = ["evaluation.eps=0.01", "evaluation.curve=[]", "evaluation.samples=12"]
    assert main(["evaluate", str(tmp_path / "run"), *changes]) == 0
    report = tmp_path / "run/evaluation"
    assert main(["card", f"{tmp_path / 'run'}/flatreg", f"report={report}"]) == 0
    out = tmp_path / "run/export/flatreg"
    _, attacked, _ = ModelCard((out / "README.md").read_text()).data.eval_results
    assert (attacked.metric_args["eps"], attacked.metric_args["n"]) == (0.01, 12)
    assert len(load_file(out / "attacked_images.safetensors")["labels"]) == 12


def test_a_card_tells_the_data_of_the_training_from_those_of_the_evaluation(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    recipe = yaml.safe_load((copy / "recipe.yaml").read_text())
    trained = {"kind": "torchvision", "name": "CIFAR10", "root": "data"}
    (copy / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"data": trained}))
    raw = json.loads((copy / "report.json").read_text())
    raw["recipe"]["data"] = trained | {"name": "CIFAR100"}
    (copy / "report.json").write_text(json.dumps(raw))
    assert main(["card", f"{copy}/flatreg"]) == 0
    text = (copy / "export/flatreg/README.md").read_text()
    data = ModelCard(text).data
    assert data.datasets == ["uoft-cs/cifar10"]
    assert {metric.dataset_name for metric in data.eval_results} == {"CIFAR100"}
    assert "flatreg trained it on CIFAR10 for" in text
    assert "n = 30 test images of CIFAR100" in text and "trains it again." in text
    training, other = re.findall(r"```yaml\n(.*?)```", text, re.S)
    assert yaml.safe_load(training)["data"]["name"] == "CIFAR10"
    assert yaml.safe_load(other)["data"]["name"] == "CIFAR100"


def _rewrite_images(run, change, told):
    file = run / "evaluations/flatreg/adversarial.safetensors"
    tensors, _ = load_whole(file)
    save_whole(file, tensors | {"index": change(tensors["index"])}, told)


WRONG_CARDS = {
    "no report": (lambda run: (run / "report.json").unlink(), "expected a report.json, found none"),
    "no recipe": (
        lambda run: (run / "recipe.yaml").unlink(),
        "expected the recipe of the training, found none",
    ),
    "no longer a recipe": (
        lambda run: (run / "recipe.yaml").write_text("epochs: -1\nmodle: 3\n"),
        "expected the recipe of the training: ",
    ),
    "of another training": (
        lambda run: shutil.copytree(
            run / "checkpoints/plain", run / "checkpoints/flatreg", dirs_exist_ok=True
        ),
        "expected the report of the training in",
    ),
    "images of another evaluation": (
        lambda run: shutil.copytree(
            run / "evaluations/plain", run / "evaluations/flatreg", dirs_exist_ok=True
        ),
        "expected the evaluation that the report quotes",
    ),
    "images of other samples": (
        lambda run: _rewrite_images(run, lambda index: index.flip(0), {}),
        "expected the images of the evaluation.json beside it",
    ),
    "images of other verdicts": (
        lambda run: _rewrite_images(run, lambda index: index, {"evaluation": "0" * 64}),
        "expected the images of the evaluation.json beside it",
    ),
}


@pytest.mark.parametrize("kind", WRONG_CARDS)
def test_a_card_of_other_numbers_is_refused(run, tmp_path, capsys, kind):
    change, message = WRONG_CARDS[kind]
    shutil.copytree(run, tmp_path / "run")
    change(tmp_path / "run")
    assert main(["card", f"{tmp_path / 'run'}/flatreg"]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
    assert not (tmp_path / "run/export/flatreg/README.md").exists()


def test_a_card_without_images_says_so(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    assert main(["card", f"{tmp_path / 'run'}/flatreg"]) == 0
    out = tmp_path / "run/export/flatreg"
    assert set(load_file(out / "attacked_images.safetensors")) == {"inputs", "labels", "index"}
    (tmp_path / "run/evaluations/flatreg/adversarial.safetensors").unlink()
    assert main(["card", f"{tmp_path / 'run'}/flatreg"]) == 0
    assert not (out / "attacked_images.safetensors").exists()
    assert "The attacked images are not beside this card." in (out / "README.md").read_text()


MISTAKES = [
    (["export", "RUN"], "expected an arm, RUN/ARM .*: ARM is one of flatreg, plain"),
    (["export", "RUN/flatrek"], "ARM is one of flatreg, plain"),
    (["export", "nowhere"], "nowhere: expected an arm, .*: found none$"),
    (["export", "RUN/../smal"], "RUN/ARM or RUN/checkpoints/ARM: found none; did you mean small.$"),
    (["export", "RUN/flatreg", "license=mit"], "export takes output=DIR alone"),
    (["card", "RUN/flatreg", "licence=mit"], "licence: there is no such setting; did you mean li"),
    (["card", "RUN/flatreg", "datasets=3"], "datasets: .*list"),
    (["card", "RUN/flatreg", "report=nowhere"], "nowhere: expected a report.json, found none"),
    (["push", "RUN", "me/x"], "expected a model and its card, found no model.safetensors"),
    (["push", "RUN/flatreg", "me/x", "public=true"], "public: there is no such setting"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_are_told_in_one_line(run, capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main([argument.replace("RUN", str(run)) for argument in arguments]) == 2
    told = capsys.readouterr().err
    assert re.search(message, told) and told.count("\n") == 1
    assert not os.listdir(tmp_path)


def test_a_damaged_recipe_is_told_before_anything_is_exported(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/recipe.yaml").write_text("epochs: [")
    assert main(["export", f"{tmp_path / 'run'}/flatreg", f"output={tmp_path / 'out'}"]) == 2
    assert "recipe.yaml" in capsys.readouterr().err and not (tmp_path / "out").exists()


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as a push asks for; the server keeps what it was given."""

    def log_message(self, *_):
        pass

    def answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.server.refuses:
            self.answer({"error": "Invalid username or password."}, 401)
        else:
            self.answer({"id": "me/robust", "private": self.server.private, "tags": []})

    def do_POST(self):
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append(self.path)
        if self.server.refuses:
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.path.endswith("/create"):
            how = json.loads(raw)  # older clients say it in another word
            asked = how.get("visibility") == "private" or how.get("private", False)
            self.server.private = asked if self.server.there is None else self.server.there
            self.answer({"url": f"{self.server.address}/me/robust"})
        elif "/preupload/" in self.path:
            files = json.loads(raw)["files"]
            plain = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            self.answer({"files": [plain | {"path": file["path"]} for file in files]})
        elif "/commit/" in self.path:
            self.server.commit = [json.loads(line) for line in raw.splitlines()]
            where = f"{self.server.address}/me/robust/commit/1"
            self.answer({"commitUrl": where, "commitOid": "1" * 40, "success": True})
        else:
            self.answer({})


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.asked, server.refuses, server.there, server.private = [], False, None, None
    server.commit = None
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def pushed(hub):
    return {line["value"]["path"] for line in hub.commit if line["key"] == "file"}


FILES = {"README.md", "attacked_images.safetensors", "config.json", "model.safetensors"}


def test_a_push_is_private_and_takes_what_it_lists(folder, hub, capsys):
    (folder / ".env").write_text("secret")
    (folder / ".cache").mkdir()
    (folder / ".cache/x").write_text("secret")
    assert main(["push", str(folder), "me/robust"]) == 0
    told = capsys.readouterr().out
    assert hub.private is True and pushed(hub) == FILES
    assert all(name in told for name in FILES) and f"{hub.address}/me/robust" in told


def test_a_push_is_public_only_where_it_is_asked_for(folder, hub, capsys):
    hub.there = False
    assert main(["push", str(folder), "me/robust"]) == 2
    assert "it is there and public: nothing is uploaded" in capsys.readouterr().err
    assert hub.commit is None
    assert main(["push", str(folder), "me/robust", "private=false"]) == 0
    assert hub.private is False and pushed(hub) == FILES


def test_a_dry_run_asks_the_hub_nothing(folder, hub, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert main(["push", str(folder), "me/robust", "dry_run=true"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in FILES) and "nothing is uploaded" in told
    assert not hub.asked


def test_a_folder_is_pushed_with_its_own_card_alone(run, folder, hub, capsys):
    text = (folder / "README.md").read_text()
    (folder / "README.md").unlink()
    assert main(["push", str(folder), "me/robust"]) == 2
    assert "found no README.md: `flatreg card RUN/ARM" in capsys.readouterr().err
    (folder / "README.md").write_text(text)
    assert main(["export", f"{run}/plain", f"output={folder}"]) == 0
    assert main(["push", str(folder), "me/robust"]) == 2
    assert "is of other weights than model.safetensors" in capsys.readouterr().err
    assert not hub.asked


@pytest.mark.parametrize("kind", ["refused", "gone", "offline", "a bad name", "no token"])
def test_a_push_that_fails_says_why_in_one_line(folder, hub, monkeypatch, kind):
    repo = "me/x/y" if kind == "a bad name" else "me/robust"
    hub.refuses = kind == "refused"
    if kind == "gone":
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    if kind == "offline":
        if huggingface_hub.__version__ < "1":
            pytest.skip("it asks once for all whether it is offline")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if kind == "no token":
        monkeypatch.setattr("flatreg.run.export.get_token", lambda: None)
    with pytest.raises((OSError, ValueError)) as error:
        push(folder, repo, PushSettings())
    expected = {
        "refused": "401",
        "gone": "not pushed to http://127.0.0.1:9: .*(refused|NewConnectionError)",
        "offline": "offline",
        "a bad name": "Repo id must be in the form",
        "no token": "no token of the Hub",
    }[kind]
    assert re.search(expected, str(error.value)) and "\n" not in str(error.value)
    assert hub.commit is None
