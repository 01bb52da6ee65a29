// The gradient of a bias, which the layers with weights share.
#pragma once
#include "tensor.h"

namespace sparsekern {

// The sum of grad_y (B, O) or (B, O, H, W) over all but the channels, (O,).
Tensor grad_bias(Tensor grad_y);

} // namespace sparsekern
