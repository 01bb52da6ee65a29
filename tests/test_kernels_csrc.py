"""The C++ tests of the kernels, tests/csrc/: built by CMake and run by CTest, for every instruction set."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MISSING = [tool for tool in ("cmake", "ctest", "ninja") if shutil.which(tool) is None]
if not (os.environ.get("CXX") or any(map(shutil.which, ("c++", "g++", "clang++")))):
    MISSING.append("a C++ compiler")

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")


def run(*command):
    """Runs a command; where it fails, so does the test, with what the command printed."""
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        pytest.fail(f"{' '.join(map(str, command))} exited with {done.returncode}:\n{done.stdout}", pytrace=False)
    return done.stdout


# The folders are kept, so that a second run builds only what has changed.
@pytest.mark.parametrize(
    ("folder", "sanitize"), [("ctest", "OFF"), pytest.param("ctest-sanitize", "ON", marks=pytest.mark.slow)]
)
def test_kernels(folder, sanitize):
    build = ROOT / "build" / folder
    run("cmake", "-S", ROOT, "-B", build, "-GNinja", f"-DSPARSEKERN_SANITIZE={sanitize}")
    run("cmake", "--build", build, "--target", "kernel_tests")
    printed = run("ctest", "--test-dir", build, "--output-on-failure", "--no-tests=error")
    assert "100% tests passed" in printed
