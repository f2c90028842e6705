import inspect
import os
import re
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file, save_model
from timm.models._builder import build_model_with_cfg
from timm.optim import create_optimizer_v2

from flatreg import MarginBound, RecipeError, load_recipe
from flatreg.run.build import build_model, build_training, create
from flatreg.run.recipe import (
    Recipe,
    changed,
    dump_recipe,
    holds_another,
)
from flatreg.run.recipe_sections import NOT_FOR_MODELS, NOT_FOR_OPTIMIZERS, Model
from flatreg.run.settings import parse_over, parse_settings, read_settings

RECIPES = Path(__file__).parent.parent / "recipes"

SMALL = """
data: {kind: digits}
model: {name: test_convnext3, mean: [0.5], std: [0.5]}
penalties:
  - {kind: MarginBound, strength: 1, eps: 8/255}
optimizer: {lr: 1.0e-3, wrapper: {kind: SAM, rho: 0.1}}
epochs: 2
evaluation: {eps: 8/255}
baseline: true
variants:
  awp-like: {wrapper: {kind: SAM}}
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def test_reads_fractions_and_names_the_arms(small):
    recipe = load_recipe(small)
    assert recipe.evaluation.eps == 8 / 255
    assert recipe.penalties == [MarginBound(strength=1, eps=8 / 255)]
    arms = recipe.arms()
    assert list(arms) == ["plain", "awp-like", "flatreg"]
    assert arms["plain"].penalties == [] and arms["plain"].wrapper is None
    assert arms["awp-like"].wrapper.rho == 0.05 and arms["flatreg"].wrapper.rho == 0.1
    assert all(arm.criterion == recipe.criterion for arm in arms.values())


def test_the_recipes_own_arm_has_the_name_that_it_gives(small):
    named = load_recipe(small, ["arm=margin-bound"])
    assert list(named.arms()) == ["plain", "awp-like", "margin-bound"]
    for name, expected in (("awp-like", "variants may not be called"), ("plain", "another name")):
        with pytest.raises(RecipeError, match=expected):
            load_recipe(small, [f"arm={name}"])


def test_overrides_reach_into_lists_and_create_sections(small):
    recipe = load_recipe(
        small,
        [
            "penalties.0.strength=1/2",
            "augment.crop=2",
            "criterion={kind: NFGSM, eps: 0.1}",
            "seed=3",
        ],
    )
    assert recipe.penalties[0].strength == 0.5 and recipe.augment.crop == 2
    assert recipe.criterion.eps == 0.1 and recipe.seed == 3


def test_a_setting_changes_no_other_place_that_an_alias_filled(tmp_path):
    file = tmp_path / "shared.yaml"
    file.write_text("a: &p [{strength: 1}]\nb: &q {c: *p, d: 2}\ne: {<<: *q, d: 3}\n")
    assert read_settings(file, ["a.0.strength=5", "b.c.0.strength=6"]).values == {
        "a": [{"strength": 5}],
        "b": {"c": [{"strength": 6}], "d": 2},
        "e": {"c": [{"strength": 1}], "d": 3},
    }


def test_a_bare_no_is_a_precision(small):
    """As the message says that asks for `mixed_precision: no`; YAML reads it as false."""
    assert load_recipe(small, ["mixed_precision=no"]).mixed_precision == "no"


def test_a_changed_recipe_is_the_one_that_the_override_gives(small):
    recipe = load_recipe(small)
    for key, value in (("penalties.0.strength", "1/2"), ("optimizer.wrapper.rho", 0.3)):
        assert changed(recipe, key, value) == load_recipe(small, [f"{key}={value}"])
    assert recipe == load_recipe(small)
    with pytest.raises(RecipeError, match=r"^seed=-1: seed: [^\n]*$"):
        changed(recipe, "seed", -1)
    with pytest.raises(RecipeError, match=r"^penalties.4.eps: no such place[^\n]*$"):
        changed(recipe, "penalties.4.eps", 1)


def test_a_repeated_setting_counts_as_it_stands_last():
    given = ["a={x: 1}", "a.y=2", "b=on", "a={x: 3}", "c=x=1"]
    assert parse_settings(given) == {"a.y": 2, "b": True, "a": {"x": 3}, "c": "x=1"}
    assert list(parse_settings(given))[-2:] == ["a", "c"]
    for text in ("a", "=1", ""):
        with pytest.raises(RecipeError, match=f"^expected key=value, got {text!r}$"):
            parse_settings([text])


def test_a_recipe_file_is_compared_as_it_is_read(small, tmp_path):
    """Not by its text: key order, comments and defaults."""
    recipe, file = load_recipe(small), tmp_path / "written.yaml"
    assert not holds_another(file, recipe)
    for text in (dump_recipe(recipe), SMALL, SMALL.replace("digits}", "digits, validation: 0}")):
        file.write_text(f"# a comment\n{text}")
        assert not holds_another(file, recipe)
    file.write_text(SMALL.replace("epochs: 2", "epochs: 3"))
    assert holds_another(file, recipe)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("k=0.1,0.3, 1", [0.1, 0.3, 1]),
        ("k=8/255", ["8/255"]),
        ("k=[0.1,0.3],[1]", [[0.1, 0.3], [1]]),
        ("k={kind: SAM, rho: 1},null", [{"kind": "SAM", "rho": 1}, None]),
    ],
)
def test_what_follows_over_is_the_inside_of_a_list(text, values):
    assert parse_over(text) == ("k", values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("k", "expected key=value,value"),
        ("k=", "expected key"),
        ("=1", "expected key"),
        ("k=]", "not YAML"),
        ("k={", "not YAML"),
    ],
)
def test_what_is_no_list_of_values_is_refused(text, message):
    with pytest.raises(RecipeError, match=message) as error:
        parse_over(text)
    assert "\n" not in str(error.value)


def test_every_recipe_is_valid_short_and_reads_back():
    wrong, paths = [], sorted(RECIPES.rglob("*.yaml"))
    paths = [path for path in paths if path.parent.name != "accelerate"]  # of Accelerate itself
    for path in paths:
        text = path.read_text()
        try:
            recipe = load_recipe(path)
        except RecipeError as error:
            wrong.append(str(error))
            continue
        if Recipe.model_validate(yaml.safe_load(dump_recipe(recipe))) != recipe:
            wrong.append(f"{path}: does not read back")
        if text.count("\n") > 40 or not text.startswith("#"):
            wrong.append(f"{path}: more than 40 lines, or no comment at its head")
    assert paths and not wrong, "\n".join(wrong)


def test_every_mistake_is_a_line(small):
    with pytest.raises(RecipeError) as error:
        load_recipe(
            small,
            [
                "optimizer.wrapper.rh=1",
                "penalties=[{kind: MarginBound, strength: 1, eps: 8}, {kind: Flat}]",
                "epochs=0",
            ],
        )
    lines = str(error.value).split("\n")
    penalties = f"{small}, penalties=[{{kind: MarginBound, strength: 1, eps: 8}}, {{kind: Flat}}]"
    for line, start in zip(
        lines,
        (
            f"{penalties}: penalties.0.eps: ",
            f"{penalties}: penalties.1: ",
            f"{small}, optimizer.wrapper.rh=1: optimizer.wrapper.rh: ",
            f"{small}, epochs=0: epochs: ",
        ),
        strict=True,
    ):
        assert line.startswith(start)
    assert "write 8/255" in lines[0]
    for kind in ("RelativeFlatness", "OffManifoldCurvature", "MarginBound"):
        assert f"'{kind}'" in lines[1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "expected key=value"),
        ("penalties.7.eps=1", "no such place"),
        ("seed=[", "not YAML"),
        ("variants={plain: {}}", "that arm exists already"),
        ("monitor={every: 1}", "monitor needs data.validation > 0"),
        ("evaluation.attack=strong", "evaluation.attack: expected one of fast, standard"),
    ],
)
def test_other_mistakes(small, override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(small, [override])


def test_files_that_are_not_recipes(tmp_path):
    with pytest.raises(RecipeError, match=r"none.yaml: No such file"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(RecipeError, match="expected a mapping, got list"):
        load_recipe(tmp_path / "list.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(RecipeError, match="not YAML") as error:
        load_recipe(tmp_path / "bad.yaml")
    assert "\n" not in str(error.value)


def test_python_objects_are_not_constructed(tmp_path):
    (tmp_path / "evil.yaml").write_text("data: !!python/object/apply:os.system ['true']")
    with pytest.raises(RecipeError, match="not YAML"):
        load_recipe(tmp_path / "evil.yaml")


def test_the_recipe_of_the_page_is_one(tmp_path):
    page = (RECIPES / "README.md").read_text()
    block, streams = re.findall(r"```yaml\n(.*?)```", page, re.S)
    (tmp_path / "page.yaml").write_text(block)
    recipe = load_recipe(tmp_path / "page.yaml")
    with_streams = "".join(re.findall(r"^(?!data|augment).*\n", block, re.M)) + streams
    (tmp_path / "streams.yaml").write_text(with_streams)
    assert load_recipe(tmp_path / "streams.yaml").data.workers == 4
    assert recipe.monitor.keep == "best" and list(recipe.arms()) == ["plain", "pgd", "flatreg"]


@pytest.mark.parametrize("text", ["epochs: 1\nseed: 2\nepochs: 3", "a: {b: 1, c: 2, b: 3}"])
def test_a_key_that_stands_there_twice_is_refused(tmp_path, text):
    file = tmp_path / "twice.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=r"twice.yaml:\d: the key '\w+' stands"):
        load_recipe(file)
    with pytest.raises(RecipeError, match=r"^'a=\{b: 1, b: 2\}': the key 'b' stands there twice$"):
        load_recipe(file, ["a={b: 1, b: 2}"])


def test_a_merged_key_may_be_written_again(tmp_path):
    file = tmp_path / "merged.yaml"
    file.write_text("base: &b {x: 1, y: 2}\nown: {<<: *b, x: 3}")
    assert read_settings(file).values["own"] == {"x": 3, "y": 2}


@pytest.mark.parametrize(
    ("where", "args", "message"),
    [
        ("model", "{pretrained_cfg: {url: 'file:///etc/hostname'}}", "pretrained_cfg is not for"),
        ("model", "{pretrained_cfg_overlay: {file: x}}", "pretrained_cfg_overlay is not for a rec"),
        ("variants.awp-like.model", "{checkpoint_path: x.pth}", "`weights: FILE`"),
        ("variants.awp-like.model", "{cache_dir: /tmp/x}", "cache_dir is not for a recipe"),
        ("model", "{features_only: true}", "a recipe trains a classifier"),
        ("model", "{num_classes: 3}", "the data say it"),
        ("model", "{img_size: 100000000}", "img_size: expected a number of at most 10000, got 1e"),
        ("model", "{depth:10000}", "got 'depth:10000': write a space after the colon"),
        ("model", "{a: {b c: 1}}", "a: expected a name, got 'b c'"),
        ("optimizer", "{lr: 3}", "a setting of `optimizer` itself"),
        ("optimizer", "{param_group_fn: print}", "param_group_fn is not for a recipe"),
        ("optimizer", "{a: {b: [1, 1.0e+9]}}", "expected a number of at most 10000, got 1e+09"),
    ],
)
def test_args_can_neither_fetch_nor_write(small, where, args, message):
    named = [f"{where}.name=test_resnet"] if "variants" in where else []
    with pytest.raises(RecipeError, match=re.escape(message)) as error:
        load_recipe(small, [*named, f"{where}.args={args}"])
    assert f": {where}.args: " in str(error.value) and "\n" not in str(error.value)


def test_whatever_the_builders_of_timm_read_is_not_passed_on():
    """A new argument of timm's builders is refused before anyone knows what it does."""
    builders = (timm.create_model, build_model_with_cfg)
    read = {name for builder in builders for name in inspect.signature(builder).parameters}
    assert read - {"kwargs"} <= set(NOT_FOR_MODELS)
    plain = {"momentum", "foreach", "filter_bias_and_bn", "fallback_list"}
    plain |= {"fallback_no_weight_decay", "layer_decay", "layer_decay_min_scale", "kwargs"}
    plain |= {"layer_decay_no_opt_scale"}
    assert set(inspect.signature(create_optimizer_v2).parameters) - plain <= set(NOT_FOR_OPTIMIZERS)


