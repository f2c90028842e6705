"""Defences that hide what an attack finds, around small networks on digits; and adaptive attacks.

Every defence is a module with a name in the model, so that `evaluate(..., bpda=[...])` can name it.
`benchmarks/masking.py` and the tests judge them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from flatreg.data.sources import Digits

SIZE, EPS = 16, 0.1


class MeanSparse(nn.Module):
    """Activations within `alpha` deviations of their channel's mean become that mean.

    Amini et al., "MeanSparse", 2024 (arXiv 2406.05927): added to a trained model.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, channels: int, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("deviation", torch.zeros(channels, 1, 1))

    def forward(self, a: Tensor) -> Tensor:
        """Sparsify activations `(n, channels, height, width)`."""
        near = (a - self.mean).abs() <= self.alpha * self.deviation
        return torch.where(near, self.mean, a)


class WinnersTakeAll(nn.Module):
    """The largest `part` of the activations of an image pass, the others are zero.

    Xiao, Zhong, Zheng, "Enhancing adversarial defense by k-winners-take-all", ICLR 2020.
    """

    def __init__(self, part: float) -> None:
        super().__init__()
        self.part = part

    def forward(self, a: Tensor) -> Tensor:
        """Winners of activations `(n, ...)`."""
        flat = a.flatten(1)
        least = flat.topk(max(1, int(self.part * flat.shape[1])), 1).values[:, -1:]
        return (flat * (flat >= least)).view_as(a)


class Quantize(nn.Module):
    """Images of `levels` + 1 grey levels (Guo et al., ICLR 2018; Xu et al., NDSS 2018).

    `leak` is the slope that is left between the jumps.
    """

    def __init__(self, levels: int, leak: float = 0.0) -> None:
        super().__init__()
        self.levels, self.leak = levels, leak

    def forward(self, x: Tensor) -> Tensor:
        """Round."""
        rounded = (x * self.levels).round() / self.levels
        return rounded + self.leak * (x - rounded)


class SoftStairs(nn.Module):
    """A smooth staircase: between its steps the slope is small, and nowhere zero."""

    def __init__(self, levels: int, sharpness: float) -> None:
        super().__init__()
        self.levels, self.sharpness = levels, sharpness

    def forward(self, x: Tensor) -> Tensor:
        """Round softly."""
        scaled = x * self.levels
        low = scaled.floor()
        return (low + torch.sigmoid(self.sharpness * (scaled - low - 0.5))) / self.levels


class Jpeg(nn.Module):
    """Blocks of 8x8 pixels whose cosine coefficients are rounded to multiples of `step`."""

    basis: Tensor

    def __init__(self, step: float) -> None:
        super().__init__()
        self.step = step
        k, i = torch.arange(8.0)[:, None], torch.arange(8.0)[None]
        basis = torch.cos(torch.pi * (2 * i + 1) * k / 16) / 2
        basis[0] /= 2**0.5
        self.register_buffer("basis", basis)

    def forward(self, x: Tensor) -> Tensor:
        """Compress and decompress images `(n, channels, height, width)`."""
        n, channels, height, width = x.shape
        blocks = x.view(n, channels, height // 8, 8, width // 8, 8).transpose(3, 4)
        coefficients = self.basis @ blocks @ self.basis.T
        coarse = (coefficients / self.step).round() * self.step
        return (self.basis.T @ coarse @ self.basis).transpose(3, 4).reshape(x.shape)


class Noise(nn.Module):
    """Gaussian noise, new in every pass; or, `by_image`, drawn from a seed that the image gives."""

    def __init__(self, sigma: float, by_image: bool = False) -> None:
        super().__init__()
        self.sigma, self.by_image = sigma, by_image

    def forward(self, x: Tensor) -> Tensor:
        """Add noise."""
        if not self.by_image:
            return x + self.sigma * torch.randn_like(x)
        seeds = (x.detach().double().flatten(1).sum(1) * 1e9).long().tolist()
        draws = [
            torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(seed)).to(x)
            for seed in seeds
        ]
        return x + self.sigma * torch.stack(draws)


class Smoothed(nn.Module):
    """Mean of the probabilities over `draws` noisy copies (Cohen et al., ICML 2019), as logits."""

    def __init__(self, model: nn.Module, sigma: float, draws: int, by_image: bool = False) -> None:
        super().__init__()
        self.noise, self.model, self.draws = Noise(sigma, by_image), model, draws

    def forward(self, x: Tensor) -> Tensor:
        """Log of the mean probability."""
        copies = x.repeat(self.draws, *[1] * (x.ndim - 1))
        if self.noise.by_image:  # each copy with a seed of its own
            shift = torch.arange(self.draws, device=x.device).repeat_interleave(len(x))
            copies = copies + 1e-6 * shift.view(-1, *[1] * (x.ndim - 1))
        logits = self.model(self.noise(copies))
        return logits.log_softmax(1).view(self.draws, len(x), -1).logsumexp(0)


