"""One way to make seeds that do not share their streams."""

from __future__ import annotations

import numpy as np


def derived_seed(*keys: int) -> int:
    """Independent seed for each combination of keys."""
    return int(np.random.SeedSequence(keys).generate_state(1)[0])
