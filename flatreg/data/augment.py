"""Augmentation of whole batches on their device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def augment(images: Tensor, *, crop: int, flip: bool) -> Tensor:
    """Shift every image by up to `crop` pixels (zeros come in) and mirror half of them.

    Works on the whole batch `(batch, channels, height, width)` on its device, from torch's global
    generator.
    """
    batch, _, height, width = images.shape
    device = images.device
    if crop:
        top, left = torch.randint(0, 2 * crop + 1, (2, batch, 1), device=device)
        rows = top + torch.arange(height, device=device)
        columns = left + torch.arange(width, device=device)
        padded = F.pad(images, (crop,) * 4)
        sample = torch.arange(batch, device=device)[:, None, None]
        # advanced indices around the channel slice move to the front: b h w c
        shifted = padded[sample, :, rows[:, :, None], columns[:, None, :]]
        images = rearrange(shifted, "b h w c -> b c h w")
    if flip:
        mirrored = torch.rand(batch, device=device) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    return images
