"""Drives CMake and Ninja, the one recipe for ``csrc/`` (CMakeLists.txt); everything else is in pyproject.toml."""

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def torch_folder():
    """The installed torch's folder. Found without importing torch, which would cost seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None:
        raise RuntimeError("sparsekern builds against torch>=2.11, and no torch was found; run: pip install torch")
    return Path(spec.origin).parent


def cmake_arguments(output_folder):
    import pybind11

    torch = torch_folder()
    return [
        "-GNinja",
        "-DSPARSEKERN_TESTS=OFF",
        f"-DCMAKE_BUILD_TYPE={os.environ.get('SPARSEKERN_BUILD_TYPE', 'Release')}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output_folder}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DSPARSEKERN_TORCH_INCLUDE={torch / 'include'}",
        f"-DSPARSEKERN_TORCH_LIBRARY={torch / 'lib'}",
        f"-DSPARSEKERN_MODULE_SUFFIX={sysconfig.get_config_var('EXT_SUFFIX')}",
        *os.environ.get("CMAKE_ARGS", "").split(),
    ]


class CMakeBuild(build_ext):
    """Builds ``sparsekern._C``; skips it with a warning where there is no C++ compiler, fails where a build fails."""

    def build_extension(self, ext):
        compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
        if compiler is None:
            self.announce(
                "sparsekern: no C++ compiler found (install g++ or clang++, or set CXX): installing without the CPU "
                "kernels; layers will run their reference bodies, correct but slow.",
                level=logging.WARNING,
            )
            return
        output = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        cmake = shutil.which("cmake") or "cmake"
        subprocess.run([cmake, "-S", ROOT, "-B", build, *cmake_arguments(output)], check=True)
        subprocess.run([cmake, "--build", build, "--target", "_C"], check=True)

    def copy_extensions_to_source(self):
        """Editable installs: nothing to copy where the extension was skipped."""
        built = Path(self.build_lib)
        self.extensions = [e for e in self.extensions if (built / self.get_ext_filename(e.name)).exists()]
        super().copy_extensions_to_source()


setup(ext_modules=[Extension("sparsekern._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