@pytest.mark.parametrize(
    "name", ["hf_hub:a/b", "timm/resnet18", "C:\\\\net", "https://a/b", "../net", "s3:x"]
)
def test_models_are_named_and_not_fetched(small, name):
    with pytest.raises(RecipeError, match="expected the name of a timm architecture, hf-hub:"):
        load_recipe(small, [f'model.name="{name}"'])


def test_numbers_that_yaml_takes_for_text_are_numbers(small):
    recipe = load_recipe(small, ["optimizer.args={eps: 1e-7, betas: [0.9, 0.99], fused: null}"])
    assert recipe.optimizer.args == {"eps": 1e-7, "betas": [0.9, 0.99], "fused": None}
    assert load_recipe(small, ["model.args={act_layer: gelu}"]).model.args == {"act_layer": "gelu"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.args={betas: [0.9]}"], "optimizer adamw: "),
        (["optimizer.args={betas: 3}"], "optimizer adamw: "),
        (["optimizer.args={lr_scale: 3}"], "optimizer adamw: "),
        (["optimizer.name=none"], "optimizer none: "),
        (["model.args={depths: [9000, 1, 1, 1]}"], "expected at most 10,000 modules"),
        (["model.args={depths: [1, 1]}"], "model test_convnext3: "),
        (["model.args={depths: 3}"], "model test_convnext3: "),
        (
            ["model.args={dims: [10000, 10000, 10000, 10000], depths: [40, 40, 40, 40]}"],
            "GiB, more",
        ),
    ],
)
def test_what_a_library_refuses_is_one_line(small, overrides, message):
    recipe = load_recipe(small, overrides)
    splits = recipe.data.load()
    with pytest.raises(ValueError, match=message) as error:
        build_training(recipe, "plain", recipe.arms()["plain"], splits)
    assert "\n" not in str(error.value)


