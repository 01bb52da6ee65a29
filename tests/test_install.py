"""Installation: the wheel, with a compiler, without one and with one that fails; the extension's symbols.

What builds is slow, and asks the package registry for the build's requirements (never for torch).
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

from sparsekern.ops import _library

ROOT = Path(__file__).parent.parent
COMPILERS = ("c++", "g++", "clang++")


def run(*command, **options):
    """The exit status and everything that a command printed."""
    done = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what a wheel is built from, without anything that was built here."""
    copy = tmp_path_factory.mktemp("source") / "sparsekern"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("sparsekern", "csrc", "_build_backend"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return copy


def build_wheel(source, folder, environment):
    """Runs pip as README's installation does, and tells: exit status, output, wheels."""
    shutil.rmtree(source / "build", ignore_errors=True)
    command = (sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--wheel-dir", folder, source)
    status, printed = run(*command, env=environment)
    return status, printed, list(Path(folder).glob("*.whl"))


def without_compiler(folder):
    """An environment whose PATH has every program of this one's but the C++ compilers."""
    folder.mkdir()
    for place in reversed(os.environ["PATH"].split(os.pathsep)):
        for program in Path(place).glob("*") if Path(place).is_dir() else ():
            link = folder / program.name
            link.unlink(missing_ok=True)
            if program.name not in COMPILERS:
                link.symlink_to(program)
    environment = os.environ | {"PATH": str(folder)}
    environment.pop("CXX", None)
    return environment


def elsewhere(wheel, folder):
    """Unpacks a wheel and returns a function that runs python code on it, away from this source.

    Without the site module, whose .pth files would find the extension of an editable installation.
    """
    zipfile.ZipFile(wheel).extractall(folder)
    packages = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *packages])}

    def python(*arguments):
        return run(sys.executable, "-S", *arguments, cwd=folder, env=environment)

    return python


USE = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import sparsekern as sk
import torch
print("file", sk.__file__)
print("warnings", [str(w.message) for w in caught if "sparsekern" in str(w.message)])
torch.manual_seed(0)
conv, linear = sk.SparseConv2d(2, 3, 3), sk.SparseLinear(48, 20, density=0.25, group_size=8)
model = torch.nn.Sequential(conv, sk.KWinners2d(3, 15), torch.nn.Flatten(), linear, sk.KWinners(20, 5))
y = model(torch.randn(4, 2, 6, 6).relu())
y.sum().backward()
assert ((y != 0).sum(1) == 5).all()
x = torch.randn(4, 48).relu()
torch.testing.assert_close(linear(x), linear.to_dense()(x))
assert conv.weight.grad.abs().sum() > 0
print("runs")
"""


@pytest.mark.slow
def test_a_wheel_runs_elsewhere(source, tmp_path):
    status, printed, wheels = build_wheel(source, tmp_path / "dist", dict(os.environ))
    assert status == 0, printed
    (wheel,) = wheels
    files = zipfile.ZipFile(wheel).namelist()
    assert [f for f in files if f.endswith((".so", ".pyd"))] == [f for f in files if f.startswith("sparsekern/_C")]
    assert any(f.startswith("sparsekern/_C") for f in files)
    assert "sparsekern/paper/networks.toml" in files
    python = elsewhere(wheel, tmp_path / "elsewhere")
    status, printed = python("-c", USE)
    assert status == 0, printed
    assert f"file {tmp_path / 'elsewhere'}" in printed
    assert "warnings []" in printed
    status, printed = python("-m", "sparsekern.info")
    assert status == 0, printed
    assert "cpu bodies  C++ kernels" in printed
    assert torch.__version__ in printed


@pytest.mark.slow
def test_without_a_compiler_the_reference_serves(source, tmp_path):
    status, printed, wheels = build_wheel(source, tmp_path / "dist", without_compiler(tmp_path / "bin"))
    assert status == 0, printed
    assert printed.count("no C++ compiler found") == 1, printed
    (wheel,) = wheels
    assert not [f for f in zipfile.ZipFile(wheel).namelist() if "_C" in f]
    python = elsewhere(wheel, tmp_path / "elsewhere")
    status, printed = python("-c", USE)
    assert status == 0, printed
    assert printed.count("the CPU kernels are not available") == 1, printed
    assert "Install a C++ compiler and reinstall" in printed
    status, printed = python("-W", "ignore", "-m", "sparsekern.info")
    assert status == 0, printed
    assert "cpu bodies  reference bodies, since the kernels are not there: " in printed


@pytest.mark.slow
def test_a_compiler_that_fails_fails_the_installation(source, tmp_path):
    for compiler in (shutil.which("false"), str(tmp_path / "no-such-compiler")):
        status, printed, wheels = build_wheel(source, tmp_path / "dist", os.environ | {"CXX": compiler})
        assert status != 0
        assert compiler in printed
        assert not wheels


@pytest.mark.skipif(_library._C is None, reason="the extension is not built")
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_the_extension_needs_only_the_stable_abi():
    """No C++ name of torch's: those change from release to release, and one build would not run on every torch."""
    flags = ["-u"] if sys.platform == "darwin" else ["-D", "--undefined-only"]
    status, printed = run("nm", *flags, _library._C.__file__)
    assert status == 0, printed
    names = [line.split()[-1] for line in printed.splitlines() if line.strip()]
    assert any("aoti_torch_" in name for name in names)
    mangled = [name for name in names if name.lstrip("_").startswith("Z")]
    assert not [name for name in mangled if any(part in name for part in ("3c10", "2at", "5torch", "5caffe2"))]
