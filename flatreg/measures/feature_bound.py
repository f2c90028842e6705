r"""Bounds on the cross-entropy of a linear head when its features move by at most R in L2.

With logits z, p = softmax(z), class weights w_s and C = W^T (diag p - p p^T) W, the second
derivative of the loss in the features,

.. math:: \lambda_{\max}(C) \le \operatorname{Tr} C = \kappa / \|\phi\|^2

makes a local bound one in relative flatness, :math:`\tfrac12 (R / \|\phi\|)^2 \kappa`; the norm
of the features cancels, so no function asks for them. Bounds are on the loss at the displaced
point, not on its rise, and hold up to rounding.

After Walter, Adilova, Vreeken and Kamp, "When Flatness Does (Not) Guarantee Adversarial
Robustness", 2025.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor

from flatreg.measures.relative_flatness import relative_flatness
from flatreg.models.entrance import as_labels
from flatreg.models.precision import at_least_float32

SecondOrder = Literal["eigenvalue", "relative_flatness"]

_MAX_CLASSES = 1024  # above, one eigenvalue takes seconds, and the trace stands in for it
_MAX_ELEMENTS = 2**24  # of the classes x classes matrices alive at once


def local_bound(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor,
    radius: float | Tensor,
    *,
    second_order: SecondOrder = "eigenvalue",
) -> Tensor:
    r"""Upper bound on the loss at features moved by at most `radius`, from derivatives here.

    .. math:: \ell + \|W^T(p - e_y)\| R + \tfrac12 c R^2
              + \tfrac16 (R \max_{s,s'} \|w_s - w_{s'}\|)^3 / (6 \sqrt 3)

    The cubic term bounds the remainder at any R: the third derivative along h is the third central
    moment of W h, and a variable of range r has none above r^3 / (6 sqrt 3). It knows the weights
    alone, so the bound is tight as R -> 0 and loses beyond.

    Args:
        logits: `(batch, classes)`.
        labels: `(batch,)`.
        weight: of the last layer `(classes, features)`.
        radius: R >= 0, L2 length in feature space; scalar or `(..., batch)`.
        second_order: c. `"eigenvalue"`: lambda_max(C), by an eigenvalue problem of size classes x
            classes a sample; above 1,024 classes the trace takes its place. `"relative_flatness"`:
            the trace of C, kappa / ||phi||^2.

    Returns:
        `(..., batch)`, in units of the loss; float32 at least. Differentiable.

    Raises:
        ValueError: shapes that do not fit, labels of no class, a negative radius, an unknown
            `second_order`.

    >>> logits, labels = torch.zeros(1, 2), torch.tensor([0])
    >>> local_bound(logits, labels, torch.eye(2), 1.0)  # ln 2 + 1/sqrt 2 + 1/4 + sqrt 8 / 36 sqrt 3
    tensor([1.6956])
    """
    logits, labels, weight = _checked(logits, labels, weight)
    r = _as_radius(radius, logits)
    with torch.autocast(logits.device.type, enabled=False):
        gap = _gap(logits, labels)
        # p - e_y = (1 - p_y) (softmax over rivals - e_y) keeps its digits where p_y rounds to 1.
        slope = gap.sigmoid() * torch.linalg.vector_norm(_pull(logits, labels, weight), dim=1)
        bend = _second_derivative(logits, weight, second_order) / 2
        cubic = _diameter(weight) ** 3 / (36 * 3**0.5)
        bound: Tensor = _softplus(gap) + slope * r + bend * r**2 + cubic * r**3
    return bound


def global_bound(logits: Tensor, labels: Tensor, weight: Tensor, radius: float | Tensor) -> Tensor:
    r"""Upper bound on the loss at features moved by at most `radius`: every rival at its best.

    .. math:: \log(1 + \sum_{s \ne y} \exp(z_s - z_y + \|w_s - w_y\| R))

    Exact for two classes. With more it is not tangent at R = 0, as rivals pull different ways; far
    out it grows linearly, as the loss does.

    Arguments, result and errors as in `local_bound`.

    >>> global_bound(torch.zeros(1, 2), torch.tensor([0]), torch.eye(2), 0.5**0.5)  # log(1 + e)
    tensor([1.3133])
    """
    logits, labels, weight = _checked(logits, labels, weight)
    r = _as_radius(radius, logits)
    return _softplus(_gap(logits + r[..., None] * _distances(weight, labels), labels))


def feature_radius(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    r"""Distance in feature space to the nearest point where a rival ties with the label, signed.

    .. math:: R^* = \min_{s \ne y} (z_y - z_s) / \|w_s - w_y\|

    Exact for a sample that is right: nothing shorter than R* changes the prediction, and R* reaches
    a tie. Negative for one that is wrong: its features must move by -R* at least to be right.

    Arguments as in `local_bound`.

    Returns:
        `(batch,)`, L2 length in feature space; infinite where no rival has weights of its own.

    Raises:
        ValueError: shapes that do not fit, labels of no class.

    >>> feature_radius(torch.tensor([[2.0, 0.0]]), torch.tensor([0]), torch.eye(2))  # sqrt 2
    tensor([1.4142])
    """
    logits, labels, weight = _checked(logits, labels, weight)
    lead = logits.gather(1, labels[:, None]) - logits
    distance = _distances(weight, labels)
    ratio = lead / torch.where(distance > 0, distance, 1)
    ratio = torch.where((distance > 0) | (lead == 0), ratio, lead.detach().sign() * torch.inf)
    return ratio.scatter(1, labels[:, None], torch.inf).amin(1)


@torch.no_grad()
def worst_loss(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor,
    radius: float | Tensor,
    *,
    steps: int = 50,
    restarts: int = 16,
) -> Tensor:
    r"""Largest loss found at features moved by at most `radius`: what bounds are compared with.

    The loss is convex in h, so its maximum lies on the sphere and the step
    :math:`h \leftarrow R\, \nabla\ell / \|\nabla\ell\|` never decreases it. It starts from the
    gradient and from the directions w_s - w_y of the rivals that the global bound puts first.

    Args:
        logits: `(batch, classes)`.
        labels: `(batch,)`.
        weight: of the last layer `(classes, features)`.
        radius: R >= 0, L2 length in feature space; scalar or `(..., batch)`.
        steps: from every start.
        restarts: rivals to start from, at most; memory is `(..., batch, restarts, features)`.

    Returns:
        `(..., batch)`, a **lower** bound on the maximum, in units of the loss; no gradient.

    Raises:
        ValueError: shapes that do not fit, a negative radius.
    """
    logits, labels, weight = _checked(logits, labels, weight)
    r = _as_radius(radius, logits)[..., None]
    with torch.autocast(logits.device.type, enabled=False):
        reach = _rivals(logits + r * _distances(weight, labels), labels)
        rival = reach.topk(min(restarts, logits.shape[1] - 1), dim=-1).indices
        pulls = weight[rival] - weight[labels][:, None]
        steepest = _pull(logits, labels, weight)[:, None].expand(*pulls.shape[:-2], 1, -1)
        pulls, labels = torch.cat([steepest, pulls], -2), labels[:, None]
        for _ in range(steps + 1):
            direction = F.normalize(pulls, dim=-1, eps=1e-30)  # zero where it is zero
            moved = logits[:, None] + r[..., None] * (direction @ weight.T)
            pulls = _pull(moved, labels, weight)
        return _softplus(_gap(moved, labels)).amax(-1)


@dataclass(frozen=True, eq=False)
class BoundCurve:
    """Bounds on the loss and the largest loss found over radii, each `(radii, batch)`.

    `relative_bound` is the local bound with relative flatness in place of the eigenvalue.
    """

    radii: Tensor
    local_bound: Tensor
    relative_bound: Tensor
    global_bound: Tensor
    worst_loss: Tensor


@torch.no_grad()
def bound_curve(
    logits: Tensor, labels: Tensor, weight: Tensor, radii: Sequence[float] | Tensor
) -> BoundCurve:
    """All bounds and the largest loss found, over `radii`: `(radii,)` or `(radii, batch)`.

    Raises:
        ValueError: shapes that do not fit; a radius below 0.
    """
    r = torch.as_tensor(radii)
    r = _as_radius(r.reshape(-1, 1) if r.ndim < 2 else r, _checked(logits, labels, weight)[0])
    return BoundCurve(
        radii=r,
        local_bound=local_bound(logits, labels, weight, r),
        relative_bound=local_bound(logits, labels, weight, r, second_order="relative_flatness"),
        global_bound=global_bound(logits, labels, weight, r),
        worst_loss=torch.stack([worst_loss(logits, labels, weight, row) for row in r]),
    )


def _checked(logits: Tensor, labels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits and centred weight in float32 at least, and labels as int64."""
    batch, classes = logits.shape if logits.ndim == 2 else (0, 0)
    shapes = ((batch,), (batch, 1))
    if classes < 2 or weight.ndim != 2 or len(weight) != classes or labels.shape not in shapes:
        raise ValueError(
            "expected logits (batch, classes >= 2), labels (batch,) and weight (classes, features),"
            f" got {tuple(logits.shape)}, {tuple(labels.shape)} and {tuple(weight.shape)}"
        )
    on_cpu = logits.device.type == "cpu"  # another would have to be waited for
    labels = as_labels(labels, batch, classes, read=on_cpu, probabilities=False)
    logits, weight = at_least_float32(logits), at_least_float32(weight)
    return logits, labels, weight - weight.mean(0)  # differences of rows are all that matters