def test_training_starts_from_a_local_file(small, tmp_path):
    """Of the model alone or whole; a head for other classes starts anew, all else must fit."""
    recipe, file = load_recipe(small), tmp_path / "start.safetensors"
    splits = recipe.data.load()
    source = create(recipe.model, 10, 1, pretrained=False)
    for saved in (source, source.model):
        save_model(saved, str(file))
        started = build_model(load_recipe(small, [f"model.weights={file}"]).model, splits, seed=5)
        for one, two in zip(source.parameters(), started.parameters(), strict=True):
            assert torch.equal(one, two)
    save_model(create(recipe.model, 7, 1, pretrained=False), str(file))
    spec = recipe.model.model_copy(update={"weights": str(file)})
    head = build_model(spec, splits, seed=5).model.get_classifier()
    anew = build_model(recipe.model, splits, seed=5).model.get_classifier()
    assert torch.equal(head.weight, anew.weight)
    state = dict(source.model.state_dict())
    for wrong, message in (
        ({k: t for k, t in state.items() if "stem" not in k}, "stem.0.weight is not in the file"),
        (state | {"more": torch.zeros(1)}, "more is not in the model"),
        (state | {"stem.0.weight": torch.zeros(1)}, r"stem.0.weight has the shape \[1\] in the f"),
        (
            {k: t + k.startswith("norm") for k, t in source.state_dict().items()},
            r"its mean is \[1.5\], that of the model \[0.5\]: set mean and std",
        ),
    ):
        save_file(wrong, file)
        with pytest.raises(ValueError, match=message) as error:
            build_model(spec, splits, seed=5)
        assert "\n" not in str(error.value)
    file.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"start.safetensors is not a safetensors file"):
        build_model(spec, splits, seed=5)
    with pytest.raises(ValueError, match="expected pretrained or weights, got both"):
        Model(name="test_resnet", pretrained=True, weights="x")
    with pytest.raises(ValueError, match="weights_key: expected weights beside it"):
        Model(name="test_resnet", weights_key="ema")


