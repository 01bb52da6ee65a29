"""Runs a body's functions where they belong: on the GPU if there is one, else on CPU under the interpreter."""

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"


class OnDevice:
    """A module whose functions take CPU tensors and return CPU tensors of the same strides, and run on DEVICE."""

    def __init__(self, module):
        self.module = module

    def __getattr__(self, name):
        function = getattr(self.module, name)

        def run(*arguments):
            moved = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in arguments]
            results = function(*moved)
            if name.endswith("_"):  # it writes to its arguments
                for argument, result in zip(arguments, moved, strict=True):
                    if isinstance(argument, torch.Tensor):
                        argument.copy_(result)
            return tuple(r.cpu() for r in results) if isinstance(results, tuple) else _cpu(results)

        return run


def _cpu(result):
    return result.cpu() if isinstance(result, torch.Tensor) else result
