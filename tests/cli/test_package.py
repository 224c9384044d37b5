"""What is installed: the files of the wheel, the console script, the words that say how to install."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cpq_hf.version import PACKAGE, PLACE, __version__, how_to_install

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=["standard", "editable"])
def wheel(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    build = [sys.executable, "-m", "hatchling", "build", "-t", f"wheel:{request.param}", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, timeout=60, capture_output=True)
    (file,) = folder.glob("*.whl")
    return file


def test_files_of_the_wheel(wheel):
    """All of the package, kernels in C with their headers included, and where the command starts."""
    files = [file for file in (ROOT / "cpq_hf").rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    sources = {str(file.relative_to(ROOT)) for file in files}
    kernels = {source for source in sources if source.endswith((".c", ".h"))}
    assert {Path(name).name for name in kernels} == {"fake_quantize.c", "packed.c", "crc.c", "tile.h", "values.h"}
    expected = sources - {"cpq_hf/cli/start.py"} if wheel.parent.name.startswith("standard") else {"_cpq_hf.pth"}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == expected | {"_cpq_hf_start.py"}


@pytest.mark.parametrize("name", ["cpq-hf", "other-name"])
def test_the_command_starts_without_torch(name, wheel, tmp_path):
    """Installed where there is no other package: help and mistakes need none, a verb says what is missing."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path)], check=True, timeout=60)
    programs = tmp_path / "bin"
    pip = [sys.executable, "-m", "pip", "--python", str(programs / "python"), "install", "--no-index", "--no-deps"]
    subprocess.run([*pip, str(wheel)], check=True, timeout=60, capture_output=True)
    (programs / "cpq-hf").rename(programs / name)

    def run(*arguments: str) -> tuple[int, str, str]:
        command = [str(programs / name), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stdout, done.stderr

    code, out, err = run("--help")
    assert (code, out.splitlines()[0], err) == (0, "usage: cpq-hf [-h] VERB ...", "")
    assert run("pak")[0] == 2
    code, out, err = run("verify", "x")
    assert (code, out) == (1, "")
    assert err.startswith("cpq-hf verify: No module named ")


def test_one_way_to_install():
    """Every page and message says what `how_to_install` says."""
    assert how_to_install("onnx") == f"pip install '{PACKAGE}[onnx]'{PLACE}"
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    programs = [file for folder in ("cpq_hf", "recipes") for file in (ROOT / folder).rglob("*.py")]
    said = {file: re.findall(r"pip install '?(\.|cpq-hf)(?!\w)", file.read_text()) for file in pages + programs}
    assert said[ROOT / "README.md"]
    assert {str(file): names for file, names in said.items() if {*names} - {PACKAGE}} == {}


def test_the_changelog_begins_with_this_version():
    assert re.findall(r"^## (\S+)", (ROOT / "docs/changelog.md").read_text(), re.MULTILINE)[0] == __version__
