"""From a float model to what others run: trained, packed, pushed, pulled in a fresh process, verified, exported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Hub

HERE = Path(__file__).parents[1]

TRAIN = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from datasets import Dataset
from models import build, inputs, logits
from transformers import Trainer, TrainingArguments
from cpq_hf import CPQCallback, CPQConfig, CPQOptimizer
from safetensors.torch import save_file
torch.set_num_threads(1)
data = Dataset.from_dict({key: value.numpy() for key, value in inputs("bert", 64).items()})
args = TrainingArguments(output_dir="runs", max_steps=20, per_device_train_batch_size=4, learning_rate=3e-3,
                         save_strategy="no", report_to="none", use_cpu=True, dataloader_pin_memory=False)
config = CPQConfig(weight_bits=5, learn_bits=True, target_bits=3.5, modules_to_not_convert=[])
trainer = Trainer(build("bert"), args, train_dataset=data, callbacks=[CPQCallback(config, push="me/ready")],
                  optimizer_cls_and_kwargs=(CPQOptimizer, {"args": args}))
trainer.train()
batch = inputs("bert", seed=9)
batch.pop("labels")
save_file(batch, "batch.safetensors")
save_file({"logits": logits(trainer.model, batch)}, "expected.safetensors")
"""

DEPLOY = """
import torch, cpq_hf
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
batch, expected = load_file("batch.safetensors"), load_file("expected.safetensors")["logits"]
cpq_hf.verify_checkpoint(snapshot_download("me/ready"))
model = AutoModelForSequenceClassification.from_pretrained("me/ready")
assert cpq_hf.summarize(model).mean_bits <= 3.5
with torch.no_grad():
    assert torch.equal(model(**batch).logits, expected), "pulled"
    fast = cpq_hf.fast_inference(model)(**batch).logits
    assert torch.allclose(fast, expected, atol=1e-5), "fast"
cpq_hf.export_compressed_tensors(model, "plain", batch)
cpq_hf.export_onnx(model, "model.onnx", batch)
"""

PLAIN = """
import sys, torch
sys.modules["cpq_hf"] = None
import onnxruntime
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
batch, expected = load_file("batch.safetensors"), load_file("expected.safetensors")["logits"]
with torch.no_grad():
    logits = AutoModelForSequenceClassification.from_pretrained("plain").eval()(**batch).logits
assert torch.equal(logits, expected), "compressed-tensors"
session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
(output,) = session.run(None, {name: value.numpy() for name, value in batch.items()})
assert torch.allclose(torch.from_numpy(output), expected, atol=1e-4 * float(expected.abs().max())), "ONNX Runtime"
"""


@pytest.mark.slow
def test_trained_pushed_pulled_verified_exported_and_run_elsewhere(tmp_path):
    hub = Hub()
    try:
        environment = os.environ | hub.environment(tmp_path) | {"OMP_NUM_THREADS": "1"}
        for script in (TRAIN, DEPLOY, PLAIN):
            file = tmp_path / "script.py"
            file.write_text(script)
            done = subprocess.run(
                [sys.executable, str(file), str(HERE)], cwd=tmp_path, env=environment, capture_output=True, text=True,
                timeout=120, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
    finally:
        hub.close()