def _as_radius(radius: float | Tensor, logits: Tensor) -> Tensor:
    r = torch.as_tensor(radius, dtype=logits.dtype)
    if r.device.type == "cpu" and not bool((r >= 0).all()):  # another would have to be waited for
        raise ValueError(f"radius must be >= 0, got {float(r.min())}")
    r = r.to(logits.device)
    if r.ndim and r.shape[-1] not in (1, len(logits)):
        raise ValueError(f"radius must be a scalar or (..., {len(logits)}), got {tuple(r.shape)}")
    return r.expand(*r.shape[:-1], len(logits))


def _rivals(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits with the label's at -inf."""
    return logits.scatter(-1, labels[..., None].expand(*logits.shape[:-1], 1), -torch.inf)


def _gap(logits: Tensor, labels: Tensor) -> Tensor:
    """Rivals' log-sum-exp less z_y: the loss is its softplus, 1 - p_y its sigmoid."""
    own = logits.gather(-1, labels[..., None].expand(*logits.shape[:-1], 1))
    return _rivals(logits, labels).logsumexp(-1) - own[..., 0]


def _softplus(gap: Tensor) -> Tensor:
    """log(1 + e^gap) to the last digit; F.softplus cuts at 20."""
    return -F.logsigmoid(-gap)


def _pull(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Direction of the loss's gradient in the features, never vanishing: mean rival less label."""
    pull: Tensor = _rivals(logits, labels).softmax(-1) @ weight - weight[labels]
    return pull


def _distances(weight: Tensor, labels: Tensor) -> Tensor:
    """||w_s - w_y|| `(batch, classes)`, by differences: the product form loses half the digits."""
    return torch.cdist(weight[labels], weight, compute_mode="donot_use_mm_for_euclid_dist")


def _diameter(weight: Tensor) -> Tensor:
    """Largest distance between two rows of `weight`."""
    blocks = torch.split(torch.arange(len(weight), device=weight.device), 1024)
    return torch.stack([_distances(weight, rows).amax() for rows in blocks]).amax()


def _second_derivative(logits: Tensor, weight: Tensor, by: SecondOrder) -> Tensor:
    """Largest eigenvalue of C, or its trace."""
    if by not in ("eigenvalue", "relative_flatness"):
        raise ValueError(f"second_order must be eigenvalue or relative_flatness, got {by!r}")
    if by == "relative_flatness" or len(weight) > _MAX_CLASSES:
        unit = torch.eye(1, weight.shape[1]).to(logits).expand(len(logits), -1)
        return relative_flatness(unit, logits, weight)
    blocks = torch.split(logits, max(1, _MAX_ELEMENTS // len(weight) ** 2))
    return torch.cat([_largest_eigenvalue(block, weight @ weight.T) for block in blocks])


def _largest_eigenvalue(logits: Tensor, gram: Tensor) -> Tensor:
    r"""Largest eigenvalue of C, exactly: an iteration would come from below.

    With t = argmax p, D the rows w_s - w_t and q = p with entry t zeroed, C = D^T (diag q - q q^T)
    D, which keeps its digits where p rounds to one-hot. diag q - q q^T = S S^T for S = diag(u) (I -
    c u u^T), u = sqrt(q), c = 1 / (1 + sqrt(p_t)); S^T (D D^T) S has C's nonzero eigenvalues.
    """
    log_p = logits.log_softmax(1)
    top = logits.detach().argmax(1)[:, None]
    u = (log_p.scatter(1, top, -torch.inf) / 2).exp()
    c = 1 / (1 + (log_p.gather(1, top) / 2).exp())
    s = torch.diag_embed(u) - einsum(c[:, 0], u.square(), u, "b, b s, b t -> b s t")
    cross = gram[top[:, 0]]
    shifted = gram - cross[:, :, None] - cross[:, None, :] + cross.gather(1, top)[:, :, None]
    spectra: Tensor = torch.linalg.eigvalsh(s.mT @ shifted @ s)
    return spectra[:, -1].clamp_min(0)
