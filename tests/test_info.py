"""``python -m sparsekern.info``."""

import subprocess
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch

import sparsekern as sk
from sparsekern import info
from sparsekern.ops import _library


def test_info_names_versions_and_bodies():
    lines = info.info()
    assert lines["sparsekern"] == sk.__version__
    assert torch.__version__ in lines["torch"]
    if _library._C is None:
        assert lines["cpu bodies"].startswith("reference bodies")
        assert str(_library._C_error) in lines["cpu bodies"]
    else:
        assert f"C++ kernels, {_library._C.instruction_set()} " in lines["cpu bodies"]
        assert all(op in lines["cpu bodies"] for op in info.OPS)
        assert _library._C.compiler in lines["built with"]


def test_without_the_extension_it_says_why(monkeypatch):
    monkeypatch.setattr(_library, "_C", None)
    monkeypatch.setattr(_library, "_C_error", ImportError("No module named 'sparsekern._C'"))
    lines = info.info()
    assert lines["cpu bodies"].endswith("the kernels are not there: No module named 'sparsekern._C'")
    assert "built with" not in lines


def test_without_triton_or_nvidia_it_says_why(monkeypatch):
    monkeypatch.setattr(_library, "has_triton", lambda: False)
    monkeypatch.setattr(torch.version, "hip", None)
    assert info.info()["gpu bodies"] == "reference bodies, since Triton is not installed"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert info.info()["gpu bodies"] == "reference bodies, since the Triton kernels are for NVIDIA GPUs"


def test_triton_of_another_distribution(monkeypatch):
    """pytorch-triton, for instance, which has no metadata under the module's name."""
    triton = ModuleType("triton")
    triton.__version__, triton.__spec__ = "3.9.1", ModuleSpec("triton", None)
    monkeypatch.setitem(sys.modules, "triton", triton)
    assert info.info()["triton"] == "3.9.1"


def test_command():
    done = subprocess.run([sys.executable, "-m", "sparsekern.info"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    printed = {name: value.strip() for name, value in (line.split("  ", 1) for line in done.stdout.splitlines())}
    here = info.info()
    del printed["torch"], here["torch"]  # the threads of this process may have been set
    assert printed == here
