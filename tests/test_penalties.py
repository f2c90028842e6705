"""Every penalty in every loop it can meet: gradient, BatchNorm, bf16, compile, schedules."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import PENALTIES, images, small_net
from pydantic import TypeAdapter
from torch import nn

from flatreg import (
    NFGSM,
    SAM,
    CrossEntropy,
    EpsWarmUp,
    GradAlign,
    InputGradient,
    JacobianNorm,
    LayerFlatness,
    LocalLinearity,
    MarginBound,
    Objective,
    OffManifoldConfidence,
    OffManifoldCurvature,
    PCAManifold,
    RelativeFlatness,
    WarmUp,
    backward,
    relative_flatness,
    with_normalization,
)
from flatreg.terms import Penalty
from flatreg.terms.protocol import (
    Adversary,
    DifferentiatesTwice,
    Scheduled,
    Term,
    WantsSmoothActivations,
    scheduled,
)

FORWARD_ONLY = [p for p in PENALTIES if "double_backward" not in p.requires]
TWICE = [p for p in PENALTIES if "double_backward" in p.requires]


def name(penalty):
    settings = [getattr(penalty, key, "") for key in ("estimator", "method", "subtract_curvature")]
    return "-".join([penalty.kind, *(str(s) for s in settings if s)])


class Nothing:
    """A criterion that leaves the penalty alone."""

    requires = frozenset({"clean"})

    def __call__(self, passes):
        return 0 * passes["clean"].logits.sum(1)


def test_what_a_penalty_does_is_told_by_its_protocols():
    for penalty in PENALTIES:
        assert isinstance(penalty, Term) and not isinstance(penalty, Adversary)
        assert isinstance(penalty, Scheduled) and scheduled(penalty, 0.5) is penalty
    assert all(isinstance(p, DifferentiatesTwice) and p.forward_only for p in TWICE)
    smooth = {p.kind for p in PENALTIES if isinstance(p, WantsSmoothActivations)}
    assert smooth == {"OffManifoldCurvature"}
    assert isinstance(Nothing(), Term) and not isinstance(Nothing(), Scheduled)


def alone(model, penalty, x, y, seed=1):
    torch.manual_seed(seed)
    return Objective(model, Nothing(), [penalty])(x, y).total


def gradient(model, loss):
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = zip(parameters, found, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs])


def test_the_table_has_every_kind():
    kinds = {p["$ref"].split("/")[-1] for p in TypeAdapter(Penalty).json_schema()["oneOf"]}
    assert {p.kind for p in PENALTIES} == kinds


@pytest.mark.parametrize("penalty", PENALTIES, ids=name)
def test_every_penalty_falls_under_its_own_gradient(penalty):
    model, (x, y) = small_net(dtype=torch.float64).eval(), images()
    x = x.double()
    before = alone(model, penalty, x, y)
    slope = gradient(model, before)
    assert before.item() > 0 and float(slope.abs().sum()) > 0
    step = 1e-8 * before.item() / float(slope.square().sum())  # sign(grad) must not flip a pixel
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(flat - step * slope, model.parameters())
    fall = (before - alone(model, penalty, x, y)).item() / before.item()
    assert fall == pytest.approx(1e-8, rel=0.02)


@pytest.mark.parametrize("penalty", PENALTIES, ids=name)
def test_batch_norm_moves_by_the_main_pass_alone(penalty):
    model, reference, (x, y) = small_net().train(), small_net().train(), images()
    if penalty.kind == "LayerFlatness" and penalty in TWICE:
        with pytest.raises(
            ValueError, match=r"(batch_norm does not support 3rd|autograd has a wrong one).*: .*use"
        ):
            alone(model, penalty, x, y)
        return
    alone(model, penalty, x, y).backward()
    reference(x)
    for key, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, reference.get_buffer(key))


@pytest.mark.parametrize("penalty", PENALTIES, ids=name)
def test_it_scales_with_its_strength(penalty):
    model, (x, y) = small_net(dtype=torch.float64).eval(), images()
    x = x.double()
    none, one, three = (alone(model, replace(penalty, strength=s), x, y) for s in (0, 1, 3))
    torch.testing.assert_close(3 * one, three)
    assert none.item() == 0


@pytest.mark.parametrize("penalty", PENALTIES, ids=name)
def test_in_bfloat16_it_is_finite_and_near_float32(penalty):
    model, (x, y) = small_net(batch_norm=False).eval(), images(32)
    full = alone(model, penalty, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        half = alone(model, penalty, x, y)
    half.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
    assert half.dtype == torch.float32
    if not (penalty.kind == "OffManifoldCurvature" or penalty.kind == "LocalLinearity"):
        assert half.item() == pytest.approx(
            full.item(), rel=0.1
        )  # second order: below its rounding


@pytest.mark.parametrize("penalty", FORWARD_ONLY, ids=name)
def test_compiled_it_is_the_same(penalty):
    torch._dynamo.reset()
    model, (x, y) = small_net().eval(), images()
    compiled = torch.compile(model, backend="aot_eager")
    expected = gradient(model, alone(model, penalty, x, y))
    for _ in range(2):
        got = gradient(model, alone(compiled, penalty, x, y))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("penalty", TWICE, ids=name)
def test_double_backward_is_refused_where_it_cannot_run(penalty):
    model, (x, y) = small_net(), images()
    for broken in (torch.compile(model, backend="aot_eager"), nn.Sequential(model)):
        if isinstance(broken, nn.Sequential):
            broken.compile(backend="aot_eager")
        with pytest.raises(
            ValueError, match=r"torch\.compile has no second derivative: use"
        ) as error:
            alone(broken, penalty, x, y)
        assert penalty.forward_only in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("penalty", TWICE, ids=name)
def test_an_operator_without_a_second_derivative_is_named(penalty):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.Hardsigmoid(), nn.Linear(8, 5))
    with pytest.raises(ValueError, match=r"hardsigmoid.*: use"):
        alone(model, penalty, *images())


@pytest.fixture
def process_group(tmp_path):
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_sharded_by_fsdp2_it_is_the_same_or_refused(process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, (x, y) = init_device_mesh("cpu", (1,)), images()
    for penalty in PENALTIES:
        model = fully_shard(small_net(), mesh=mesh)
        if penalty in TWICE or "weights" in penalty.requires:
            with pytest.raises(ValueError, match="FSDP2") as error:
                alone(model, penalty, x, y)
            assert "\n" not in str(error.value)
            continue
        alone(model, penalty, x, y).backward()
        got = torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()])
        plain = small_net()
        torch.testing.assert_close(got, gradient(plain, alone(plain, penalty, x, y)))


def test_frozen_weights_that_fsdp2_gathers_anew_have_not_moved(process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, (x, y) = small_net(), images()
    model[0].requires_grad_(False)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05)
    with torch.no_grad():
        model(x)  # leaves the weights gathered
    late = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05)
    for _ in range(2):
        backward(optimizer, lambda: F.cross_entropy(model(x), y), model=model)
        optimizer.step()
        optimizer.zero_grad()
    # One made of gathered weights would train nothing. "raises" would print what is freed by now.
    told = ""
    try:
        backward(late, lambda: F.cross_entropy(model(x), y), model=model)
    except ValueError as error:
        told = str(error)
    assert told.startswith("the optimizer got no gradient")


def test_the_head_is_perturbed_alike_behind_a_normalisation_around_what_fsdp2_shards(process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    (x, y), losses = images(), []
    for mesh in (None, init_device_mesh("cpu", (1,))):
        inner = small_net()
        if mesh:
            fully_shard(inner, mesh=mesh)
        objective = Objective(with_normalization(inner, [0.5], [0.5]))
        optimizer = SAM(torch.optim.SGD(inner.parameters(), lr=0.1), rho=0.5, scope=inner[-1])
        for _ in range(3):
            losses.append(backward(optimizer, objective.bind(x, y)).total)
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(losses[:3], losses[3:])


@pytest.mark.parametrize("penalty", [p for p in PENALTIES if "features" in p.requires], ids=name)
def test_a_head_that_fsdp2_shards_by_itself_is_refused(process_group, penalty):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = small_net(), init_device_mesh("cpu", (1,))
    fully_shard(model[-1], mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh)
    with pytest.raises(ValueError, match="the head '8' is sharded") as error:
        alone(model, penalty, *images())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("penalty", TWICE, ids=name)
def test_a_static_graph_of_ddp_refuses_double_backward(process_group, penalty):
    model = nn.parallel.DistributedDataParallel(small_net(), static_graph=True)
    with pytest.raises(ValueError, match="silently wrong: use") as error:
        alone(model, penalty, *images())
    assert penalty.forward_only in str(error.value)


def test_fused_attention_is_differentiated_twice():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Linear(16, 16), nn.Linear(16, 5)

        def forward(self, x):
            tokens = self.embed(x[:, 0])[:, None]
            return self.head(F.scaled_dot_product_attention(tokens, tokens, tokens).mean((1, 2)))

    for penalty in TWICE:
        alone(Attention(), penalty, *images()).backward()


# Finite differences and double backward


@pytest.mark.parametrize(
    "penalty",
    [
        InputGradient(eps=0.05, step=0.1),
        InputGradient(eps=0.05, step=0.1, norm="l2"),
        MarginBound(eps=0.05, step=0.1),
        LocalLinearity(eps=0.05),
        LayerFlatness(),
    ],
    ids=name,
)
def test_both_methods_agree_in_value_and_gradient(penalty):
    model, (x, y) = small_net(dtype=torch.float64).eval(), images()
    x = 0.2 + 0.6 * x.double()  # away from the box, which the exact slope does not see
    near, exact = (
        alone(model, replace(penalty, method=method), x, y)
        for method in ("finite_difference", "double_backward")
    )
    # a tenth of the gap is in the slope that LocalLinearity differences over a tenth of delta
    share = 0.9 if isinstance(penalty, LocalLinearity) else 1.0
    assert near.item() == pytest.approx(share * exact.item(), rel=0.05)
    cosine = F.cosine_similarity(gradient(model, near), gradient(model, exact), dim=0)
    assert float(cosine) > 0.99


def test_the_slope_is_never_a_reward():
    """A loss that falls along its own gradient, as one does where batch statistics differ."""

    class Falling(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            at = x.flatten(1).sum(1)
            margin = self.scale * (torch.sin(40 * at) - 3)  # swings back within the step
            return torch.stack([margin, -margin], 1)

    x, y = torch.full((1, 1, 1, 1), 0.5), torch.zeros(1, dtype=torch.long)
    eps = [0.02 * k for k in range(1, 10)]
    values = [alone(Falling(), InputGradient(eps=e, step=1.0), x, y).item() for e in eps]
    assert min(values) == 0 < max(values)


def test_jacobian_norm_has_one_mean_either_way():
    model, (x, y) = small_net(dtype=torch.float64).eval(), images(2)
    x = x.double()
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x).sum(0), x)
    exact = 0.01**2 * float(jacobian.square().sum()) / 2
    for method in ("finite_difference", "double_backward"):
        penalty = JacobianNorm(eps=0.01, method=method)
        draws = torch.stack([alone(model, penalty, x, y, seed) for seed in range(300)]).detach()
        error = float(draws.std()) / 300**0.5
        assert abs(float(draws.mean()) - exact) < 4 * error < exact


# What each one measures


def test_relative_flatness_is_kappa_over_its_width():
    model, (x, y) = small_net().eval(), images()
    kappa = relative_flatness(model[:-1](x), model(x), model[-1].weight)
    torch.testing.assert_close(
        alone(model, RelativeFlatness(strength=0.3), x, y), 0.3 * kappa.mean() / 32
    )


def test_layer_flatness_of_the_head_is_relative_flatness_on_average():
    model, (x, y) = small_net(dtype=torch.float64).eval(), images()
    x = x.double()
    exact = alone(model, RelativeFlatness(), x, y).item()
    penalty = LayerFlatness(layers=("8",))
    draws = torch.stack([alone(model, penalty, x, y, seed) for seed in range(200)]).detach()
    error = float(draws.std()) / 200**0.5
    assert abs(float(draws.mean()) - exact) < 4 * error < exact


def test_a_fraction_of_the_batch_has_the_mean_of_the_whole():
    model, (x, y) = small_net(dtype=torch.float64).eval(), images()
    x = x.double()
    whole = alone(model, OffManifoldCurvature(eps=0.1), x, y).item()
    half = OffManifoldCurvature(eps=0.1, fraction=0.5)
    draws = torch.stack([alone(model, half, x, y, seed) for seed in range(70)]).detach()
    error = float(draws.std()) / 70**0.5
    assert 0 < error and abs(float(draws.mean()) - whole) < 4 * error


def test_curvature_along_the_manifold_costs_nothing():
    """A loss that is curved in two pixels only, and these two are what varies in the data."""
    torch.manual_seed(0)
    data = torch.zeros(64, 1, 4, 4, dtype=torch.float64)
    data[:, 0, 0, :2] = torch.rand(64, 2)
    manifold = PCAManifold(rank=2).fit(data)

    class Curved(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(-9, 9, 10).double().reshape(2, 5).sin())

        def forward(self, x):
            return 10 * (x[:, 0, 0, :2].square() @ self.weight)

    x, y = data[:8], torch.arange(8) % 5
    for estimator in ("second_difference", "chord", "elle", "fisher", "gradient_difference"):
        penalty = OffManifoldCurvature(eps=0.1, estimator=estimator)
        off = alone(Curved(), replace(penalty, manifold=manifold), x, y)
        assert off.item() < 1e-12 < 1e-6 < alone(Curved(), penalty, x, y).item()


def test_confidence_off_the_manifold_is_penalised_until_it_is_as_curved_as_the_data():
    model, (x, y) = small_net().eval(), images()
    kappa = relative_flatness(model[:-1](x), model(x), model[-1].weight).mean()
    at = lambda floor: alone(model, OffManifoldConfidence(eps=0.01, floor=floor), x, y)  # noqa: E731
    assert at(kappa.item() / 10).item() == 0 < at(kappa.item() * 10).item()
    with torch.no_grad():
        model[-1].weight *= 1e3  # kappa itself has underflowed: no gradient would be left
    assert float(gradient(model, at(1.0)).norm()) > 0


# Schedules and configuration


def test_a_warm_up_raises_the_strength_over_its_share_of_the_training():
    model, (x, y) = small_net().eval(), images()
    objective = Objective(
        model, None, [RelativeFlatness(strength=2, schedule=WarmUp(fraction=0.5))]
    )
    full = float(objective(x, y).parts["RelativeFlatness"])
    assert full > 0
    for progress, share in ((0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (1.0, 1.0), (1.01, 1.0)):
        objective.progress = progress
        assert float(objective(x, y).parts["RelativeFlatness"]) == pytest.approx(share * full)
    for progress in (3, -0.1, float("nan")):  # as a number of epochs, which NUAT would multiply by
        objective.progress = progress
        with pytest.raises(ValueError, match=r"^objective.progress: expected .*, got .*: write \("):
            objective(x, y)


def test_an_eps_warm_up_grows_the_ball_and_keeps_a_fitted_manifold():
    data = images(32)[0]
    penalty = InputGradient(
        eps=0.1, schedule=EpsWarmUp(fraction=0.5), manifold=PCAManifold(rank=2).fit(data)
    )
    half = penalty.schedule(penalty, 0.25)
    assert half.eps == pytest.approx(0.05) and half.strength == penalty.strength
    model, (x, y) = small_net().eval(), images()
    assert alone(model, half, x, y).item() < alone(model, penalty, x, y).item()
    assert penalty.schedule(penalty, 0.0).eps > 0


def test_penalties_are_their_own_configuration():
    adapter = TypeAdapter(Penalty)
    for penalty in PENALTIES:
        assert adapter.validate_python(adapter.dump_python(penalty, mode="json")) == penalty
    penalty = MarginBound(strength="1/2", eps="8/255")
    assert (penalty.strength, penalty.eps) == (0.5, 8 / 255)
    for bad in ({"eps": 8, "strength": 1}, {"eps": 0.1, "strength": -1}, {"strength": 1}):
        with pytest.raises(ValueError):
            MarginBound(**bad)
    with pytest.raises(ValueError, match="chord is squared"):
        OffManifoldCurvature(eps=0.1, estimator="chord", target=0.5)
    with pytest.raises(ValueError, match="fisher shares the clean pass"):
        OffManifoldCurvature(eps=0.1, estimator="fisher", fraction=0.5)
    with pytest.raises(ValueError):
        RelativeFlatness(schedule=EpsWarmUp(fraction=0.5))  # it has no ball


def test_second_difference_has_a_target_and_a_tolerance():
    model, (x, y) = small_net().eval(), images()
    at = lambda **k: alone(model, OffManifoldCurvature(eps=0.1, **k), x, y).item()  # noqa: E731
    assert at(tolerance=100) == 0
    assert at(target=5) == pytest.approx(5, abs=at() + 1e-6)


def test_at_attacked_reads_the_attacked_batch():
    model, (x, y) = small_net().eval(), images()
    for kind in (RelativeFlatness, LayerFlatness):
        values = []
        for at in ("clean", "attacked"):
            torch.manual_seed(0)
            loss = Objective(model, NFGSM(eps=0.3), [kind(at=at)])(x, y)
            values.append(float(loss.parts[kind.__name__]))
        assert values[0] != values[1]
    with pytest.raises(ValueError, match="reads the attacked batch, but CrossEntropy"):
        Objective(model, CrossEntropy(), [LayerFlatness(at="attacked")])


def test_grad_align_is_zero_on_a_linear_loss_only():
    class Affine(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(256, 2))

        def forward(self, x):
            return x.flatten(1) @ self.weight

    x, y = images()
    # cross-entropy of two classes: the gradient keeps its direction whatever its length
    assert alone(Affine(), GradAlign(eps=0.1), x, y % 2).item() == pytest.approx(0, abs=1e-5)
    assert alone(small_net().eval(), GradAlign(eps=0.3), x, y).item() > 1e-4


def test_a_kinked_network_is_told_of_once():
    x, y = images()
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.ReLU(), nn.Linear(8, 5))
    objective = Objective(model, None, [OffManifoldCurvature(eps=0.1)])
    with pytest.warns(UserWarning, match="kinks of this model's activations"):
        objective(x, y)
    objective(x, y)  # a second warning would be an error
    Objective(model, None, [MarginBound(eps=0.1)])(x, y)
