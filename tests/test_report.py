import copy
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch

from flatreg.attacks.pgd import pgd
from flatreg.evaluation.adaptive import adaptive_attack_check
from flatreg.evaluation.attack_path import attack_path
from flatreg.evaluation.compare import compare
from flatreg.evaluation.findings import Finding
from flatreg.evaluation.geometry.input_curvature import data_manifold, measured_curvature
from flatreg.evaluation.results import read_evaluation
from flatreg.measures.input_curvature import fisher
from flatreg.measures.manifold import PCAManifold
from flatreg.measures.relative_flatness import relative_flatness, scale_to_confidence
from flatreg.report import make
from flatreg.report.figures.report import attack_path as path_figure
from flatreg.report.figures.report import attacked_accuracy, draw
from flatreg.report.figures.style import COLORS, marks
from flatreg.report.make import make_report
from flatreg.report.rows import read_report
from flatreg.report.text import table, write_report
from flatreg.run.build import build_model
from flatreg.run.checkpoints import Epoch
from flatreg.run.recipe import Recipe, load_recipe


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A report of two untrained models, one of which gives every image the same logits."""
    path = tmp_path_factory.mktemp("report") / "small.yaml"
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


def assert_same(one, other):
    """The same report, but for the digits that a file leaves out."""
    one, other = asdict(one), asdict(other)

    def compare_at(a, b, place):
        assert type(a) is type(b), place
        if isinstance(a, dict | list):
            assert len(a) == len(b), place
            for key in a if isinstance(a, dict) else range(len(a)):
                compare_at(a[key], b[key], f"{place}.{key}")
        else:
            assert a == b or a == pytest.approx(b, rel=5e-5, nan_ok=True), place

    compare_at(one, other, "")


def test_time_ratio_is_of_median_epochs(made):
    assert [row.time_ratio for row in made[0].rows] == [1.0, 1.5]
    assert [row.training_seconds for row in made[0].rows] == [12.0, 56.0]
    assert [len(row.history) for row in made[0].rows] == [3, 3]


def test_only_long_series_lose_digits_in_the_file(made, tmp_path):
    report = made[0]
    write_report(report, tmp_path, {})
    found, row = read_report(tmp_path).rows[0], report.rows[0]
    assert found.evaluation.margins == [float(f"{m:.5g}") for m in row.evaluation.margins]
    assert found.evaluation.margins != row.evaluation.margins
    for name in ("eps", "attacked", "clean", "stages", "verdicts", "indices", "labels"):
        assert getattr(found.evaluation, name) == getattr(row.evaluation, name)
    assert found.relative_flatness == row.relative_flatness
    assert found.input_curvature == row.input_curvature
    assert read_report(str(tmp_path)) == read_report(tmp_path / "report.json")


def test_curvature_on_and_off_the_manifold_is_the_explicit_trace(made):
    """Against the Jacobian of all logits, at float64, with P as a matrix."""
    report, splits, models = made
    row = report.rows[0]
    x = splits.test.images[row.evaluation.indices].double() / 255
    model = copy.deepcopy(models["plain"]).double()
    onto = PCAManifold(rank=32).fit(splits.train.images).fitted.basis.double()
    jacobians = torch.stack([torch.func.jacrev(lambda a: model(a[None])[0])(a) for a in x])
    jacobians = jacobians.flatten(2).detach()
    with torch.no_grad():
        logits = model(x)
    c = scale_to_confidence(logits, 0.9)
    for sides, scale in ((row.input_curvature.raw, 1.0), (row.input_curvature.matched, c)):
        p = (scale * logits).softmax(1)
        gauss_newton = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        whole, on = (
            scale**2 * torch.einsum("bki,bkl,bli->b", j, gauss_newton, j)
            for j in (jacobians, jacobians @ onto.T)
        )
        for found, exact in ((sides.on, on), (sides.off, whole - on)):
            assert found.n == 40 and found.stderr < 0.3 * found.value
            assert found.value == pytest.approx(float(exact.mean()), rel=0.1)
    curvature = row.input_curvature
    assert curvature.scale == pytest.approx(c, rel=1e-4)
    assert (curvature.rank, curvature.pixels) == (32, x[0].numel())
    assert 0 < curvature.explained < 1


def test_curvature_is_that_of_fisher_with_the_same_signs(made):
    _, splits, models = made
    x = splits.test.images[:6].float() / 255
    manifold = data_manifold(splits.train.images)
    found = measured_curvature(models["plain"], x, manifold, seed=3, batch_size=4)
    generator = torch.Generator().manual_seed(3)
    signs = torch.randint(2, (6, 8, 10), generator=generator).transpose(0, 1) * 2 - 1
    points = x.requires_grad_()
    for sides, c in ((found.raw, 1.0), (found.matched, found.scale)):
        logits = c * models["plain"](points)
        expected = fisher(logits, points, manifold=manifold, signs=signs).detach()
        assert sides.off.value == pytest.approx(float(expected.mean()), rel=1e-4)
        assert sides.off.stderr == pytest.approx(float(expected.std() / 6**0.5), rel=1e-4)


def test_curvature_needs_no_second_derivative_and_refuses_without_a_first(made):
    _, splits, models = made
    x = splits.test.images[:6].float() / 255
    manifold = data_manifold(splits.train.images)

    class Broken(torch.nn.Module):
        def __init__(self, change):
            super().__init__()
            self.model, self.change = models["plain"], change

        def forward(self, x):
            return self.change(self.model(x))

    hard = measured_curvature(Broken(torch.nn.functional.hardsigmoid), x, manifold)
    assert hard is not None and hard.raw.off.value > 0
    assert measured_curvature(Broken(torch.Tensor.detach), x, manifold) is None
    assert measured_curvature(Broken(lambda z: z * torch.nan), x, manifold) is None
    assert measured_curvature(models["plain"], x[:1], manifold) is None
    assert measured_curvature(models["plain"], x, data_manifold(x[:1])) is None
    assert data_manifold(splits.train.images[:5]).rank == 4


def test_arms_of_another_model_are_not_set_beside_the_plain_arm(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(
        "data: {kind: digits}\n"
        "model: {name: test_convnext3, args: {kernel_sizes: 3}, mean: [0.5], std: [0.5]}\n"
        "optimizer: {lr: 0.1}\nepochs: 1\nbaseline: true\n"
        "variants: {other: {model: {name: test_convnext, mean: [0.5], std: [0.5]}}}\n"
        "evaluation: {eps: 0.01, samples: 20, attack: fast}\n"
    )
    recipe = load_recipe(path)
    splits = recipe.data.load()
    models = {
        name: build_model(arm.model, splits, seed=0).eval() for name, arm in recipe.arms().items()
    }
    histories = {name: [Epoch(0, 0.1, 1.0, 0.5, {"CrossEntropy": 0.5})] for name in models}
    report = make_report(recipe, splits, models, histories, progress=False)
    plain, other, own = report.rows
    assert (plain.time_ratio, other.time_ratio, own.time_ratio) == (1, None, 1)
    assert other.comparison is None and own.comparison is not None
    assert other.model_info["architecture"] == other.model["name"] == "test_convnext"
    assert plain.model_info["architecture"] == own.model["name"] == "test_convnext3"
    assert "test_convnext3, test_convnext, 1 epoch" in table(report)


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
    assert by_outcome.right.n == row.evaluation.clean.count
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
    assert_same(read_report(tmp_path), report)
    text = (tmp_path / "report.md").read_text()
    assert "## Kappa by outcome" in text
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
    assert all(row.input_curvature for row in headless.rows)
    write_report(headless, tmp_path, draw(headless, tmp_path))
    assert_same(read_report(tmp_path), headless)
    assert " - " in table(headless)


def test_findings_of_the_training_are_shown(made):
    report = made[0]
    finding = Finding("catastrophic overfitting", 0.6, 0.2, "flagged", 40, "it broke", "Wong 2020")
    line = replace(report.rows[0].history[1], findings=[finding])
    history = [report.rows[0].history[0], line]
    changed = replace(report, rows=[replace(report.rows[0], history=history)])
    assert "plain: catastrophic overfitting 0.60 > 0.20" in table(changed)


def test_another_schema_is_refused(made, tmp_path):
    (tmp_path / "report.json").write_text('{"schema": 99}')
    with pytest.raises(ValueError, match="expected schema 4, got 99"):
        read_report(tmp_path)


@pytest.mark.parametrize(("norm", "name"), [("linf", "Linf"), ("l2", "L2"), ("l1", "L1")])
def test_the_figure_names_the_norm_of_the_run(made, norm, name):
    report = made[0]
    rows = [replace(r, evaluation=replace(r.evaluation, norm=norm)) for r in report.rows]
    (axes,) = attacked_accuracy({row.name: [row] for row in rows}).axes
    assert axes.get_xlabel() == f"eps ({name}, [0,1] pixels)"


def test_an_arm_has_one_colour_in_all_figures(made):
    rows = made[0].rows
    of_row = zip(rows, marks(rows), strict=True)
    colors = {row.name: mark.color for row, mark in of_row}
    assert colors["plain"] == COLORS[0] and len(set(colors.values())) == 2
    assert [m.color for m in marks(rows[::-1])] == [m.color for m in marks(rows)][::-1]
    for figure in (attacked_accuracy({row.name: [row] for row in rows}), path_figure(rows)):
        drawn = {line.get_label().split()[0]: line.get_color() for line in figure.axes[0].lines}
        found = {name: color for name, color in drawn.items() if name in colors}
        assert "plain" in found and found.items() <= colors.items()


def test_texts_are_made_without_matplotlib():
    """What draws imports it; a report, a card and a table are text."""
    code = (
        "import sys, flatreg.report, flatreg.report.card, flatreg.report.text\n"
        "import flatreg.report.figures\n"
        "assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_each_kind_of_curvature_has_one_name(made, tmp_path):
    """The report gives a Gauss-Newton trace; the card a mean curvature, of the Hessian."""
    write_report(made[0], tmp_path, {})
    text = (tmp_path / "report.md").read_text()
    assert "## Gauss-Newton trace\n" in text and "| arm | off | off\\* | on | on\\* |" in text
    assert "curvature" not in text.partition("## Recipe")[0].lower()


def test_an_arm_is_compared_with_the_plain_one_and_checked_where_asked(tmp_path, monkeypatch):
    brief = partial(adaptive_attack_check, steps=20, restarts=2)
    monkeypatch.setattr(make, "adaptive_attack_check", brief)
    path = tmp_path / "small.yaml"
    path.write_text(
        "data: {kind: digits}\n"
        "model: {name: test_vit, args: {img_size: 32, embed_dim: 32, depth: 1}, "
        "mean: [0.5], std: [0.5]}\n"
        "optimizer: {lr: 0.1}\nepochs: 1\nbaseline: true\n"
        "evaluation: {eps: 0.0001, samples: 20, attack: fast, adaptive_check: true,"
        " save_inputs: true, other_threats: {l2: 0.001}}\n"
    )
    recipe = load_recipe(path)
    splits = recipe.data.load()
    models = {
        name: build_model(recipe.model, splits, seed=recipe.seed).eval() for name in recipe.arms()
    }
    histories = {name: [Epoch(0, 0.1, 1.0, 0.5, {"CrossEntropy": 0.5})] for name in models}
    report = make_report(recipe, splits, models, histories, folder=tmp_path, progress=False)
    plain, arm = report.rows
    assert plain.comparison is None and plain.adaptive_check is None
    assert arm.comparison == compare(plain.evaluation, arm.evaluation)
    survivors = arm.evaluation.verdicts.count(-1)
    assert survivors and arm.adaptive_check.survivors == arm.adaptive_check.n == survivors
    assert {f.name for f in arm.adaptive_check.findings} == {"transfer wins", "long search wins"}
    assert arm.model_info["architecture"] == "test_vit"
    assert arm.model_info["autoattack_acc"] == f"{100 * arm.evaluation.attacked.value:.2f}"
    assert [u.norm for u in arm.evaluation.other_threats] == ["l2"]
    for name in ("plain", "flatreg"):
        assert read_evaluation(tmp_path / name) == report.rows[name == "flatreg"].evaluation
        assert (tmp_path / name / "adversarial.safetensors").exists()
    figures = draw(report, tmp_path)
    assert (tmp_path / "figures/slice-flatreg.png").exists()
    write_report(report, tmp_path, figures)
    text = (tmp_path / "report.md").read_text()
    assert (
        "against the plain arm" in text
        and "adaptive check of the survivors" in text
        and "slice-flatreg" in text
    )
    assert_same(read_report(tmp_path), report)
