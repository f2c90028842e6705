"""Every claim on small trained networks: a case that reproduces, and cases that must not."""

import copy
import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from cases import images, small_net
from oracles import relative_flatness_by_hessian
from torch import nn

from flatreg import RecipeError, load_recipe
from flatreg.claims import (
    beyond_flatness,
    closed_form,
    label_blind,
    local_bound,
    scaled_head,
    uncanny_valley,
)
from flatreg.claims.at_head import AtHead, in_float64, pass_to_head
from flatreg.claims.beyond_flatness import BeyondFlatness
from flatreg.claims.closed_form import ClosedForm
from flatreg.claims.files import claim_text, read_claim, write_claim
from flatreg.claims.label_blind import LabelBlind
from flatreg.claims.local_bound import LocalBound
from flatreg.claims.result import Check, Trained, rank_correlation, share_of, verdict_of
from flatreg.claims.scaled_head import ScaledHead
from flatreg.claims.uncanny_valley import UncannyValley
from flatreg.data.images import ImageArrays, Splits
from flatreg.evaluation.evaluate import evaluate
from flatreg.measures.estimate import Estimate
from flatreg.measures.manifold import IdentityManifold
from flatreg.report.figures.claims import draw_claim
from flatreg.run.cli import main


@cache
def fitted():
    """`small_net` fitted to the brightest of five strips, and its 192 images."""
    x, _ = images(192)
    y = x[..., :15].reshape(192, 1, 16, 5, 3).mean((1, 2, 4)).argmax(1)
    model = small_net(batch_norm=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(260):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), Splits(ImageArrays(x, y), ImageArrays(x[:0], y[:0]), ImageArrays(x, y), 5)


def trained(models=None, samples=96, eps=0.1):
    model, splits = fitted()
    models = models or {"plain": model}
    evaluations = {
        name: evaluate(
            m, splits.test, eps=eps, attack="fast", samples=samples, diagnose=False, progress=False
        )
        for name, m in models.items()
    }
    return Trained(models, splits, evaluations)


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
    at = pass_to_head(exact, x.double(), y)
    torch.testing.assert_close(at.logits, exact(x.double()), rtol=1e-12, atol=1e-12)
    recomputed = at.features @ at.weight.T + exact[-1].bias
    torch.testing.assert_close(recomputed, at.logits, rtol=1e-12, atol=1e-12)
    assert next(model.parameters()).dtype == torch.float32
    confident = AtHead(at.features, 40 * at.logits, at.labels, at.weight)
    assert bool((confident.uncertainty > 0).all())  # 1 - max(p) would be 0 for some


def test_models_and_random_streams_are_left_as_they_were():
    model, _ = fitted()
    model.train()
    before, stream = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    ClosedForm(samples=4)(trained(samples=8))
    assert model.training and torch.equal(stream, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()


def test_a_result_reads_back_and_its_figure_is_drawn(tmp_path):
    result = ClosedForm(samples=24)(trained())
    caption = draw_claim(result, tmp_path / "figures" / "claim.png")
    write_claim(result, tmp_path, caption)
    assert read_claim(tmp_path) == result
    assert json.loads((tmp_path / "claim.json").read_text())["verdict"] == result.verdict
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
    at = pass_to_head(exact, splits.test.images[:3].double(), splits.test.labels[:3])
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
    at = pass_to_head(in_float64(model), splits.test.images[:64].double(), splits.test.labels[:64])
    at = at.rows(at.right & (at.uncertainty < 0.5))
    own = local_bound.feature_radius(at.logits, at.labels, at.weight)
    share = local_bound._certified(at, own, "local_bound")
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
    ratio = label_blind._ratios(tripled, tripled.kappa(), right, right.kappa())
    torch.testing.assert_close(ratio[10:-10], torch.full_like(ratio, 3.0)[10:-10], rtol=0.1, atol=0)
    far = replace(right, logits=logits + torch.tensor([30.0, 0.0]))
    assert bool(label_blind._ratios(far, far.kappa(), right, right.kappa()).isnan().all())


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
        base = trained(samples=100).threat
        runs = iter(stub(base, n) for n in survivors)
        monkeypatch.setattr(beyond_flatness, "evaluated", lambda *_: next(runs))
        return CLAIM(replace(trained(samples=100), models=models))

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
    results = [
        LocalBound(samples=32)(two),
        UncannyValley(samples=32)(two),
        LabelBlind()(two),
        ScaledHead(samples=24, factors=(1, 1000))(two),
        survivors_of((5, 5, 60)),
    ]
    for result in results:
        path = tmp_path / f"{result.kind}.png"
        assert draw_claim(result, path).endswith(".") and path.stat().st_size > 10_000


# --- recipes

RECIPE = """
data: {kind: digits, limit: 200, test_limit: 60}
model: {name: test_vit, args: {img_size: 32, embed_dim: 32, depth: 1}, mean: [0.5], std: [0.5]}
optimizer: {lr: 3.0e-3}
epochs: 1
evaluation: {eps: 0.05, samples: 30, attack: fast}
claim: {kind: ClosedForm, samples: 24}
"""


def test_a_run_judges_the_claim_of_its_recipe(tmp_path, capsys):
    (tmp_path / "small.yaml").write_text(RECIPE)
    assert main(["run", str(tmp_path / "small.yaml"), f"output={tmp_path / 'run'}"]) == 0
    result = read_claim(tmp_path / "run")
    assert result.verdict == "reproduced" and list(result.numbers) == ["flatreg, test_vit"]
    assert f"claim     ClosedForm: {result.verdict}" in capsys.readouterr().out
    assert (tmp_path / "run" / "figures" / "claim.png").exists()
    assert (tmp_path / "run" / "claim.md").exists()


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ("{kind: BeyondFlatness, flat: [a], curved: [flatreg], plain: flatreg}", "the arm 'a'"),
        ("{kind: BeyondFlatness, flat: [], curved: [flatreg]}", "claim.flat"),
        ("{kind: Flatness}", "claim: .*'ClosedForm'"),
        ("{kind: ClosedForm, sample: 1}", "claim.sample"),
    ],
)
def test_a_claim_that_cannot_be_judged_is_refused_before_training(tmp_path, claim, message):
    (tmp_path / "small.yaml").write_text(RECIPE)
    with pytest.raises(RecipeError, match=message) as error:
        load_recipe(tmp_path / "small.yaml", [f"claim={claim}"])
    assert "\n" not in str(error.value)
