"""The Triton bodies against the reference, on CPU under Triton's interpreter.

The interpreter must be chosen before Triton is imported, so this file runs itself once more in a process of its own.
Each operation of a program costs tens of microseconds there: shapes are as small as shows every path, and rows that are
"long" are made so by lowering the lengths at which the ways change.
"""

import importlib.util
import os
import subprocess
import sys

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton_benchmark_cases import *  # noqa: F403
    from triton_dispatch_cases import *  # noqa: F403
    from triton_k_winners_cases import *  # noqa: F403
    from triton_offsets_cases import *  # noqa: F403
    from triton_sparse_conv2d_cases import *  # noqa: F403
    from triton_sparse_linear_cases import *  # noqa: F403
else:

    @pytest.mark.parametrize("op", ["k_winners", "sparse_linear", "sparse_conv2d", "dispatch", "offsets", "benchmarks"])
    def test_under_the_interpreter(op):
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", __file__, "-k", op]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
