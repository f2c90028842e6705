from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import TRAINED_WITH_BATCH_NORM, images, small_net
from timm.loss import JsdCrossEntropy
from torch import nn

import flatreg
from flatreg import (
    APGDAT,
    FGSMRS,
    MART,
    NFGSM,
    PGDAT,
    TRADES,
    CrossEntropy,
    JacobianNorm,
    LayerFlatness,
    MarginBound,
    Objective,
    OffManifoldCurvature,
    RelativeFlatness,
    relative_flatness,
    with_normalization,
)


def test_total_is_the_mean_criterion_plus_penalty():
    model, (x, y) = small_net().eval(), images()
    loss = Objective(model, CrossEntropy(), [RelativeFlatness(strength=0.3)])(x, y)
    phi = model[:-1](x)
    expected = F.cross_entropy(model(x), y)
    expected = expected + 0.3 * relative_flatness(phi, model(x), model[-1].weight).mean() / 32
    torch.testing.assert_close(loss.total, expected)
    assert set(loss.parts) == {"CrossEntropy", "RelativeFlatness"}
    torch.testing.assert_close(sum(loss.parts.values()), loss.total.detach())


def test_strength_zero_is_the_criterion_alone():
    model, (x, y) = small_net().eval(), images()
    penalties = [
        RelativeFlatness(strength=0),
        MarginBound(strength=0, eps=0.1),
        OffManifoldCurvature(strength=0, eps=0.1),
    ]
    torch.testing.assert_close(
        Objective(model, None, penalties)(x, y).total, F.cross_entropy(model(x), y)
    )


ATTACKING = [
    NFGSM(eps=0.1),
    FGSMRS(eps=0.1),
    PGDAT(eps=0.1, steps=2),
    APGDAT(eps=0.1, steps=2),
    TRADES(eps=0.1, steps=2),
    MART(eps=0.1, steps=2),
]


@pytest.mark.parametrize("criterion", [CrossEntropy(), *ATTACKING])
def test_batch_norm_moves_by_the_main_pass_alone(criterion):
    """Inner attacks and the points a penalty adds leave every BatchNorm buffer as one pass does."""
    torch.manual_seed(0)
    model, (x, y) = small_net().train(), images()
    reference = small_net().train()
    penalties = TRAINED_WITH_BATCH_NORM if isinstance(criterion, CrossEntropy) else []
    bound = Objective(model, criterion, penalties).bind(x, y)
    bound()
    if bound.attacked is not None:
        reference(bound.attacked)
    if "clean" in criterion.requires:
        reference(x)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, reference.get_buffer(name))


@pytest.mark.parametrize("criterion", ATTACKING)
def test_a_bound_objective_attacks_once_and_within_its_bounds(criterion):
    torch.manual_seed(0)
    model, (x, y) = small_net(batch_norm=False), images()
    bound = Objective(model, criterion).bind(x, y)
    first, second = bound(), bound()
    assert torch.equal(first.total, second.total)
    radius = 3 * 0.1 if isinstance(criterion, NFGSM) else 0.1
    assert float((bound.attacked - x).abs().max()) <= radius + 1e-6
    assert 0 <= float(bound.attacked.min()) and float(bound.attacked.max()) <= 1
    assert first.total.item() > F.cross_entropy(model(x), y).item()
    assert all(p.grad is None for p in model.parameters())


def test_a_clean_criterion_with_an_attacked_penalty_is_refused_at_construction():
    with pytest.raises(ValueError, match="RelativeFlatness reads the attacked batch, but CrossEnt"):
        Objective(small_net(), CrossEntropy(), [RelativeFlatness(strength=1, at="attacked")])


def test_an_attacking_criterion_among_the_penalties_is_sent_to_its_place():
    with pytest.raises(ValueError, match=r"^NFGSM attacks .*: write Objective\(model, NFGSM\("):
        Objective(small_net(), penalties=[NFGSM(eps=0.1)])


