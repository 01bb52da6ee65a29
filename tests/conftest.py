import pytest
import torch

# The tensors are small, and the threads of several processes on one machine would wait for each other. Tests of
# threading ask for threads.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """Each test draws the same numbers, alone or in the suite."""
    torch.manual_seed(0)


@pytest.fixture
def nan_filled():
    """torch.empty returns NaN (integers: the largest), so that an element that a kernel forgets shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads():
    """Sets the number of torch's threads for one test: ``threads(2)``."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
