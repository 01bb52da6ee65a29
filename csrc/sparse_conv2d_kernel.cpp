// sparse_conv2d