def test_a_criterion_in_the_place_of_the_model_is_refused():
    with pytest.raises(TypeError, match=r"^expected a model, got NFGSM: write Objective\("):
        Objective(NFGSM(eps=0.1))


def test_a_loss_is_divided_and_multiplied_with_its_parts():
    """A loop that accumulates writes `lambda: objective(inputs, labels) / 4`."""
    loss = Objective(small_net(), penalties=[RelativeFlatness()])(*images())
    with pytest.raises(AttributeError, match=r"attribute 'backward': the tensor is loss.total$"):
        loss.backward()
    for quarter in (loss / 4, 0.25 * loss, loss * 0.25):
        assert torch.equal(quarter.total, loss.total / 4)
        assert quarter.parts == {name: part / 4 for name, part in loss.parts.items()}


def test_clean_and_attacked_terms_live_together():
    x, y = images()
    penalties = [RelativeFlatness(strength=0.1, at=at) for at in ("clean", "attacked")]
    loss = Objective(small_net(), NFGSM(eps=0.1), penalties)(x, y)
    assert list(loss.parts) == ["NFGSM", "RelativeFlatness.0", "RelativeFlatness.1"]


def test_only_terms_that_move_images_ask_for_the_unit_range():
    model, (x, y) = small_net(), images()
    Objective(model, None, [RelativeFlatness(strength=0.1)])(x * 4 - 2, y)
    with pytest.raises(ValueError, match=r"inputs must be images in \[0, 1\], got values from -2"):
        Objective(model, None, [MarginBound(strength=1, eps=0.1)])((x * 4 - 2), y)


def test_a_model_without_a_head_is_refused_in_one_line():
    model = nn.Sequential(nn.Conv2d(1, 5, 16), nn.Flatten())
    x, y = images()
    with pytest.raises(ValueError, match="no head found in Sequential"):
        Objective(model, None, [RelativeFlatness(strength=1)])(x, y)
    Objective(model, None, [MarginBound(strength=1, eps=0.1)])(x, y)  # reads no features


def test_a_refusal_for_want_of_a_head_names_what_needs_none():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.other = nn.Linear(256, 5), nn.Linear(256, 5)

        def forward(self, x):
            return self.head(x.flatten(1)) + 0.5 * self.other(x.flatten(1))

    model, (x, y) = TwoHeads(), images()
    with pytest.raises(ValueError, match=r"no head found.*: use what needs no head"):
        Objective(model, None, [RelativeFlatness(strength=1)])(x, y)
    Objective(model, None, [LayerFlatness(strength=1)])(x, y)


def test_a_term_of_ones_own():
    class Confidence:
        requires = frozenset({"clean"})

        def __call__(self, passes):
            return passes["clean"].logits.softmax(1).amax(1)

    x, y = images()
    assert "Confidence" in Objective(small_net(), None, [Confidence()])(x, y).parts


def test_a_criterion_checks_its_eps():
    with pytest.raises(ValueError, match="for 8 grey levels of 255 write 8/255"):
        NFGSM(eps=8)


