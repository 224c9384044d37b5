"""`cpq-hf`: verbs on checkpoints, in a folder or on the Hub. Training lives in recipes/.

Torch and transformers take seconds to import, and `import cpq_hf` needs both. So a command line is read first: the
console script runs this file without its package (see start.py), which is why no import here is relative.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

MODEL = "folder of a checkpoint, or the id of a repository on the Hub"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; 0 if it went well, 1 if not, 2 if it was not understood."""
    args = _parser().parse_args(arguments)
    try:
        from cpq_hf.cli.commands import run

        found, text = run(args)
    except (OSError, ValueError, RuntimeError, ImportError) as error:  # a CPQError is a ValueError
        sys.stderr.write(f"cpq-hf {args.verb}: {' '.join(str(error).split())}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"cpq-hf {args.verb}: interrupted\n")
        return 130
    sys.stdout.write((json.dumps(found, indent=2) if args.json else text) + "\n")
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, where argparse gives the usage too."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="cpq-hf",
        description="Verbs on CPQ checkpoints, in a folder or on the Hub.",
        epilog="example: cpq-hf inspect me/resnet-18-cpq-w4a4",
    )
    verbs = parser.add_subparsers(metavar="VERB", dest="verb", required=True)

    def add(verb: str, text: str, example: str, *names: tuple[str, str]) -> Any:
        sub = verbs.add_parser(verb, help=text, description=text, epilog=f"example: cpq-hf {verb} {example}")
        for name, meaning in names:
            sub.add_argument(name, help=meaning)
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        sub.add_argument("--revision", help="branch, tag or commit on the Hub")
        return sub

    sub = add(
        "inspect",
        "Bits, coverage and sizes of a checkpoint, by layer.",
        "me/resnet-18-cpq-w4a4 --plot bits.png",
        ("model", MODEL),
    )
    sub.add_argument("--plot", metavar="FILE", help="draw bits by layer into this file (needs matplotlib)")
    sub = add(
        "pack",
        "Turn a checkpoint that was saved during training into packed integers.",
        "outputs/checkpoint-500 packed",
        ("model", MODEL),
        ("folder", "where to write the packed checkpoint"),
    )
    sub.add_argument("--max-shard-size", default="50GB", help="largest file (default: %(default)s)")
    sub = add(
        "export",
        "Write a checkpoint that plain tools read.",
        "packed plain --to compressed-tensors",
        ("model", MODEL),
        ("target", "folder or file to write"),
    )
    sub.add_argument("--to", choices=["compressed-tensors", "onnx"], required=True, help="format")
    add("verify", "Prove a packed checkpoint whole.", "me/resnet-18-cpq-w4a4", ("model", MODEL))
    sub = add(
        "push",
        "Push the folder of a packed checkpoint to the Hub.",
        "packed me/resnet-18-cpq-w4a4 --private",
        ("folder", "folder of a packed checkpoint"),
        ("repo_id", "repository, made if it is not there"),
    )
    sub.add_argument("--private", action="store_true", help="make it private, if it is made")
    sub.add_argument("--message", help="of the commit")
    sub.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    return parser
