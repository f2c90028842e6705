import pytest
import torch
from accelerate.state import AcceleratorState

# On small tensors two threads mostly wait for each other: for minutes on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """Accelerate keeps precision and devices in globals, which the next test must not find."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)
