import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flatreg.evaluation.evaluate import evaluate
from flatreg.evaluation.findings import Finding
from flatreg.evaluation.results import Evaluation
from flatreg.measures.estimate import Estimate
from flatreg.measures.relative_flatness import relative_flatness
from flatreg.report.figures.report import sweep_curve
from flatreg.report.text import sweep_table
from flatreg.run import epoch
from flatreg.run import sweep as sweeping
from flatreg.run.build import build_model
from flatreg.run.checkpoints import Epoch, load_checkpoint
from flatreg.run.recipe import changed, load_recipe
from flatreg.run.sweep import (
    Sweep,
    Trial,
    read_sweep,
    recipes_over,
    run_sweep,
    trained_arm,
)
from flatreg.run.train import make_accelerator

RECIPE = """
data: {{kind: array, path: {path}, validation: 0.25}}
model: {{name: test_convnext3, args: {{kernel_sizes: 3}}, mean: [0.5], std: [0.5]}}
penalties: [{{kind: RelativeFlatness, strength: 0.1}}]
optimizer: {{lr: 3.0e-3}}
epochs: 2
batch_size: 20
evaluation: {{eps: 0.02, attack: fast}}
variants:
  other: {{criterion: {{kind: NFGSM, eps: 0.01}}}}
"""


