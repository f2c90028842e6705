"""A smooth loss of few pixels, projectors for it, and its derivatives as dense matrices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from flatreg.measures.manifold import IdentityManifold, LocalPCAManifold, PCAManifold

PIXELS, CLASSES = 6, 4


def smooth_net(seed=0, activation=nn.Tanh):
    torch.manual_seed(seed)
    layers = nn.Linear(PIXELS, 16), activation(), nn.Linear(16, CLASSES)
    return nn.Sequential(*layers).double()


def smooth_case(seed=0):
    """A net in float64, three inputs well inside the box, their labels."""
    net = smooth_net(seed)
    x = 0.25 + 0.5 * torch.rand(3, PIXELS, dtype=torch.float64)
    return net, x, torch.tensor([0, 1, 2])


def loss_at(net, y):
    return lambda x: F.cross_entropy(net(x), y, reduction="none")


def one(net, y, i):
    """The loss of sample i alone."""
    return lambda x: F.cross_entropy(net(x), y[i : i + 1], reduction="none")


def manifolds():
    """One of each kind, fitted to images of six pixels."""
    images = torch.rand(40, PIXELS, generator=torch.Generator().manual_seed(1)).double()
    return {
        "identity": IdentityManifold(),
        "pca": PCAManifold(rank=2).fit(images),
        "local": LocalPCAManifold(rank=2, neighbours=4).fit(images),
    }


def projector(manifold, x):
    """Dense normal projector (pixels, pixels) at one input `(1, pixels)`."""
    basis = torch.eye(PIXELS, dtype=torch.float64)
    return torch.cat([manifold.split(x, row[None])[1] for row in basis])


def dense_fisher_trace(net, x, manifold):
    """Tr(P J^T A J P) of one sample `(1, pixels)`, differentiable in the weights."""
    jacobian = torch.autograd.functional.jacobian(lambda x: net(x)[0], x, create_graph=True)[:, 0]
    p = net(x)[0].softmax(0)
    middle = torch.diag(p) - torch.outer(p, p)
    normal = projector(manifold, x)
    return torch.trace(normal @ jacobian.T @ middle @ jacobian @ normal)


def flat_grad(value, net):
    gradients = torch.autograd.grad(value, list(net.parameters()), materialize_grads=True)
    return torch.cat([g.flatten() for g in gradients])
