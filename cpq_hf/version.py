"""The version of the package and how to install it, for files and messages that say so."""

__version__ = "0.1.0"

PACKAGE, PLACE = ".", " in a clone of cpq-hf"  # on no index yet; once it is, these become "cpq-hf" and ""


def how_to_install(extra: str = "") -> str:
    """Return the command that installs the package, with an extra of pyproject.toml if one is named."""
    package = f"'{PACKAGE}[{extra}]'" if extra else PACKAGE
    return f"pip install {package}{PLACE}"
