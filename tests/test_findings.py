"""Catastrophic overfitting; the signs of masked gradients are tested with `evaluate`."""

import math

import pytest
import torch
from torch import nn

from flatreg.attacks.cascade import PRESETS
from flatreg.evaluation.evaluate import evaluate
from flatreg.evaluation.findings import catastrophic_overfitting
from flatreg.train import FGSM

# FGSM and PGD accuracy of small networks trained on digits at 16x16, every fourth epoch of 30.
COLLAPSED = {  # plain FGSM training, eps 0.3
    "fgsm": [0.101, 0.101, 0.128, 0.295, 0.434, 0.167, 0.122, 0.108],
    "pgd": [0.101, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
}
SOUND = {  # PGD training with five steps, eps 0.1
    "fgsm": [0.198, 0.674, 0.747, 0.788, 0.792, 0.830, 0.812, 0.823],
    "pgd": [0.194, 0.611, 0.726, 0.740, 0.743, 0.788, 0.781, 0.788],
}
PLAIN = {"fgsm": [0.316, 0.257, 0.208], "pgd": [0.212, 0.080, 0.049]}  # no adversary at all


def verdicts(history):
    fgsm, pgd = history["fgsm"], history["pgd"]
    return [
        catastrophic_overfitting(fgsm[:i], pgd[:i], 288).verdict == "flagged"
        for i in range(1, len(fgsm) + 1)
    ]


def test_measured_trainings_are_told_apart():
    assert verdicts(COLLAPSED) == [False, False, False, True, True, True, False, False]
    assert not any(verdicts(SOUND))
    assert not any(verdicts(PLAIN))


@pytest.mark.parametrize(
    ("fgsm", "pgd", "flagged"),
    [
        ([0.4, 0.9], [0.4, 0.0], True),
        ([0.4, 0.9], [0.4, 0.46], False),  # at its best so far
        ([0.4, 0.9], [0.4, 0.39], True),  # more than half of 0.9 is lost
        ([0.6, 0.9], [0.5, 0.46], False),  # less than half is
        ([0.2, 0.2], [0.19, 0.06], False),  # a gap of 0.14 is usual
        ([0.2, 0.22], [0.19, 0.06], True),
        ([0.5, 0.4], [0.4, 0.0], False),  # both fall: no adversary trains here
        ([0.9], [0.0], False),  # nothing to fall from yet
    ],
)
def test_where_the_line_is(fgsm, pgd, flagged):
    finding = catastrophic_overfitting(fgsm, pgd, 50)
    assert (finding.verdict == "flagged") == flagged == (finding.value > finding.threshold)
    assert finding.value == pytest.approx(fgsm[-1] - pgd[-1]) and finding.n == 50


@pytest.mark.parametrize(("fgsm", "pgd"), [([], []), ([0.1], [0.1, 0.2])])
def test_histories_that_do_not_match_are_refused(fgsm, pgd):
    with pytest.raises(ValueError, match=f"got {len(fgsm)} and {len(pgd)}"):
        catastrophic_overfitting(fgsm, pgd, 10)


class Wave(nn.Module):
    """Margin of class 0: a wave of period eps along the brightness, so that one step comes back."""

    def __init__(self, eps):
        super().__init__()
        self.eps = eps

    def forward(self, x):
        phase = 2 * math.pi * (x.flatten(1).mean(1) - 0.5) / self.eps
        margin = torch.cos(phase + 0.3) + 0.5
        return torch.stack([margin, torch.zeros_like(margin)], dim=1)


def test_a_model_that_withstands_one_step_alone_is_flagged():
    data = [(torch.full((1, 4, 4), 0.5), 0)] * 20
    result = evaluate(
        Wave(0.2), data, eps=0.2, attack=(FGSM, *PRESETS["fast"]), diagnose=False, progress=False
    )
    fgsm, pgd = result.stages[0].accuracy.value, result.attacked.value
    assert (fgsm, pgd) == (1.0, 0.0)
    assert catastrophic_overfitting([0.5, fgsm], [0.4, pgd], result.n).verdict == "flagged"


def test_the_single_step_is_the_full_step_of_the_margin():
    torch.manual_seed(0)
    x, y, eps = 0.3 + 0.4 * torch.rand(16, 1, 4, 4), torch.arange(16) % 3, 0.1
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))
    y = model(x).argmax(1)
    inputs = x.clone().requires_grad_()
    logits = model(inputs)
    own = logits.gather(1, y[:, None]).squeeze(1)
    rival = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    (gradient,) = torch.autograd.grad((rival - own).sum(), inputs)
    torch.testing.assert_close(FGSM(model, x, y, eps=eps).inputs, x + eps * gradient.sign())