def write_data(path, test_seed=1):
    """Eighty images in four classes by which quarter is bright; the test split is noise."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 100, (80, 32, 32), dtype=np.uint8), np.arange(80) % 4
    for image, label in zip(x, y, strict=True):
        image[16 * (label // 2) :][:16, 16 * (label % 2) :][:, :16] += 120
    noise = np.random.default_rng(test_seed).integers(0, 255, (8, 32, 32), dtype=np.uint8)
    np.savez(path, x_train=x, y_train=y, x_test=noise, y_test=np.arange(8) % 4)


@pytest.fixture
def recipe(tmp_path):
    write_data(tmp_path / "data.npz")
    (tmp_path / "small.yaml").write_text(RECIPE.format(path=tmp_path / "data.npz"))
    return load_recipe(tmp_path / "small.yaml")


def judged(result):
    """What the trials say, without the wall-clock."""
    return [
        (t.value, t.evaluation and t.evaluation.verdicts, t.relative_flatness, t.failure)
        for t in result.trials
    ]


def test_the_whole_sweep_is_judged_on_what_is_held_back(recipe, tmp_path):
    """Each row equals the evaluation of the checkpoint by hand; the diverged run is a row too."""
    result = run_sweep(recipe, "optimizer.lr", [3e-3, 1e30], tmp_path / "s", make_accelerator())
    good, lost = result.trials
    assert lost.evaluation is None and lost.value == 1e30
    assert lost.failure == "CrossEntropy is nan at step 1" and "\n" not in lost.failure
    assert (result.best, result.tied, result.arm) == (3e-3, [], "flatreg")
    splits = recipe.data.load()
    model = build_model(recipe.model, splits, seed=recipe.seed)
    history = load_checkpoint(tmp_path / "s/values/0.003/checkpoint", model)
    assert history == good.history and good.seconds == sum(e.seconds for e in history)
    by_hand = evaluate(model, splits.validation, eps=0.02, attack="fast", progress=False)
    assert good.evaluation.n == 20 and good.evaluation.verdicts == by_hand.verdicts
    model.eval()
    x, net = splits.validation.images.float() / 255, model.model
    with torch.no_grad():
        phi = net.forward_head(net.forward_features(model.normalize(x)), pre_logits=True)
        kappa = relative_flatness(phi, model(x), net.head.fc.weight)
    assert good.relative_flatness.clean.raw.value == pytest.approx(float(kappa.mean()), rel=1e-4)
    assert read_sweep(tmp_path / "s") == result


def test_a_value_that_fails_leaves_the_scale_of_float16(recipe, tmp_path):
    accelerator = make_accelerator()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_factor=4.0)
    accelerator.scaler.set_growth_interval(1)
    result = run_sweep(recipe, "optimizer.lr", [1e30], tmp_path, accelerator)
    assert result.trials[0].failure and accelerator.scaler.state_dict()["scale"] == 8.0


def test_another_test_split_changes_nothing(recipe, tmp_path):
    one = run_sweep(recipe, "penalties.0.strength", [0.1], tmp_path / "one", make_accelerator())
    write_data(tmp_path / "data.npz", test_seed=2)
    two = run_sweep(recipe, "penalties.0.strength", [0.1], tmp_path / "two", make_accelerator())
    assert judged(one) == judged(two)


def test_an_interrupted_sweep_goes_on_and_a_longer_one_reuses_it(recipe, tmp_path, monkeypatch):
    key, values = "penalties.0.strength", [0.1, "1/2"]
    whole = run_sweep(recipe, key, values, tmp_path / "whole", make_accelerator())
    real, steps = epoch.backward, []

    def interrupted(*args, **kwargs):
        steps.append(1)
        if len(steps) == 11:  # three steps an epoch: the second epoch of the second value
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(epoch, "backward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(recipe, key, values, tmp_path / "cut", make_accelerator())
    assert not (tmp_path / "cut/sweep.json").exists()
    assert (tmp_path / "cut/values/0.1/trial.json").exists()
    cut = run_sweep(recipe, key, values, tmp_path / "cut", make_accelerator())
    assert len(steps) == 11 + 3 and judged(cut) == judged(whole)
    one, two = (
        load_file(tmp_path / f / "values/1_2/checkpoint/epoch-0002/model.safetensors")
        for f in ("whole", "cut")
    )
    assert all(torch.equal(one[k], two[k]) for k in one)
    longer = run_sweep(recipe, key, [0.1, 0.0, "1/2"], tmp_path / "cut", make_accelerator())
    assert len(steps) == 11 + 3 + 6
    assert [judged(longer)[i] for i in (0, 2)] == judged(whole)


def test_trials_that_have_changed_places_are_refused(recipe, tmp_path):
    key, values = "epochs", [1, 2]
    run_sweep(recipe, key, values, tmp_path, make_accelerator())
    one, two = (tmp_path / f"values/{value}/trial.json" for value in values)
    texts = one.read_text(), two.read_text()
    one.write_text(texts[1])
    two.write_text(texts[0])
    with pytest.raises(ValueError, match=r"trial\.json: expected the trial of 1, got that of 2: d"):
        run_sweep(recipe, key, values, tmp_path, make_accelerator())


def test_the_folder_of_another_recipe_is_refused(recipe, tmp_path):
    run_sweep(recipe, "epochs", [1], tmp_path, make_accelerator())
    with (tmp_path / "values/1/recipe.yaml").open("a") as file:
        file.write("# a comment: the recipe is the same\n")
    run_sweep(recipe, "epochs", [1], tmp_path, make_accelerator())
    other = recipe.model_copy(update={"seed": 7})
    with pytest.raises(ValueError, match="holds another recipe's run") as error:
        run_sweep(other, "epochs", [1], tmp_path, make_accelerator())
    assert "\n" not in str(error.value)


def test_a_variants_key_trains_the_variant(recipe, tmp_path):
    assert trained_arm(recipe, "penalties.0.strength") == "flatreg"
    named = recipe.model_copy(update={"arm": "flat"})
    assert trained_arm(named, "optimizer.lr") == "flat"
    assert trained_arm(named, "variants.other.criterion.eps") == "other"
    key = "variants.other.criterion.eps"
    recipe = recipe.model_copy(update={"epochs": 1})
    result = run_sweep(recipe, key, ["4/255"], tmp_path, make_accelerator())
    assert result.arm == "other" and "RelativeFlatness" not in result.trials[0].history[0].parts


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        ("penalties.0.strength", [], "at least one value"),
        ("penalties.0.strength", [1, 0.1, 1.0], "expected distinct values, got 1.0"),
        ("penalties.0.strength", ["1/2", "1 2"], "penalties.0.strength=1 2: penalties.0.strength"),
        ("penalties.0.strenth", [1], "penalties.0.strenth"),
        ("penalties.3.strength", [1], "no such place"),
        ("penalties.0.strength", [-1], "greater than or equal to 0"),
        ("evaluation.eps", [0.1], "key of the training, got evaluation.eps"),
        ("data.validation", [0.1], "key of the training, got data.validation"),
        ("accumulation", [1, 2], "all values are trained with one accumulation: train each by"),
        ("mixed_precision", ["bf16"], "all values are trained with one mixed_precision: train"),
        ("baseline", [True], "got baseline, which changes none of the arm flatreg"),
        ("variants", [{}], "got variants, which changes none of the arm flatreg"),
    ],
)
def test_what_cannot_be_swept_is_refused_in_one_line(recipe, key, values, message):
    with pytest.raises(ValueError, match="^[^\n]*" + message + "[^\n]*$"):
        recipes_over(recipe, key, values)


def test_weights_that_have_the_images_cut_in_another_way_are_refused(recipe):
    """All values are trained on images that are cut once."""
    folder = {"kind": "folder", "path": ".", "size": 32, "validation": 0.2, "workers": 1}
    base = changed(recipe, "data", folder)
    base = changed(base, "model", {"name": "resnet18.a1_in1k"})
    with pytest.raises(ValueError, match=r"model\.pretrained=True would have the images cut in an"):
        recipes_over(base, "model.pretrained", [False, True])
    both = changed(base, "data", folder | {"crop_pct": 0.9, "interpolation": "bilinear"})
    assert len(recipes_over(both, "model.pretrained", [False, True])) == 2


def test_nothing_held_back_is_refused(recipe):
    bare = load_recipe(recipe.data.path.replace("data.npz", "small.yaml"), ["data.validation=0"])
    with pytest.raises(ValueError, match="validation > 0"):
        recipes_over(bare, "epochs", [1])


def evaluation(correct, n=100, clean=None, findings=()):
    return Evaluation(
        eps=0.1,
        norm="linf",
        n=n,
        clean=Estimate.share(n if clean is None else clean, n),
        attacked=Estimate.share(correct, n),
        stages=[],
        curve=[],
        findings=list(findings),
        forwards=0,
        backwards=0,
        seed=0,
        seconds=1.0,
        versions={},
        indices=[],
        verdicts=[],
        other_threats=[],
        union=None,
        labels=[],
        predictions=[],
        margins=[],
        kappas=[],
        attacked_predictions=[],
        attacked_margins=[],
        attacked_kappas=[],
    )


def made(recipe, values, corrects, clean=None):
    trials = [
        Trial(v, None if c is None else evaluation(c, clean=clean and clean[i]), None, [], "lost")
        for i, (v, c) in enumerate(zip(values, corrects, strict=True))
    ]
    best, tied = sweeping._best(trials)
    settings = recipe.model_dump(mode="json")
    return Sweep(1, "penalties.0.strength", "flatreg", settings, trials, best, tied)


def test_the_best_is_named_with_all_that_its_interval_covers(recipe):
    """Wilson's 95% interval of 60/100 is [0.502, 0.691]."""
    result = made(recipe, [0.1, 0.3, 1, 3, 10], [50, 60, 51, None, 58])
    assert result.best == 0.3 and result.tied == [1, 10]
    assert made(recipe, [1, 2], [60, 10]).tied == []
    assert made(recipe, [1, 2], [60, 60], clean=[70, 90]).best == 2
    lost = made(recipe, [1, 2], [None, None])
    assert lost.best is None and "none: every training failed" in sweep_table(lost)


