"""The data sets by the name that ``networks.toml`` gives them."""

from __future__ import annotations

from sparsekern.paper.mnist import GaussianMnist, Mnist
from sparsekern.paper.speech import Speech

DATA_SETS = {"mnist": Mnist, "speech": Speech, "gaussian": GaussianMnist}
