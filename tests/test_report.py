from dataclasses import replace
from functools import partial

import pytest
import torch

from flatreg.attacks.path import attack_path
from flatreg.attacks.pgd import pgd
from flatreg.build import build_model
from flatreg.checkpoints import Epoch
from flatreg.evaluation.compare import compare
from flatreg.evaluation.export import read_evaluation
from flatreg.evaluation.findings import Finding
from flatreg.measures.relative_flatness import relative_flatness, scale_to_confidence
from flatreg.plots import draw
from flatreg.recipe import Recipe, load_recipe
from flatreg.report import make_report, read_report, table, write_report


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
    models = {
        name: build_model(recipe.model, splits, seed=recipe.seed).eval() for name in recipe.arms()
    }
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
    found = row.relative_flatness.clean
    assert found.raw.value == pytest.approx(float(kappa.mean()), rel=1e-4)
    assert found.raw.stderr == pytest.approx(float(kappa.std() / 40**0.5), rel=1e-4)
    c = scale_to_confidence(logits, 0.9)
    matched = relative_flatness(phi, c * logits, c * weight).mean()
    assert found.matched.value == pytest.approx(float(matched), rel=1e-3)
    shown = next(line for line in table(report).split("\n") if line.startswith("plain"))
    assert f"{found.raw.value:.3g}" in shown.split() and f"{found.matched.value:.3g}" in shown


def test_kappa_is_split_by_what_became_of_the_sample(made):
    report, splits, models = made
    row = report.rows[0]
    by_outcome = row.relative_flatness
    x = splits.test.images[row.evaluation.indices].float() / 255
    y = splits.test.labels[row.evaluation.indices]
    with torch.no_grad():
        right = models["plain"](x).argmax(1) == y
    fooled = pgd(models["plain"], x[right], y[right], eps=0.01).fooled
    assert (by_outcome.right.n, by_outcome.wrong.n) == (int(right.sum()), int((~right).sum()))
    assert by_outcome.right.n == row.evaluation.clean.correct
    assert by_outcome.attacked.n == int(fooled.sum())
    shares = [(g.n, g.raw.value) for g in (by_outcome.right, by_outcome.wrong) if g.raw]
    if len(shares) == 2:
        mean = sum(n * value for n, value in shares) / 40
        assert by_outcome.clean.raw.value == pytest.approx(mean, rel=1e-6)


def test_paths_are_aligned_by_step_and_at_the_flip(made, tmp_path):
    report, splits, models = made
    row = report.rows[0]
    indices, verdicts = row.evaluation.indices, row.evaluation.verdicts
    right = [i for i, verdict in zip(indices, verdicts, strict=True) if verdict > -2]
    x, y = splits.test.images[right].float() / 255, splits.test.labels[right]
    attack = partial(pgd, steps=40, step_size=1 / 20)
    path = attack_path(models["plain"], x, y, eps=0.02, attack=attack, matched=0.9)
    assert row.path_samples == int((path.flip > 0).sum()) > 0
    names = {"kappa", "matched kappa", "confidence", "loss"}
    assert set(row.path) == set(row.path_by_step) == names
    kappa, band = path.matched_relative_flatness, row.path_by_step["matched kappa"]
    assert band.offsets == list(range(41))
    assert band.median == pytest.approx(kappa.quantile(0.5, dim=1).tolist(), rel=1e-3)
    flipped = (path.flip > 0).nonzero().flatten()
    at_flip = path.loss[path.flip[flipped], flipped].quantile(0.5)
    band = row.path["loss"]
    assert band.median[band.offsets.index(0)] == pytest.approx(float(at_flip), rel=1e-3)
    older = replace(report, rows=[replace(row, path_by_step={}) for row in report.rows])
    draw(older, tmp_path)
    assert (tmp_path / "figures/attack_path.png").stat().st_size > 10_000


