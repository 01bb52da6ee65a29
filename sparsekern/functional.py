"""The functions that the layers call."""

from sparsekern.ops.k_winners import k_winners, k_winners2d
from sparsekern.ops.sparse_conv2d import sparse_conv2d
from sparsekern.ops.sparse_linear import sparse_linear

__all__ = ["k_winners", "k_winners2d", "sparse_conv2d", "sparse_linear"]