def test_normalization_is_timms_or_given():
    import timm

    model = timm.create_model("test_convnext3", num_classes=3)
    wrapped = with_normalization(model)
    assert wrapped.normalize.mean.flatten().tolist() == pytest.approx(
        list(model.pretrained_cfg["mean"])
    )
    x = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(
        with_normalization(nn.Identity(), [0.5] * 3, [0.25] * 3)(x), 4 * x - 2
    )
    both = with_normalization(nn.Identity(), [0.5] * 3, [0.25] * 3)
    for channels in (1, 2, 4):  # one would be normalised three times, and have three channels
        with pytest.raises(ValueError, match=f"of 3 channels, as mean and std, got {channels}$"):
            both(torch.rand(2, channels, 4, 4))
    with pytest.raises(ValueError, match=r"got the shape \(2, 16\)$"):
        both(torch.rand(2, 16))
    alike = with_normalization(nn.Identity(), [0.5], [0.25])
    torch.testing.assert_close(alike(x), both(x))
    with pytest.raises(ValueError, match="carries no pretrained_cfg"):
        with_normalization(nn.Identity())
    with pytest.raises(ValueError, match="give both"):
        with_normalization(model, mean=[0.5])
    with pytest.raises(ValueError, match="std > 0"):
        with_normalization(model, [0.5], [0.0])
    grey = timm.create_model("test_resnet", in_chans=1)
    with pytest.raises(ValueError, match="takes 1 channels, its recorded mean and std have 3"):
        with_normalization(grey)
    with pytest.raises(ValueError, match=r"of images in \[0, 1\], got .*: divide by 255"):
        with_normalization(model, [123.7, 116.3, 103.5], [58.4, 57.1, 57.4])
    with pytest.raises(ValueError, match=r"normalises its images itself, .*: use it as it is$"):
        with_normalization(wrapped, [0.5] * 3, [0.5] * 3)
    with pytest.raises(TypeError, match=r"expected a model, as .*, got a str$"):
        with_normalization("test_resnet")
    for wrong in (0.5, [[0.5]], [0.5, float("nan")]):
        with pytest.raises(ValueError, match="one entry per channel"):
            with_normalization(model, wrong, wrong)


def test_a_mean_of_the_shape_of_an_image_is_refused_in_one_line():
    mean = torch.full((3, 1, 1), 0.5)
    with pytest.raises(ValueError, match="one entry per channel") as error:
        flatreg.with_normalization(small_net(), mean, mean)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [np.array, torch.tensor, tuple, lambda v: list(np.array(v))])
def test_normalization_is_in_the_precision_of_torch(kind):
    """numpy's float64 would make the images float64, which the model is not."""
    mean, std = [0.2, 0.4, 0.6], [0.1, 0.2, 0.3]
    wrapped = with_normalization(nn.Conv2d(3, 2, 1), kind(mean), kind(std))
    x = torch.rand(2, 3, 4, 4)
    by_hand = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(wrapped.normalize(x), by_hand)
    assert wrapped(x).dtype == torch.float32


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(weight=torch.arange(1.0, 6.0)),
        nn.CrossEntropyLoss(reduction="none"),
        nn.MultiMarginLoss(),
    ],
)
def test_a_loss_of_torch_is_a_criterion(loss):
    model, (x, y) = small_net().eval(), images()
    objective = Objective(model, loss, MarginBound(eps=0.1))  # one penalty needs no list
    found = objective(x, y)
    parts = {name: float(part) for name, part in found.parts.items()}
    assert parts[type(loss).__name__] == pytest.approx(float(loss(model(x), y).mean().detach()))
    assert set(parts) == {type(loss).__name__, "MarginBound"}
    assert found.total.item() == pytest.approx(sum(parts.values()))