class Purify(nn.Module):
    """`steps` passes of a denoising network; the images between them are rounded if `coarse`."""

    def __init__(self, denoiser: nn.Module, steps: int, coarse: bool = False) -> None:
        super().__init__()
        self.denoiser, self.steps, self.coarse = denoiser, steps, coarse

    def forward(self, x: Tensor) -> Tensor:
        """Denoise."""
        for _ in range(self.steps):
            x = (x + self.denoiser(x)).clamp(0, 1)
            if self.coarse:
                x = (x * 16).round() / 16
        return x


def network(activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Two convolutions and two linear layers for digits of 16x16 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1),
        activation(),
        nn.Conv2d(16, 32, 3, 2, 1),
        activation(),
        nn.Flatten(),
        nn.Linear(512, 64),
        activation(),
        nn.Linear(64, 10),
    )


@cache
def digits() -> tuple[TensorDataset, TensorDataset]:
    """Training and test images of digits, `(n, 1, 16, 16)` in [0,1]."""
    splits = Digits(size=SIZE).load()
    train, test = (
        TensorDataset(part.images.float() / 255, part.labels)
        for part in (splits.train, splits.test)
    )
    return train, test


def fit(
    model: nn.Sequential,
    *,
    epochs: int = 15,
    adversarial: float = 0.0,
    sigma: float = 0.0,
    seed: int = 0,
) -> nn.Sequential:
    """Train on digits: on noisy images, and on those of one step of length `adversarial`."""
    torch.manual_seed(seed)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    images, labels = digits()[0].tensors
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(64):
            x, y = images[rows], labels[rows]
            x = x + sigma * torch.randn_like(x)
            if adversarial:
                start = (x + adversarial * (2 * torch.rand_like(x) - 1)).requires_grad_()
                (slope,) = torch.autograd.grad(F.cross_entropy(model(start), y), start)
                x = (start.detach() + adversarial * slope.sign()).clamp(0, 1)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


def denoiser(sigma: float = 0.2) -> nn.Sequential:
    """Three convolutions that predict what removes Gaussian noise from a digit."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(16, 1, 3, 1, 1),
    )
    images = digits()[0].tensors[0]
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(8):
        for rows in torch.randperm(len(images)).split(64):
            noisy = images[rows] + sigma * torch.randn_like(images[rows])
            optimizer.zero_grad()
            F.mse_loss(noisy + model(noisy), images[rows]).backward()
            optimizer.step()
    return model.requires_grad_(False)


def mean_sparse(base: nn.Sequential, alpha: float) -> nn.Sequential:
    """`base` with a `MeanSparse` behind each of its convolutions, fitted to the training images."""
    layers, activations = list[nn.Module](), digits()[0].tensors[0]
    with torch.no_grad():
        for layer in base:
            layers.append(layer)
            activations = layer(activations)
            if isinstance(layer, nn.Conv2d):
                sparse = MeanSparse(layer.out_channels, alpha)
                sparse.mean.copy_(activations.mean((0, 2, 3)).view(-1, 1, 1))
                sparse.deviation.copy_(activations.std((0, 2, 3)).view(-1, 1, 1))
                layers.append(sparse)
    return nn.Sequential(*layers).eval()


@cache
def trained(adversarial: float = 0.0, sigma: float = 0.0) -> nn.Sequential:
    """The network without a defence."""
    return fit(network(), adversarial=adversarial, sigma=sigma)


def behind(front: nn.Module) -> nn.Sequential:
    """`trained()` behind a defence of its images."""
    return nn.Sequential(front, trained()).eval()


@dataclass(frozen=True)
class Defence:
    """A defended model; what an attacker who knows it names in `bpda`; whether it draws noise."""

    build: Callable[[], nn.Module]
    bpda: tuple[str, ...] = ()
    random: bool = False


DEFENCES = {
    "none": Defence(trained),
    "none, trained on FGSM": Defence(lambda: trained(0.1)),
    "MeanSparse, .2 deviations": Defence(lambda: mean_sparse(trained(), 0.2), ("MeanSparse",)),
    "· trained on FGSM": Defence(lambda: mean_sparse(trained(0.1), 0.2), ("MeanSparse",)),
    "k-winners-take-all, 10%": Defence(
        lambda: fit(network(lambda: WinnersTakeAll(0.1))), ("WinnersTakeAll",)
    ),
    "8 grey levels": Defence(lambda: behind(Quantize(8)), ("Quantize",)),
    "· with a slope of .05": Defence(lambda: behind(Quantize(8, 0.05)), ("Quantize",)),
    "· with a slope of -.2": Defence(lambda: behind(Quantize(8, -0.2)), ("Quantize",)),
    "JPEG, step .3": Defence(lambda: behind(Jpeg(0.3)), ("Jpeg",)),
    "denoiser, 8 steps": Defence(lambda: behind(Purify(denoiser(), 8)), ("Purify",)),
    "· rounds after each of 3": Defence(
        lambda: behind(Purify(denoiser(), 3, coarse=True)), ("Purify",)
    ),
    "noise, seed from the image": Defence(lambda: behind(Noise(0.1, by_image=True)), ("Noise",)),
    "noise, new in every pass": Defence(lambda: behind(Noise(0.1)), random=True),
    "smoothed, 8 draws": Defence(lambda: Smoothed(trained(sigma=0.1), 0.1, 8).eval(), random=True),
}
