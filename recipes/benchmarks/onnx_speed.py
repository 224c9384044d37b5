"""What a linear layer exported by `export_onnx` takes in ONNX Runtime, in both forms and several kinds of session.

    python recipes/benchmarks/onnx_speed.py --bits 4 --size 4096

Prints milliseconds for a batch of 1, 4 and 16 rows (medians of rounds in which all take part), and the largest
difference from the product in float64, in parts of its largest value. `float` is a float32 layer exported by torch.
`session` is the entry of `SessionOptions` that the row adds: none, which is what anyone gets,
`session.disable_quant_qdq` = 1, or the value of `session.qdq_matmulnbits_accuracy_level`.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime
import torch
from timing import paired
from torch import nn

from cpq_hf import CPQConfig, export_onnx, pack_model, prepare_model

BATCHES = (1, 4, 16)
QDQ, LEVEL = "session.disable_quant_qdq", "session.qdq_matmulnbits_accuracy_level"
ROWS = [
    ("float", "default", {}),
    ("as exported", "default", {}),
    ("as exported", "disable_quant_qdq", {QDQ: "1"}),
    ("fused_matmul", "default (level 4)", {}),
    ("fused_matmul", "level 1", {LEVEL: "1"}),
    ("fused_matmul", "level 0", {LEVEL: "0"}),
]


def open_session(path: Path, entries: dict[str, str], threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # sessions beside each other would wait
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def export_all(
    folder: Path, bits: int, size: int, settings: dict[str, object]
) -> tuple[dict[str, Path], torch.Tensor]:
    """The three files, and the weight `[out, in]` that all of them multiply by."""
    x = torch.randn(2, size)
    model = nn.Sequential(nn.Linear(size, size, bias=False))
    config = CPQConfig(weight_bits=bits, modules_to_not_convert=[], **settings)  # type: ignore[arg-type]
    model = pack_model(prepare_model(model, config))
    files = {
        "as exported": export_onnx(model, folder / "plain.onnx", x),
        "fused_matmul": export_onnx(model, folder / "fused.onnx", x, fused_matmul=True),
        "float": folder / "float.onnx",
    }
    weight = model[0].quantized_weight()
    float_model = nn.Sequential(nn.Linear(size, size, bias=False))
    float_model[0].weight = nn.Parameter(weight)
    with warnings.catch_warnings():  # of torch's own code
        warnings.simplefilter("ignore")
        torch.onnx.export(
            float_model, (x,), files["float"], input_names=["input"], dynamic_shapes=({0: "batch"},), verbose=False
        )
    return files, weight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--size", type=int, default=4096, help="inputs and outputs of the layer")
    parser.add_argument("--group-size", type=int, help="a step size for so many weights; without, for each output")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    group = {} if args.group_size is None else {"granularity": "group", "group_size": args.group_size}
    torch.manual_seed(0)

    with tempfile.TemporaryDirectory() as name:
        files, weight = export_all(Path(name), args.bits, args.size, group)
        megabytes = {
            form: sum(f.stat().st_size for f in path.parent.glob(f"{path.name}*")) / 1e6
            for form, path in files.items()
        }
        sessions = [open_session(files[form], entries, args.threads) for form, _, entries in ROWS]
    print(f"{args.bits} bits, {args.size}x{args.size}, onnxruntime {onnxruntime.__version__}, {args.threads} threads")
    print(", ".join(f"{form}: {size:.1f} MB" for form, size in megabytes.items()))

    milliseconds: list[list[float]] = [[] for _ in ROWS]
    errors = [0.0 for _ in ROWS]
    for batch in BATCHES:
        x = torch.randn(batch, args.size)
        want = (x.double() @ weight.double().T).numpy()
        inputs = {"input": x.numpy()}
        for place, session in enumerate(sessions):
            (got,) = session.run(None, inputs)
            errors[place] = max(errors[place], float(np.abs(got - want).max() / np.abs(want).max()))
        times = paired({str(i): partial(s.run, None, inputs) for i, s in enumerate(sessions)}, args.rounds, warmup=2)
        for of_row, seconds in zip(milliseconds, times.values(), strict=True):
            of_row.append(1e3 * median(seconds))

    print("| form | session | " + " | ".join(f"batch {batch}, ms" for batch in BATCHES) + " | difference |")
    print("|---|---|" + "---|" * (len(BATCHES) + 1))
    for (form, session, _), row, error in zip(ROWS, milliseconds, errors, strict=True):
        print(f"| {form} | {session} | " + " | ".join(f"{value:.2f}" for value in row) + f" | {error:.1e} |")


if __name__ == "__main__":
    main()