class HardestHalf(nn.CrossEntropyLoss):
    def forward(self, logits, labels):
        losses = F.cross_entropy(logits, labels, reduction="none")
        return losses.topk(1 + len(losses) // 2).values.mean()


class Own(nn.Module):
    """A loss that does not say how it reduces, as timm's LabelSmoothingCrossEntropy."""

    def __init__(self, reduction):
        super().__init__()
        self.reduce = reduction

    def forward(self, logits, labels):
        losses = F.cross_entropy(logits, labels, reduction="none")
        return getattr(losses, self.reduce)() if self.reduce else losses


@pytest.mark.parametrize("count", [3, 8])
@pytest.mark.parametrize(
    ("loss", "adds_up"),
    [
        (Own("mean"), True),
        (Own(""), True),
        (Own("sum"), False),
        (nn.CrossEntropyLoss(label_smoothing=0.1), True),
        (nn.CrossEntropyLoss(weight=torch.arange(1.0, 6.0), reduction="none"), True),
        (nn.CrossEntropyLoss(ignore_index=0, reduction="none"), True),
        (nn.CrossEntropyLoss(ignore_index=0), False),
        (nn.CrossEntropyLoss(weight=torch.arange(1.0, 6.0)), False),
        (nn.CrossEntropyLoss(reduction="sum"), False),
        (HardestHalf(), False),
        (JsdCrossEntropy(num_splits=2), False),  # of two views of each image
        (nn.MultiMarginLoss(weight=torch.arange(1.0, 6.0)), True),
    ],
)
def test_losses_of_torch_whose_parts_do_not_add_up_are_not_cut(loss, adds_up, count):
    model, (x, y) = small_net().eval(), images()
    y[:3] = 0
    bound = Objective(model, loss).bind(x, y)
    if adds_up:
        parts = sum(part().total for part in bound.split(count))
        torch.testing.assert_close(parts, loss(model(x), y).mean())
    elif count == 3 or not isinstance(loss, HardestHalf):  # of two samples it is their mean
        with pytest.raises(ValueError, match="is no plain mean over the samples"):
            [part() for part in bound.split(count)]


@pytest.mark.parametrize("change", ["replaced", "appended", "another model"])
def test_a_head_that_is_another_one_later_is_found_again(change):
    model, (x, y) = small_net(), images()
    objective = Objective(model, None, [RelativeFlatness()])
    objective(x, y)
    if change == "replaced":
        model[8] = nn.Linear(model[8].in_features, 7)
        y = y + 2
    elif change == "appended":
        model.append(nn.Linear(5, 5))
    else:
        objective.model = small_net(seed=3)
    fresh = Objective(objective.model, None, [RelativeFlatness()])
    assert objective(x, y).parts == fresh(x, y).parts


def test_a_switch_to_another_head_is_told():
    class Switched(nn.Module):
        def __init__(self):
            super().__init__()
            self.old, self.new, self.use = nn.Linear(6, 3), nn.Linear(6, 3), "old"

        def forward(self, x):
            new, old = self.new(x), self.old(x)
            return new if self.use == "new" else old

    model, x, y = Switched(), torch.rand(4, 6), torch.arange(4) % 3
    objective = Objective(model, None, [RelativeFlatness()])
    objective(x, y)
    model.use = "new"
    with pytest.raises(ValueError, match="the head 'old' does not make the logits any more"):
        objective(x, y)


def test_dropout_behind_the_head_is_told():
    x, y = images()
    objective = Objective(nn.Sequential(small_net(), nn.Dropout(0.5)), None, [RelativeFlatness()])
    with pytest.raises(ValueError, match="dropout behind the head must go before it"):
        objective(x, y)


@pytest.mark.filterwarnings("error")
def test_images_that_require_a_gradient_are_checked_in_silence():
    x, y = images()
    objective = Objective(small_net(), flatreg.NFGSM(eps=0.1))
    objective(x.requires_grad_(), y).total.backward()


def test_losses_of_other_terms_and_tensors_add_up_part_by_part():
    model, (x, y) = small_net().eval(), images()
    plain, flat = Objective(model)(x, y), Objective(model, None, [RelativeFlatness()])(x, y)
    for found in (plain + flat + torch.tensor(2.0), torch.tensor(2.0) + flat + plain):
        assert set(found.parts) == {"CrossEntropy", "RelativeFlatness", "added"}
        torch.testing.assert_close(found.total, sum(found.parts.values()))
    assert set(sum([plain, flat]).parts) == {"CrossEntropy", "RelativeFlatness"}
    straight = torch.ones((), requires_grad=True)  # a loss of 0 whose gradient is not 0
    (plain.detach() + (straight - straight.detach())).total.backward()
    assert straight.grad == 1


@pytest.mark.parametrize("scope", [None, 8])
def test_what_a_loss_of_torch_counts_counts_a_batch_once(scope):
    class Centred(nn.CrossEntropyLoss):
        def __init__(self):
            super().__init__()
            self.register_buffer("centre", torch.zeros(5))

        def forward(self, logits, labels):
            with torch.no_grad():
                self.centre.lerp_(logits.mean(0), 0.1)
            return super().forward(logits - self.centre, labels)

    model, (x, y), loss, once = small_net().eval(), images(), Centred(), Centred()
    once(model(x), y)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = flatreg.SAM(base, rho=0.5, scope=None if scope is None else model[scope])
    flatreg.backward(optimizer, Objective(model, loss).bind(x, y))
    torch.testing.assert_close(loss.centre, once.centre)


@pytest.mark.parametrize(
    "terms",
    [
        (None, [MarginBound(eps=0.1), RelativeFlatness()]),
        (None, [OffManifoldCurvature(eps=0.1), LayerFlatness(layers=("8",))]),
        (None, [JacobianNorm(eps=0.1), MarginBound(eps=0.1, method="double_backward")]),
        (TRADES(eps=0.1, steps=2), [RelativeFlatness(at="attacked")]),
    ],
)
def test_an_objective_is_evaluated_in_inference_mode(terms):
    """As in the validation step of Lightning, whose images are made in it too."""
    model, (x, y) = small_net(batch_norm=False).eval(), images()

    def value(context):
        torch.manual_seed(1)
        with context():
            return Objective(model, *terms)(x.clone(), y.clone()).total

    found = value(torch.inference_mode)
    assert float(found) == pytest.approx(float(value(nullcontext).detach()), rel=1e-6)
    assert not found.requires_grad


class Asking:
    requires = frozenset({"clean", "gradient"})

    def __call__(self, passes):
        return passes["clean"].logits.sum(1)


@pytest.mark.parametrize(
    ("arguments", "error", "line"),
    [
        (
            [MarginBound(eps=0.1)],
            ValueError,
            r"is a penalty.*Objective\(model, None, \[",
        ),
        ([[MarginBound(eps=0.1)]], TypeError, "expected a term, .* got list"),
        ([F.cross_entropy], TypeError, "expected a term, .* got function"),
        ([None, [CrossEntropy]], TypeError, "expected a term, .* got the class"),
        ([None, [0.1]], TypeError, "expected a term, .* got float"),
        ([Asking()], ValueError, "Asking requires 'gradient': expected some of 'clean', "),
        (
            [NFGSM(eps=0.1), [PGDAT(eps=0.2)]],
            ValueError,
            r"PGDAT attacks .* at the images of NFGSM: write Objective\(model, PGDAT\(",
        ),
    ],
)
def test_first_mistakes_are_told_what_to_write(arguments, error, line):
    with pytest.raises(error, match=line) as told:
        Objective(small_net(), *arguments)
    assert "\n" not in str(told.value)


def test_labels_and_logits_are_checked_at_the_entrance():
    model, (x, y) = small_net().eval(), images()
    flat = Objective(model)(x, y[:, None]).total  # MedMNIST has such labels
    assert torch.equal(flat, Objective(model)(x, y).total)
    for labels in (
        y - 1,
        y + 5,
        y[:5],
        F.one_hot(y),
        y.tolist(),
        y + 0.5,
        torch.full_like(y, -100),
    ):
        with pytest.raises(ValueError, match=r"^labels: expected") as error:
            Objective(model)(x, labels)
        assert "\n" not in str(error.value)
    for wrong in (lambda z: (z, z), lambda z: {"logits": z}, lambda z: z[:, 0], lambda z: z[:, :1]):
        broken = nn.Sequential(model, nn.Identity())
        broken[1].forward = wrong
        for penalties in ([], [MarginBound(eps=0.1)]):
            with pytest.raises(
                ValueError, match=r"^expected logits .*, the model returns"
            ) as error:
                Objective(broken, None, penalties)(x, y)
            assert "\n" not in str(error.value)