def test_the_table_shows_every_value_and_fits(recipe):
    result = made(recipe, [0.1, "x" * 90, 3], [60, 52, None])
    flagged = Finding("catastrophic overfitting", 0.7, 0.4, "flagged", 20, "m", "r")
    epochs = [Epoch(0, 0.1, 2.0, 1.0, {}, findings=[flagged]), Epoch(1, 0.1, 3.5, 1.0, {})]
    result.trials[0] = Trial(0.1, evaluation(60), None, epochs)
    lines = sweep_table(result).split("\n")
    assert max(map(len, lines)) <= 100
    row = next(line for line in lines if line.startswith("0.1 "))
    assert "60.0 [50.2, 69.1]" in row and row.endswith(" 6")
    assert any(line.startswith("3 ") and "failed: lost" in line for line in lines)
    assert any(line.startswith("best      0.1 by attacked accuracy") for line in lines)
    assert "0.1: catastrophic overfitting 0.70 > 0.40" in sweep_table(result)


@pytest.mark.parametrize(
    ("values", "scale", "at"),
    [
        ([0.1, 3, "1/2"], "log", [0.1, 3.0, 0.5]),
        ([0, 0.1, 1], "symlog", [0.0, 0.1, 1.0]),
        ([-1, 1], "linear", [-1.0, 1.0]),
        ([True, "chord"], "linear", [0.0, 1.0]),
    ],
)
def test_the_figure_puts_values_where_they_belong(recipe, values, scale, at):
    result = made(recipe, values, [60, 52, None][: len(values)])
    axes = sweep_curve(result).axes[0]
    assert axes.get_xscale() == scale
    assert axes.get_xticks().tolist() == pytest.approx(at)
    bars = {c.get_label(): c for c in axes.containers}
    x, y = bars["attacked"].lines[0].get_data()
    assert sorted(x) == list(x) and sorted(y) == [52, 60]
    ends = [s[:, 1].tolist() for s in bars["attacked"].lines[2][0].get_segments()]
    assert max(ends) == pytest.approx([50.2, 69.1], abs=0.05)
    assert "Linf eps" in axes.get_title("left")
    crosses = [line for line in axes.lines if line.get_label() == "failed"]
    assert len(crosses) == (len(values) == 3)


def test_another_schema_is_refused(tmp_path):
    (tmp_path / "sweep.json").write_text(json.dumps({"schema": 99}))
    with pytest.raises(ValueError, match="expected schema 1, got 99"):
        read_sweep(tmp_path)
