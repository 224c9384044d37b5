"""Build a C file with the machine's compiler, once per machine, and load it.

A library lies in the user's cache folder under a name that holds its source, compiler flags and the machine's
instruction set. Built with gcc, it uses the copy of OpenMP that torch for Linux has loaded: both ask for the same
library name.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

_FLAGS = ("-std=c11", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
_VARIANTS = (("-march=native", "-fopenmp"), ("-march=native",), ("-fopenmp",), ())


def load_library(source: Path, flags: tuple[str, ...]) -> ctypes.CDLL | None:
    """The library of a C file, built if need be; None, with the reason in the log, if that fails."""
    try:
        return ctypes.CDLL(str(_build(source, (*_FLAGS, *flags))))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: a user without a home
        logger.info("the kernels of %s are not available, torch operations do their work: %s", source.name, error)
        return None


def _build(source: Path, flags: tuple[str, ...]) -> Path:
    compiler = next(filter(None, map(shutil.which, filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")))), None)
    if compiler is None:
        raise FileNotFoundError("no C compiler (cc, gcc or clang) on the path")
    files = [source, *sorted(Path(__file__).parent.rglob("*.h"))]
    what = [*(file.read_text(encoding="utf-8") for file in files), compiler, str(flags), str(_VARIANTS), _machine()]
    digest = hashlib.sha256("\0".join(what).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cpq_hf"
    target = cache / f"{source.stem}-{digest}.so"
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        built = Path(folder) / target.name
        for variant in _VARIANTS:
            command = [compiler, *flags, *variant, str(source), "-o", str(built), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            if done.returncode == 0:
                built.replace(target)  # complete or not there, whoever else is building it
                return target
    raise OSError(f"{compiler} failed: {done.stderr.strip()[-500:]}")


def _machine() -> str:
    """Return what `-march=native` depends on: a cache folder may be shared by different machines."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), None)
    features = platform.processor() if features is None else features  # it may start a process, which takes a while
    return f"{platform.system()} {platform.machine()} {features}"