def test_a_model_that_learned_nothing_is_reported_too(made, tmp_path):
    report = made[0]
    broken = report.rows[1]
    flatness = broken.relative_flatness.clean
    assert flatness.raw.value == 0 and flatness.matched is None
    assert "matched kappa" not in broken.path_by_step and not broken.path
    write_report(report, tmp_path, draw(report, tmp_path))
    assert read_report(tmp_path) == report
    text = (tmp_path / "report.md").read_text()
    assert "## Relative flatness by outcome" in text
    assert "| flatreg | 0 (n = 40) | - |" in text
    assert " - " in table(report) and max(map(len, table(report).split("\n"))) <= 100


def test_a_model_without_a_head_is_reported_without_its_flatness(made, tmp_path):
    report, splits, models = made

    class Squashed(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x).tanh()

    squashed = {name: Squashed(model) for name, model in models.items()}
    recipe = Recipe.model_validate(report.recipe)
    histories = {row.name: row.history for row in report.rows}
    headless = make_report(recipe, splits, squashed, histories, progress=False)
    assert all(row.relative_flatness is None and not row.path for row in headless.rows)
    write_report(headless, tmp_path, draw(headless, tmp_path))
    assert read_report(tmp_path) == headless and " - " in table(headless)


def test_findings_of_the_training_are_shown(made):
    report = made[0]
    finding = Finding("catastrophic overfitting", 0.6, 0.2, "flagged", 40, "it broke", "Wong 2020")
    line = replace(report.rows[0].history[1], findings=[finding])
    history = [report.rows[0].history[0], line]
    changed = replace(report, rows=[replace(report.rows[0], history=history)])
    assert "plain: catastrophic overfitting 0.60 > 0.20" in table(changed)


def test_another_schema_is_refused(made, tmp_path):
    (tmp_path / "report.json").write_text('{"schema": 99}')
    with pytest.raises(ValueError, match="expected schema 3, got 99"):
        read_report(tmp_path)


def test_an_arm_is_compared_with_its_twin_and_scrutinised_where_asked(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(
        "data: {kind: digits}\n"
        "model: {name: test_convnext3, args: {kernel_sizes: 3}, mean: [0.5], std: [0.5]}\n"
        "optimizer: {lr: 0.1}\nepochs: 1\nbaseline: true\n"
        "evaluation: {eps: 0.0001, samples: 20, attack: fast, scrutinise: true, save_inputs: true,"
        " unseen: {l2: 0.001}}\n"
    )
    recipe = load_recipe(path)
    splits = recipe.data.load()
    models = {
        name: build_model(recipe.model, splits, seed=recipe.seed).eval() for name in recipe.arms()
    }
    histories = {name: [Epoch(0, 0.1, 1.0, 0.5, {"CrossEntropy": 0.5})] for name in models}
    report = make_report(recipe, splits, models, histories, folder=tmp_path, progress=False)
    plain, arm = report.rows
    assert plain.comparison is None and plain.scrutiny is None
    assert arm.comparison == compare(plain.evaluation, arm.evaluation)
    survivors = arm.evaluation.verdicts.count(-1)
    assert survivors and arm.scrutiny.survivors == arm.scrutiny.n == survivors
    assert {f.name for f in arm.scrutiny.findings} == {"transfer wins", "long search wins"}
    assert arm.model_info["architecture"] == "test_convnext3"
    assert arm.model_info["autoattack_acc"] == f"{100 * arm.evaluation.attacked.value:.2f}"
    assert [u.norm for u in arm.evaluation.unseen] == ["l2"]
    for name in ("plain", "flatreg"):
        assert read_evaluation(tmp_path / name) == report.rows[name == "flatreg"].evaluation
        assert (tmp_path / name / "adversarial.safetensors").exists()
    figures = draw(report, tmp_path)
    assert (tmp_path / "figures/slice-flatreg.png").exists()
    write_report(report, tmp_path, figures)
    text = (tmp_path / "report.md").read_text()
    assert "against plain" in text and "survivors scrutinised" in text and "slice-flatreg" in text
    assert read_report(tmp_path) == report
