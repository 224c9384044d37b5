"""Results of runs in a file of JSON lines, found again by the settings of the run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

Settings = dict[str, Any]


def read(path: Path) -> list[dict[str, Any]]:
    """All lines: each has `settings` and `result`."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def digest(settings: Settings) -> str:
    """Eight characters that stand for the settings in names of folders."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


class Results:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs = {digest(line["settings"]): line["result"] for line in read(path)}

    def get(self, settings: Settings) -> dict[str, Any] | None:
        return self.runs.get(digest(settings))

    def add(self, settings: Settings, result: dict[str, Any], write: bool) -> None:
        """Keep a result; of several processes one writes it."""
        self.runs[digest(settings)] = result
        if write:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"settings": settings, "result": result}, sort_keys=True) + "\n")
