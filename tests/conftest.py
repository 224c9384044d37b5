import os
from pathlib import Path

import torch

if not torch.cuda.is_available():
    # before anything imports triton: test_gpu_kernels.py runs the kernels of GPUs on the CPU, nothing else does
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import transformers


@pytest.fixture(autouse=True)
def _one_thread_and_fixed_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()


# --- the table of docs/training.md: what tests marked `shows(claim, launcher)` ran with, and how it went ---

BEGIN, END = "<!-- table: written by pytest --write-table -->", "<!-- end of table -->"
results: dict[tuple[str, str], list[tuple[str, str]]] = {}


def pytest_addoption(parser):
    parser.addoption("--write-table", metavar="PAGE", help="put what was shown between the marks of this page")


def pytest_collection_modifyitems(items):
    for item in items:
        marker = item.get_closest_marker("shows")
        if marker is not None:  # as a property it travels from the processes of xdist
            values = getattr(item, "callspec", None)
            text = ", ".join(str(value) for value in (values.params.values() if values else ()))
            item.user_properties.append(("shows", [*marker.args, text]))


def pytest_runtest_logreport(report):
    if report.when == "call" or (report.when == "setup" and not report.passed):
        for name, value in report.user_properties:
            if name == "shows":
                claim, launcher, text = value
                results.setdefault((claim, launcher), []).append((text, report.outcome))


def pytest_sessionfinish(session):
    page = session.config.getoption("--write-table")
    if page is None or hasattr(session.config, "workerinput"):
        return
    rows = ["| what holds | launched as | with | tests |", "|---|---|---|---|"]
    for (claim, launcher), runs in sorted(results.items()):
        passed = sum(outcome == "passed" for _, outcome in runs)
        values = "; ".join(dict.fromkeys(text for text, _ in sorted(runs) if text)) or "-"
        rows.append(f"| {claim} | {launcher} | {values} | {passed} of {len(runs)} passed |")
    before, _, rest = Path(page).read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    Path(page).write_text(before + BEGIN + "\n" + "\n".join(rows) + "\n" + END + after, encoding="utf-8")
