"""Every claim of the paper on small trained networks: one that reproduces, others that must not."""

import copy
import json
import runpy
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import beyond_flatness
import closed_form
import label_blind
import local_bound
import pytest
import scaled_head
import torch
import uncanny_valley
from beyond_flatness import BeyondFlatness
from cases import trained_net
from claim import (
    AtHead,
    Check,
    ClaimResult,
    Trained,
    at_head,
    claim_text,
    in_float64,
    rank_correlation,
    share_of,
    verdict_of,
    write_claim,
)
from closed_form import ClosedForm
from label_blind import LabelBlind
from local_bound import LocalBound
from oracles import relative_flatness_by_hessian
from pydantic import TypeAdapter
from scaled_head import ScaledHead
from torch import nn
from uncanny_valley import UncannyValley

from flatreg import Estimate, evaluate
from flatreg.data.images import ImageArrays, Splits
from flatreg.measures import IdentityManifold

PAPER = Path(__file__).parent.parent / "recipes" / "paper"


@cache
def fitted():
    """A fitted net and its 192 images."""
    model, x, y = trained_net(192, steps=260)
    return model, Splits(ImageArrays(x, y), ImageArrays(x[:0], y[:0]), ImageArrays(x, y), 5)


def trained(models=None, samples=96, eps=0.1):
    model, splits = fitted()
    evaluation = evaluate(
        model, splits.test, eps=eps, attack="fast", samples=samples, diagnose=False, progress=False
    )
    return Trained(models=models or {"plain": model}, splits=splits, evaluation=evaluation)


def scaled(factor):
    model, splits = fitted()
    return scaled_head.scaled_head(model, splits.test.images[:2], factor)


def failed(result):
    return [check.criterion for check in result.checks if not check.holds]


# --- what all share


def check(subject, holds):
    return Check(subject, "c", "f", holds)


def test_a_verdict_counts_subjects_not_checks():
    assert verdict_of([check("a", True), check("b", True)]) == "reproduced"
    assert verdict_of([check("a", True), check("a", False), check("b", True)]) == "partly"
    assert verdict_of([check("a", True), check("a", False), check("b", False)]) == "not reproduced"
    assert verdict_of([]) == "not reproduced"


def test_intervals_cover_as_often_as_they_say():
    torch.manual_seed(0)
    for of, truth, draw in (
        (Estimate.mean, 0.0, lambda: torch.randn(40)),
        (Estimate.median, torch.tensor(2.0).log().item(), lambda: torch.empty(40).exponential_()),
        (share_of, 0.3, lambda: torch.rand(40) < 0.3),
    ):
        intervals = [of(draw()) for _ in range(1000)]
        covered = sum(m.low <= truth <= m.high for m in intervals) / 1000
        assert 0.92 <= covered <= 0.985, (of, covered)
    assert Estimate.median(torch.zeros(0)).n == share_of(torch.zeros(0).bool()).n == 0


def test_rank_correlation_leaves_out_what_is_not_finite_and_says_nothing_of_a_constant():
    x, nan = torch.tensor([1.0, 2.0, 3.0, torch.nan]), torch.nan
    assert rank_correlation(x, torch.tensor([3.0, 2.0, 1.0, 9.0])) == pytest.approx(-1)
    assert rank_correlation(x, torch.tensor([1.0, 1.0, 1.0, nan])) != 0  # nan


def test_passes_in_float64_are_those_of_the_network():
    model, splits = fitted()
    x, y = splits.test.images[:8], splits.test.labels[:8]
    exact = in_float64(model)
    at = at_head(exact, x.double(), y)
    torch.testing.assert_close(at.logits, exact(x.double()), rtol=1e-12, atol=1e-12)
    recomputed = at.features @ at.weight.T + exact[-1].bias
    torch.testing.assert_close(recomputed, at.logits, rtol=1e-12, atol=1e-12)
    assert next(model.parameters()).dtype == torch.float32
    confident = AtHead(at.features, 40 * at.logits, at.labels, at.weight)
    assert bool((confident.uncertainty > 0).all())  # 1 - max(p) would be 0 for some


