"""The embedded digits: what a recipe runs on without any file."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from sklearn.datasets import load_digits

from flatreg.data.images import ImageArrays, Source, Splits, split_off
from flatreg.terms import CONFIG


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Digits(Source):
    """scikit-learn's 1,797 handwritten digits, embedded: 8x8 pixels resized to `size`, one channel.

    Args:
        size: height and width in pixels.
        test: share of the images in the test split.
        hold_back: share of the rest to hold back from training.
        limit, test_limit: how many of the training and test images to use.
    """

    size: Annotated[int, Field(ge=8)] = 32
    test: Annotated[float, Field(gt=0, lt=1)] = 0.2
    kind: Literal["digits"] = "digits"

    def load(self) -> Splits:
        """Resize and split, the same way every time.

        Raises:
            ValueError: `limit` or what is held back is too small for the classes.
        """
        digits = load_digits()
        images = torch.from_numpy(digits.images)[:, None] / 16
        images = F.interpolate(images, (self.size, self.size), mode="bilinear", align_corners=False)
        pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8)
        train, test = split_off(ImageArrays(pixels, torch.from_numpy(digits.target)), self.test)
        return self.arranged(*self.limited(train, test), num_classes=10)
