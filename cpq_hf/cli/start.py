"""Start `cpq-hf` without `import cpq_hf`, which takes seconds: show `--help` and report typing mistakes at once.

Importing any module of a package runs the package's `__init__.py` first. So pyproject.toml installs this file beside
the package, as the module `_cpq_hf_start`, and the console script calls its `main`.
"""

from importlib.machinery import SourceFileLoader
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType


def main() -> int:
    """Run cpq_hf/cli/__init__.py as a module outside of its package."""
    package = find_spec("cpq_hf")  # looks where it is, and does not import it
    assert package is not None, "cpq_hf was installed without its package; install it again"
    file = Path(str(package.origin)).parent / "cli" / "__init__.py"
    module = ModuleType("_cpq_hf_cli")
    SourceFileLoader(module.__name__, str(file)).exec_module(module)
    return int(module.main())