def test_models_and_random_streams_are_left_as_they_were():
    model, _ = fitted()
    on, claim = trained(samples=24), ScaledHead(samples=8, factors=(1, 10))
    before, stream = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    for judge in (claim, ClosedForm(samples=4), LocalBound(samples=4), LabelBlind(samples=8)):
        judge(on)
    assert torch.equal(stream, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_some_of_the_evaluated_images_are_taken_and_the_seed_chooses():
    few = replace(trained(samples=24), evaluation=replace(trained().evaluation, indices=[3, 5, 8]))
    model, splits = fitted()
    assert few.indices(9) == [3, 5, 8] and set(few.indices(2)) < {3, 5, 8}
    stored = ImageArrays((255 * splits.test.images).to(torch.uint8), splits.test.labels)
    few = replace(few, splits=splits._replace(test=stored))
    inputs, labels = few.test_batch(9, in_float64(model))
    assert inputs.dtype == torch.float64 and torch.equal(labels, splits.test.labels[[3, 5, 8]])
    torch.testing.assert_close(inputs, splits.test.images[[3, 5, 8]].double(), rtol=0, atol=1 / 255)


def test_a_result_reads_back_and_its_figure_is_drawn(tmp_path):
    claim = ClosedForm(samples=24)
    result = claim(trained())
    write_claim(claim, result, tmp_path)
    written = (tmp_path / "claim.json").read_text()
    assert TypeAdapter(ClaimResult).validate_json(written) == result
    assert json.loads(written)["verdict"] == result.verdict
    assert f"# ClosedForm: {result.verdict}" in (tmp_path / "claim.md").read_text()
    assert (tmp_path / "figures" / "claim.png").stat().st_size > 10_000
    assert max(map(len, claim_text(result).splitlines())) <= 100


# --- closed form


def test_the_closed_form_is_the_hessian():
    result = ClosedForm(samples=48)(trained())
    assert result.verdict == "reproduced", failed(result)
    arm = result.arrays["plain"]
    assert 0 < result.numbers["plain"]["largest difference"].value < 1e-9
    assert len(arm["closed"]) == 48 and min(arm["hessian"]) > 0


def test_the_hessian_it_is_held_against_is_the_definition():
    model, splits = fitted()
    exact = in_float64(model)
    at = at_head(exact, splits.test.images[:3].double(), splits.test.labels[:3])
    oracle = [
        relative_flatness_by_hessian(phi, at.weight, exact[-1].bias.detach(), y)
        for phi, y in zip(at.features, at.labels, strict=True)
    ]
    torch.testing.assert_close(
        closed_form.kappa_by_hessian(at), torch.stack(oracle), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("wrong", [1 + 1e-8, 2.0])
def test_another_closed_form_is_not_reproduced(monkeypatch, wrong):
    kappa = AtHead.kappa
    monkeypatch.setattr(AtHead, "kappa", lambda self, scale=1.0: wrong * kappa(self, scale))
    assert ClosedForm(samples=48)(trained()).verdict == "not reproduced"


def test_too_few_samples_decide_nothing():
    assert ClosedForm(samples=8)(trained()).verdict == "not reproduced"


# --- local bound


def test_the_local_bound_holds_and_is_local():
    result = LocalBound(samples=64)(trained({"sure": scaled(4)}))
    assert result.verdict == "reproduced", failed(result)
    numbers = result.numbers["sure"]
    assert numbers["violations"].value == 0 and numbers["violations"].n > 5000
    assert numbers["global bound certifies, R*"].value > numbers["local bound certifies, R*"].value


def test_a_bound_that_is_violated_is_not_reproduced(monkeypatch):
    curve = local_bound.bound_curve

    def lower(*arguments):
        found = curve(*arguments)
        return replace(found, local_bound=found.worst_loss * (1 - 1e-9))

    monkeypatch.setattr(local_bound, "bound_curve", lower)
    result = LocalBound(samples=64)(trained({"sure": scaled(4)}))
    assert result.verdict == "not reproduced"
    assert [c.split(",")[0] for c in failed(result)] == ["no violation beyond a rounding of 1e-12"]


def test_a_bound_that_serves_up_to_the_flip_is_not_local():
    model, splits = fitted()
    two = copy.deepcopy(model)  # of two classes and faint: the loss hardly curves up to the tie
    two[-1] = nn.Linear(32, 2)
    with torch.no_grad():
        two[-1].weight.copy_(0.02 * model[-1].weight[:2])
        two[-1].bias.copy_(0.02 * model[-1].bias[:2])
        labels = two(splits.test.images).argmax(1)
    data = splits._replace(test=ImageArrays(splits.test.images, labels))
    result = LocalBound(samples=64)(replace(trained(), models={"faint": two}, splits=data))
    assert [c.split(" ")[0] for c in failed(result)] == ["certifies"]
    assert result.numbers["faint"]["local bound certifies, R*"].value > 0.9


def test_the_certified_radius_is_where_the_bound_reaches_log_2():
    model, splits = fitted()
    at = at_head(in_float64(model), splits.test.images[:64].double(), splits.test.labels[:64])
    at = at.rows(at.right & (at.uncertainty < 0.5))
    own = local_bound.feature_radius(at.logits, at.labels, at.weight)
    share = local_bound.certified(at, own, "local_bound")
    value = local_bound.local_bound(at.logits, at.labels, at.weight, share * own)
    torch.testing.assert_close(value, torch.full_like(value, 0.6931471805599453))


# --- uncanny valley


def test_the_valley_is_there_and_a_mirrored_one_is_not(monkeypatch):
    result = UncannyValley(samples=64, reach=3)(trained())
    assert result.verdict == "reproduced", failed(result)
    assert set(result.subjects()) == {"plain, as it is", "plain, matched"}
    path = uncanny_valley.attack_path

    def upside_down(*arguments, **settings):
        found = path(*arguments, **settings)
        return replace(found, relative_flatness=1 / found.relative_flatness)

    monkeypatch.setattr(uncanny_valley, "attack_path", upside_down)
    result = UncannyValley(samples=64, reach=3)(trained())
    assert result.verdict == "partly"
    assert result.subjects() == {"plain, as it is": False, "plain, matched": True}


def test_paths_that_do_not_flip_decide_nothing():
    result = UncannyValley(samples=64, reach=1)(trained(eps=1e-4))
    assert result.verdict == "not reproduced"
    assert failed(result) == ["20 paths that flip, or more"] * 2


# --- label blind


def test_flatness_knows_no_label():
    result = LabelBlind()(trained(samples=192))
    assert result.verdict == "reproduced", failed(result)
    assert result.numbers["plain"]["ratio, wrong"].n >= 20


def test_a_flatness_that_knows_the_label_is_not_reproduced(monkeypatch):
    kappa = AtHead.kappa
    monkeypatch.setattr(
        AtHead,
        "kappa",
        lambda self, scale=1.0: kappa(self, scale) * torch.where(self.right, 1.0, 4.0),
    )
    result = LabelBlind()(trained(samples=192))
    assert result.verdict == "not reproduced"
    assert result.numbers["plain"]["ratio, wrong"].value > 2


def test_ratios_compare_like_confidence_only():
    weight, n = torch.eye(2).double(), 40
    gaps = torch.linspace(1, 9, n).double()
    logits = torch.stack([gaps, torch.zeros(n)], 1).double()
    right = AtHead(torch.ones(n, 2).double(), logits, torch.zeros(n).long(), weight)
    tripled = replace(right, features=3**0.5 * right.features)
    ratio = label_blind.ratios(tripled, tripled.kappa(), right, right.kappa())
    torch.testing.assert_close(ratio[10:-10], torch.full_like(ratio, 3.0)[10:-10], rtol=0.1, atol=0)
    far = replace(right, logits=logits + torch.tensor([30.0, 0.0]))
    assert bool(label_blind.ratios(far, far.kappa(), right, right.kappa()).isnan().all())


# --- scaled head


def test_a_scaled_head_is_flatter_looks_robust_and_is_not():
    result = ScaledHead(samples=60)(trained(eps=0.1))
    assert result.verdict == "reproduced", failed(result)
    numbers = result.numbers["plain"]
    assert numbers["cascade, x1"] == numbers["cascade, x1000"]
    assert numbers["PGD on plain cross-entropy, x1000"].value > 0.9


def test_a_cascade_on_plain_cross_entropy_moves_verdicts(monkeypatch):
    plain = scaled_head.PLAIN["PGD on plain cross-entropy"]
    monkeypatch.setattr(scaled_head, "stages_of", lambda _: plain)
    result = ScaledHead(samples=60)(trained(eps=0.1))
    assert result.verdict == "not reproduced"
    assert failed(result) == ["no verdict of the cascade changes"]


def test_factors_that_do_nothing_are_not_reproduced():
    result = ScaledHead(samples=60, factors=(1, 2))(trained(eps=0.1))
    assert [c.split(" ")[0] for c in failed(result)] == ["kappa", "PGD", "APGD"]


# --- beyond flatness


def stub(base, attacked, clean=90):
    """An evaluation of 100 samples with so many survivors."""
    verdicts = [-1] * attacked + [0] * (clean - attacked) + [-2] * (100 - clean)
    accuracy = Estimate.share(attacked, 100)
    return replace(base, verdicts=verdicts, attacked=accuracy, n=100, indices=list(range(100)))


@pytest.fixture
def survivors_of(monkeypatch):
    """Judge three arms, plain, flat and curved, of which so many samples of 100 survive."""

    def judged(survivors, factors=(1.0, 100.0, 0.3)):
        models = dict(zip(("plain", "flat", "curved"), map(scaled, factors), strict=True))
        on = replace(trained(samples=100), models=models)
        runs = iter(stub(on.evaluation, n) for n in survivors)
        monkeypatch.setattr(Trained, "evaluate", lambda *_: next(runs))
        return CLAIM(on)

    return judged


CLAIM = BeyondFlatness(flat=("flat",), curved=("curved",), manifold=IdentityManifold())


@pytest.mark.parametrize(
    ("survivors", "part", "holds"),
    [
        ((5, 5, 60), beyond_flatness.FLAT, True),
        ((5, 50, 60), beyond_flatness.FLAT, False),  # flatness alone would do
        ((5, 5, 10), beyond_flatness.OFF, False),  # five points are no rise
        ((5, 5, 60), beyond_flatness.OFF, True),
    ],
)
def test_flatness_and_curvature_are_told_apart(survivors_of, survivors, part, holds):
    result = survivors_of(survivors)
    assert result.subjects()[part] is holds, failed(result)


def test_an_arm_that_is_not_flatter_says_nothing_of_flatness(survivors_of):
    result = survivors_of((5, 5, 60), factors=(1.0, 1.0, 1.0))
    assert not result.subjects()[beyond_flatness.FLAT]
    assert any("kappa below" in criterion for criterion in failed(result))


def bent(*values):
    """In place of `losses_off`: losses of these curvatures at the image and three radii out."""
    left = iter(values)

    def losses(*_):
        near, far = next(left)
        way = [near, 0, 0, 0, 0, *(far * step for step in range(1, 6))]  # at -1, 0, ..., 8 radii
        return torch.tensor(way).expand(50, 10), torch.ones(50)

    return losses


@pytest.mark.parametrize(("survivors", "holds"), [((5, 3, 60), False), ((5, 60, 3), True)])
@pytest.mark.parametrize("far", [False, True])
def test_the_direction_of_the_correlation_is_judged(
    monkeypatch, survivors_of, survivors, holds, far
):
    values = [(1.0 if far else c, c if far else 1.0) for c in (2.0, 3.0, 1.0)]
    monkeypatch.setattr(beyond_flatness, "losses_off", bent(*values))
    result = survivors_of(survivors)
    assert result.subjects()[beyond_flatness.FURTHER if far else beyond_flatness.SHARP] is holds
    assert not result.subjects()[beyond_flatness.SHARP if far else beyond_flatness.FURTHER]
    name = "curvature off, 3 radii out" if far else "curvature off"
    assert [n[name].value for n in result.numbers.values()] == [2.0, 3.0, 1.0]
    if far:
        return
    assert result.subjects()[beyond_flatness.CLOSER]  # kappa* of a scaled head is one number


def test_kappa_may_go_with_attacked_accuracy_more_closely(monkeypatch, survivors_of):
    sharper = iter([1.0, 2.0, 3.0])
    kappa = AtHead.kappa

    def flatness(self, scale=1.0):
        return kappa(self, scale) if scale == 1 else torch.full((len(self.labels),), next(sharper))

    monkeypatch.setattr(beyond_flatness, "losses_off", bent((1.0, 0.0), (3.0, 0.0), (2.0, 0.0)))
    monkeypatch.setattr(AtHead, "kappa", flatness)
    assert not survivors_of((5, 20, 60)).subjects()[beyond_flatness.CLOSER]


def test_bends_are_those_of_a_quadratic_and_split_by_the_manifold():
    class Quadratic(nn.Module):  # two classes, loss log(1 + exp(-z)), z = |x|^2
        def forward(self, x):
            z = x.flatten(1).square().sum(1, keepdim=True)
            return torch.cat([z, torch.zeros_like(z)], 1)

    class FirstPixel:
        def split(self, inputs, vectors):
            tangent = torch.zeros_like(vectors)
            tangent[..., 0] = vectors[..., 0]
            return tangent, vectors - tangent

    x, y = torch.rand(6, 1, 1, 4, dtype=torch.float64), torch.zeros(6).long()
    losses, on = beyond_flatness.losses_off(Quadratic(), x, y, FirstPixel(), 1e-3, 1.0)
    off = losses[:, 2] - 2 * losses[:, 1] + losses[:, 0]

    def loss(flat):
        return nn.functional.softplus(-flat.square().sum())

    for row in range(6):
        hessian = torch.autograd.functional.hessian(loss, x[row].flatten())
        move = 1e-3 * torch.tensor([1.0, 1, 1, 1]).double()  # the sign of the gradient, up to -1
        rest = move * torch.tensor([0, 1, 1, 1])
        assert off[row] == pytest.approx(float(rest @ hessian @ rest), rel=1e-3)
        assert on[row] == pytest.approx(float(1e-6 * hessian[0, 0]), rel=1e-3)
        way = [loss(x[row].flatten() - t * rest) for t in range(-1, 9)]  # g points inwards
        torch.testing.assert_close(losses[row], torch.stack(way), rtol=1e-9, atol=0)


# --- figures


def test_every_figure_is_drawn(tmp_path, survivors_of):
    two = trained({"plain": fitted()[0], "faint": scaled(0.3)}, eps=0.2)
    claims = [
        LocalBound(samples=32),
        UncannyValley(samples=32, reach=2),
        LabelBlind(),
        ScaledHead(samples=24, factors=(1, 1000)),
    ]
    results = [(claim, claim(two)) for claim in claims] + [(CLAIM, survivors_of((5, 5, 60)))]
    for claim, result in results:
        write_claim(claim, result, tmp_path)
        assert claim.caption.endswith(".") and claim.statement.endswith(".")
        assert (tmp_path / "figures" / "claim.png").stat().st_size > 10_000
        (tmp_path / "figures" / "claim.png").unlink()


# --- the scripts

TINY = [
    "data.limit=200",
    "data.test_limit=60",
    "model.name=test_vit",
    "model.args={img_size: 32, embed_dim: 32, depth: 1}",
    "epochs=1",
    "optimizer.warmup_epochs=0",
    "evaluation.samples=30",
    "variants={}",
]
SCRIPTS = {
    "closed_form": ["samples=24"],
    "local_bound": ["samples=24"],
    "uncanny_valley": ["samples=24", "reach=2"],
    "label_blind": ["samples=30"],
    "scaled_head": ["samples=24", "factors=[1, 10]", "cascade=fast"],
    "beyond_flatness": [
        "samples=24",
        "cascade=fast",
        "flat=[plain]",
        "curved=[flatreg]",
        "manifold={kind: PCAManifold, rank: 4}",
    ],
}


def script(monkeypatch, name, *arguments):
    """Run a script as `python recipes/paper/NAME.py ARGUMENTS` does."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    runpy.run_path(str(PAPER / f"{name}.py"), run_name="__main__")


def test_every_claim_is_a_script_beside_its_recipe():
    recipes = {path.stem for path in PAPER.glob("*.yaml")}
    assert recipes == set(SCRIPTS) == {path.stem for path in PAPER.glob("*.py")} - {"claim"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_trains_its_recipe_and_judges_the_claim(name, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    script(monkeypatch, name, *TINY, *SCRIPTS[name])
    folder = tmp_path / "runs" / name
    result = TypeAdapter(ClaimResult).validate_json((folder / "claim.json").read_bytes())
    assert len(result.numbers) == 2 and next(iter(result.numbers)) == "plain, test_vit"
    assert all(title.endswith(", test_vit") for title in result.numbers)
    count = 30 if name == "label_blind" else 24
    assert result.setting == f"linf eps 0.1, {count} test images an arm, seed 0"
    out = capsys.readouterr().out
    verdict = f"{claim_text(result)}\nclaim     runs/{name}/claim.md\n"
    assert "upper bound" in out and out.endswith(verdict)
    assert (folder / "figures" / "claim.png").stat().st_size > 10_000
    assert f": {result.verdict}" in (folder / "claim.md").read_text()
    if name == "closed_form":
        assert result.verdict == "reproduced"
        check_that_it_is_judged_again_without_training(monkeypatch, folder, capsys, verdict)


def check_that_it_is_judged_again_without_training(monkeypatch, folder, capsys, verdict):
    with (folder / "recipe.yaml").open("a") as file:
        file.write("# a comment: the recipe is the same\n")
    (folder / "claim.json").unlink()
    script(monkeypatch, "closed_form", *TINY, *SCRIPTS["closed_form"])
    assert (folder / "claim.json").exists() and capsys.readouterr().out == verdict
    with pytest.raises(SystemExit, match="holds the run of another recipe"):
        script(monkeypatch, "closed_form", *TINY, "seed=1", f"output={folder}")
    files, samples = sorted(folder.rglob("*")), SCRIPTS["closed_form"]
    script(monkeypatch, "closed_form", *samples, f"run={folder}", "output=elsewhere")
    assert sorted(folder.rglob("*")) == files
    judged = (Path("elsewhere") / "claim.json").read_bytes()
    assert judged == (folder / "claim.json").read_bytes()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("beyond_flatness", ["flat=[a]"], "the recipe has no arm a$"),
        ("beyond_flatness", ["flat=[]"], "^flat: "),
        ("beyond_flatness", ["manifold={kind: Sphere}"], "^manifold: .*'PCAManifold'"),
        ("closed_form", ["sample=1"], "closed_form.yaml, sample=1: sample: "),
        ("closed_form", ["samples=0"], "^samples: "),
        ("closed_form", ["samples=["], "not YAML"),
        ("closed_form", ["run=runs/none"], "run=runs/none: .* finished run, found no report.json"),
        ("closed_form", ["run=.", "epochs=1"], "run=. is trained already: epochs=1 would change"),
        ("scaled_head", ["cascade=strong"], "^cascade: .*'short'"),
        ("uncanny_valley", ["reach=0.5"], "^reach: "),
    ],
)
def test_a_claim_that_cannot_be_judged_is_refused_before_training(
    monkeypatch, tmp_path, name, arguments, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message) as error:
        script(monkeypatch, name, *arguments)
    assert "\n" not in str(error.value) and not (tmp_path / "runs").exists()