def test_training_starts_from_the_weights_under_the_key(small, tmp_path):
    recipe, file = load_recipe(small), tmp_path / "two.pth"
    splits = recipe.data.load()
    own = create(recipe.model, 10, 1, pretrained=False).model.state_dict()
    torch.save({"state_dict": {k: 0 * v for k, v in own.items()}, "ema": own}, file)
    given = [f"model.weights={file}"]
    with pytest.raises(ValueError, match="choose one by weights_key=ema"):
        build_model(load_recipe(small, given).model, splits, seed=5)
    keyed = load_recipe(small, [*given, "model.weights_key=ema"]).model
    started = build_model(keyed, splits, seed=5).model.state_dict()
    assert all(torch.equal(started[name], own[name]) for name in own)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 10)}]\n"
    for before, name in zip("abcdef", "bcdefg", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name}\n  <<: [{', '.join(['*' + before] * 9)}]\n"
    for before, name in zip("abcdef", "bcdefg", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got nothing: write a recipe; if a run has written this file, delete it"),
        ("# nothing\n", "expected a mapping, got nothing"),
        ("3", "expected a mapping, got int"),
        ("a: 1\nb: [\n", ":3: not YAML: "),
        ("a: 1\nb: 'x\n", ":3: not YAML: "),
        ("a: 1\n--- \nb: 2\n", ":2: not YAML: "),
        ("a: 1\n\tb: 2\n", ":2: not YAML: "),
        ("a: *none\n", ":1: not YAML: found undefined alias"),
        ("a: 1\nb: \x00\n", ":2: not YAML: special characters are not allowed"),
        ("a: 1\nb: \x1b[2J\n", ":2: not YAML: special characters are not allowed"),
        ('a: "\\e[2Jb"\n', r":1: expected text without control characters, got \x1b[2Jb"),
        ('a: "\\0"\n', r":1: expected text without control characters, got \x00"),
        ('a: "x\\ny"\n', ":1: expected text without control characters, got x y"),
        ('a: "\\ud800"\n', r":1: expected text without control characters, got \ud800"),
        ("a: 1\nb: " + "[" * 50 + "]" * 50, ":2: expected at most 20 levels"),
        ("a: " + "{b: " * 2000, ":1: expected at most 20 levels"),
        (BOMB, ":1: expected at most 5,000 values, aliases written out"),
        (MERGES, ":1: expected at most 5,000 values, aliases written out"),
        ("seed: 010", ":1: expected a number without zeros before it, got 010"),
        ("a: &a [*a]", ":1: an alias stands inside of what it stands for"),
        ("a: &a {b: *a}", ":1: an alias stands inside of what it stands for"),
        ("a: {<<: 3}", ":1: not YAML: "),
        ("a: {<<: {1: 2}}", ":1: expected names as keys of what is merged"),
        ("x" * 100_001, "expected a recipe of at most 100,000 bytes"),
        ("a: 1\nb: !!timestamp x", ":2: not YAML for a recipe: the tag tag:yaml.org,2002:times"),
        ("b: !!binary x", ":1: not YAML for a recipe: the tag tag:yaml.org,2002:binary"),
        ("b: !!set {x, y}", ":1: not YAML for a recipe: the tag tag:yaml.org,2002:set"),
        ("b: !!omap [x: 1]", ":1: not YAML for a recipe: the tag tag:yaml.org,2002:omap"),
        ("b: !!python/name:os.system x", ":1: not YAML for a recipe: the tag tag:yaml.org,2002:py"),
        ("b: !mine x", ":1: not YAML for a recipe: the tag !mine"),
        ("!!python/object/apply:os.system ['true']", ":1: not YAML for a recipe: the tag"),
        ("b: !!int x", ":1: expected a value of the tag int, got x"),
        ("b: !!float x", ":1: expected a value of the tag float, got x"),
        ("b: !!bool x", ":1: expected a value of the tag bool, got x"),
        ("b: !!map [1]", ":1: not YAML for a recipe"),
        ("b: !!str [1]", ":1: not YAML for a recipe"),
        ("1: x", ":1: expected a name as key, got 1: put it in quotes"),
        ("a: 1\nno: x", ":2: expected a name as key, got no: put it in quotes"),
        ("null: x", ":1: expected a name as key, got null: put it in quotes"),
        ("? [a, b]\n: x", ":1: expected a name as key, got a list or a mapping"),
        ("? {a: b}\n: x", ":1: expected a name as key, got a list or a mapping"),
        ("a: .nan", ":1: expected a finite number below 2^63, got .nan"),
        ("a: -.inf", ":1: expected a finite number below 2^63, got -.inf"),
        ("a: 1.0e+400", ":1: expected a finite number below 2^63, got 1.0e+400"),
        ("a: 9223372036854775808", ":1: expected a finite number below 2^63, got 92233720"),
        ("a: " + "9" * 5000, ":1: expected a value of the tag int, got 999999"),
        ("a: 1\nepochs: 2\na: 3", ":3: the key 'a' stands there twice"),
        (b"\xff\xfea\x00:\x00 \x001\x00", "expected UTF-8, it is UTF-16: save it as UTF-8"),
        (b"a: 1\nb: \xe9\n", ":2: expected UTF-8, got other bytes"),
    ],
)
def test_what_no_recipe_holds_is_refused_with_its_line(tmp_path, text, message):
    file = tmp_path / "odd.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    with pytest.raises(RecipeError, match=re.escape(message)) as error:
        load_recipe(file)
    assert str(error.value).startswith(f"{file}:")
    assert str(error.value).isprintable() and len(str(error.value)) < 400


