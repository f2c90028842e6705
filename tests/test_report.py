import pytest
import torch

from flatreg import load_recipe, relative_flatness, scale_to_confidence
from flatreg.plots import draw
from flatreg.report import make_report, read_report, table, write_report
from flatreg.train import Epoch, build_model


@pytest.fixture
def made(tmp_path):
    """A report of two untrained models, one of which gives every image the same logits."""
    path = tmp_path / "small.yaml"
    path.write_text(
        "data: {kind: digits}\n"
        "model: {name: test_convnext3, args: {kernel_sizes: 3}, mean: [0.5], std: [0.5]}\n"
        "penalties: [{kind: RelativeFlatness, strength: 1}]\n"
        "optimizer: {lr: 0.1}\nepochs: 2\nbaseline: true\n"
        "evaluation: {eps: 0.01, samples: 40, attack: fast}\n"
    )
    recipe = load_recipe(path)
    splits = recipe.data.load()
    models = {name: build_model(recipe, splits).eval() for name in recipe.arms()}
    with torch.no_grad():
        models["flatreg"].model.head.fc.weight.zero_()
        models["flatreg"].model.head.fc.bias.zero_()
    seconds = {"plain": [1.0, 9.0, 2.0], "flatreg": [3.0, 3.0, 50.0]}
    histories = {
        name: [Epoch(i, 0.1, s, 0.5, {"CrossEntropy": 0.5}) for i, s in enumerate(seconds[name])]
        for name in models
    }
    return make_report(recipe, splits, models, histories, progress=False), splits, models


def test_time_ratio_is_of_median_epochs(made):
    assert [row.time_ratio for row in made[0].rows] == [1.0, 1.5]


def test_kappa_is_the_mean_over_the_evaluated_samples(made):
    report, splits, models = made
    row = report.rows[0]
    x = splits.test.images[row.evaluation.indices].float() / 255
    with torch.no_grad():
        phi = models["plain"].model.forward_head(
            models["plain"].model.forward_features(models["plain"].normalize(x)), pre_logits=True
        )
        logits = models["plain"](x)
    weight = models["plain"].model.head.fc.weight.detach()
    kappa = relative_flatness(phi, logits, weight)
    assert row.relative_flatness.value == pytest.approx(float(kappa.mean()), rel=1e-4)
    assert row.relative_flatness.stderr == pytest.approx(float(kappa.std() / 40**0.5), rel=1e-4)
    c = scale_to_confidence(logits, 0.9)
    matched = relative_flatness(phi, c * logits, c * weight).mean()
    assert row.relative_flatness_matched.value == pytest.approx(float(matched), rel=1e-3)


def test_a_model_that_learned_nothing_is_reported_too(made, tmp_path):
    report = made[0]
    broken = report.rows[1]
    assert broken.relative_flatness.value == 0 and broken.relative_flatness_matched is None
    write_report(report, tmp_path, draw(report, tmp_path))
    assert read_report(tmp_path) == report
    assert " - " in table(report) and max(map(len, table(report).split("\n"))) <= 100


def test_another_schema_is_refused(made, tmp_path):
    (tmp_path / "report.json").write_text('{"schema": 99}')
    with pytest.raises(ValueError, match="expected schema 2, got 99"):
        read_report(tmp_path)
