"""Fast sparse networks: the layers of "How Can We Be So Dense?" (arXiv:1903.11257) for PyTorch."""

from sparsekern import functional, reference, sdr
from sparsekern.convert import densify_, sparsify_
from sparsekern.nn.k_winners import KWinners, KWinners2d, step_boost_strength
from sparsekern.nn.sparse_conv2d import SparseConv2d
from sparsekern.nn.sparse_linear import SparseLinear
from sparsekern.profile import profile

__version__ = "0.1.0"
__all__ = [
    "KWinners",
    "KWinners2d",
    "SparseConv2d",
    "SparseLinear",
    "densify_",
    "functional",
    "profile",
    "reference",
    "sdr",
    "sparsify_",
    "step_boost_strength",
]