def test_what_yaml_makes_of_text_without_a_word_stays_text(tmp_path):
    file = tmp_path / "text.yaml"
    file.write_bytes("\ufeffa: 2020-01-31\nb: 1:30\nc: =\nd: -0\ne: ä\n".encode())
    assert read_settings(file).values == {
        "a": "2020-01-31",
        "b": "1:30",
        "c": "=",
        "d": 0,
        "e": "ä",
    }


@pytest.mark.parametrize("kind", ["folder", "fifo", "device", "missing", "loop"])
def test_what_is_no_file_is_refused_at_once(tmp_path, kind):
    place = tmp_path / "odd.yaml"
    if kind == "folder":
        place.mkdir()
    elif kind == "fifo":
        os.mkfifo(place)
    elif kind == "device":
        place = Path("/dev/zero")
    elif kind == "loop":
        place.symlink_to(place)
    with pytest.raises(RecipeError, match=re.escape(str(place))) as error:
        load_recipe(place)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs=true", "epochs: expected a number, got true or false"),
        ("mean=[0.5]", "mean: there is no such setting"),
        ("model.mean=[true]", "model.mean.0: expected a number, got true or false"),
        ("optimizer.lr=.nan", "expected a finite number below 2^63, got .nan"),
        ("optimizer.lr=1e400", "optimizer.lr: Input should be a finite number, got '1e400'"),
        ("epochs=1e400", "epochs: Input should be a valid integer"),
        ("epochs=" + "9" * 5000, "expected a value of the tag int, got 9999"),
        ("epochs=1000000000000", "epochs: Input should be less than or equal to 1000000"),
        ("seed=4294967296", "seed: Input should be less than 4294967296"),
        ("penaltys=[]", "penaltys: there is no such setting; did you mean penalties?"),
        ("penalties.0.kind=MarginBund", "got 'MarginBund'; did you mean MarginBound?"),
        ("penalties.0.epps=1", "penalties.0.epps: there is no such setting; did you mean eps?"),
        ("variants.awp-like.wraper.rho=1", "no such setting; did you mean wrapper?"),
        ("optimizer.wrapper.roh=1", "no such setting; did you mean rho?"),
        ("evaluation.norm=linff", "got 'linff'; did you mean linf?"),
        ("evaluation.attack=standart", "got 'standart'; did you mean standard?"),
        ("data.kind=digit", "got 'digit'; did you mean digits?"),
        ("data.sise=9", "data.sise: there is no such setting; did you mean size?"),
        ("data.0=1", "data.0: there is no such setting"),
        ("model.name=" + "x" * 5000, "model.name: String should have at most 200 characters"),
        ("evaluation.attack=" + "x" * 5000, "evaluation.attack: expected one of fast, "),
        ("x" * 5000 + "=1", "...: there is no such setting"),
        ("penalties.x=1", "penalties.x: no such place in the recipe"),
        ("penalties.99999999999999999999=1", "no such place in the recipe"),
        ("seed=\udcff", "the value is not YAML"),
        ("evaluation.eps=8", "small.yaml:8, evaluation.eps=8: evaluation: eps must be in [0, 1]"),
        ("optimizer=null", "optimizer=null: optimizer: expected a mapping, got None"),
        ("variants.awp-like=3", "variants.awp-like: expected a mapping, got 3"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_short_line(small, override, message):
    with pytest.raises(RecipeError) as error:
        load_recipe(small, [override])
    text = str(error.value)
    assert message in text
    assert text.isprintable() and len(text) < 900


def test_every_mistake_has_the_line_where_it_stands(small):
    text = SMALL.replace("epochs: 2", "epochs: 0").replace("strength: 1", "strength: x")
    small.write_text(text + "  other: {criterion: {kind: NFGSM, eps: 3}}\nmonitr: {}\n")
    with pytest.raises(RecipeError) as error:
        load_recipe(small, ["baseline=5"])
    starts = [line.partition(": ")[::2] for line in str(error.value).split("\n")]
    assert [(place, rest.split(": ")[0]) for place, rest in starts] == [
        (f"{small}:5", "penalties.0.strength"),
        (f"{small}:7", "epochs"),
        (f"{small}, baseline=5", "baseline"),
        (f"{small}:12", "variants.other.criterion.eps"),
        (f"{small}:13", "monitr"),
    ]
