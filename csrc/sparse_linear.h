// sparse_linear
