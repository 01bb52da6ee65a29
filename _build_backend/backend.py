"""PEP 517 backend round setuptools' own: builds against the torch of the environment that pip installs into.

Build isolation hides that torch, and naming torch in ``[build-system].requires`` would download gigabytes of it. So the
backend looks it up in the target environment, and asks for a pinned one only where there is none.
"""

import importlib.util
import os
import re
import sys
import sysconfig

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

MINIMUM = (2, 11)
PINNED = "torch==2.13.0"


def _environment_torch():
    """The site-packages folder of the target environment if it holds a torch that is new enough, else None."""
    for key in ("platlib", "purelib"):
        folder = sysconfig.get_paths()[key]
        version_file = os.path.join(folder, "torch", "version.py")
        if not os.path.exists(version_file):
            continue
        with open(version_file) as f:
            found = re.search(r"__version__ = ['\"](\d+)\.(\d+)", f.read())
        if found and (int(found[1]), int(found[2])) >= MINIMUM:
            return folder
    return None


def _use_environment_torch():
    if importlib.util.find_spec("torch") is None:
        folder = _environment_torch()
        if folder is not None:
            sys.path.append(folder)
            paths = [p for p in (os.environ.get("PYTHONPATH"), folder) if p]
            os.environ["PYTHONPATH"] = os.pathsep.join(paths)


def get_requires_for_build_wheel(config_settings=None):
    _use_environment_torch()
    return [] if importlib.util.find_spec("torch") else [PINNED]


get_requires_for_build_editable = get_requires_for_build_wheel


def get_requires_for_build_sdist(config_settings=None):
    return []


def build_wheel(*args, **kwargs):
    _use_environment_torch()
    return build_meta.build_wheel(*args, **kwargs)


def build_editable(*args, **kwargs):
    _use_environment_torch()
    return build_meta.build_editable(*args, **kwargs)


def prepare_metadata_for_build_wheel(*args, **kwargs):
    _use_environment_torch()
    return build_meta.prepare_metadata_for_build_wheel(*args, **kwargs)


def prepare_metadata_for_build_editable(*args, **kwargs):
    _use_environment_torch()
    return build_meta.prepare_metadata_for_build_editable(*args, **kwargs)
