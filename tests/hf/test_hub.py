"""The real client against a Hub on this machine: what is pushed, what comes back, what its page says."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import Hub
from huggingface_hub import ModelCard
from models import auto_class, build, inputs, logits

from cpq_hf import CPQConfig, CPQError, calibrate_model, pack_model, prepare_model, verify_checkpoint
from cpq_hf.hf.card import MARK
from cpq_hf.version import how_to_install

HERE = Path(__file__).parents[1]

PRELUDE = """
import sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import transformers
transformers.utils.logging.disable_progress_bar()
from huggingface_hub import ModelCard, HfApi
from models import build, inputs, logits
if sys.argv[2] == "plugin":
    import cpq_hf
    from cpq_hf import *
    def packed(name="resnet", seed=0):
        model = prepare_model(build(name, seed), CPQConfig(weight_bits=3, activation_bits=4))
        return pack_model(calibrate_model(model, [inputs(name)]))
"""


LEAVE = "\nimport os\nsys.stdout.flush()\nos._exit(0)\n"  # see distributed_calibration.py


@pytest.fixture
def hub():
    server = Hub()
    yield server
    server.close()


def run(
    hub: Hub, home: Path, script: str, plugin: bool = True, launcher: tuple[str, ...] = (), ok: bool = True
) -> str:
    """A script in a fresh process that knows this Hub only; what it printed."""
    home.mkdir(exist_ok=True)
    file = home / "script.py"
    file.write_text(PRELUDE + script + (LEAVE if launcher else ""))
    done = subprocess.run(
        [sys.executable, *launcher, str(file), str(HERE), "plugin" if plugin else "plain"],
        env=os.environ | hub.environment(home) | {"OMP_NUM_THREADS": "1", "TMPDIR": str(home)},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode == 0) is ok, done.stdout + done.stderr
    return done.stdout + ("" if ok else done.stderr)


def expected() -> torch.Tensor:
    model = prepare_model(build("resnet"), CPQConfig(weight_bits=3, activation_bits=4))
    return logits(calibrate_model(model, [inputs("resnet")]), inputs("resnet"))


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """A Hub to which one process has pushed: whole and in shards, over LFS, to a branch, in private."""
    server = Hub()
    server.lfs = True
    run(
        server,
        tmp_path_factory.mktemp("pushed") / "home",
        """
model = packed()
model.push_to_hub("me/whole", private=True, commit_message="Ready", commit_description="at last", tags=["tiny"])
model.push_to_hub("me/shards", max_shard_size="2KB")
model.push_to_hub("me/whole", revision="small", max_shard_size="2KB")
model.save_pretrained("kept", push_to_hub=True, repo_id="me/saved", commit_message="Saved")
""",
    )
    yield server
    server.close()


def test_what_is_pushed(pushed):
    assert pushed.created == [("me/whole", True), ("me/shards", False), ("me/saved", False)]
    assert [(c["repository"], c["branch"], c["summary"], c["description"]) for c in pushed.commits] == [
        ("me/whole", "main", "Ready", "at last"),
        ("me/shards", "main", "Upload packed model", ""),
        ("me/whole", "small", "Upload packed model", ""),
        ("me/saved", "main", "Saved", ""),
    ]
    whole = pushed.repositories["me/whole"]
    weights = ["cpq_model.safetensors", "cpq_model.safetensors.index.json"]
    assert sorted(whole["main"]) == ["README.md", "bits.png", "config.json", *weights]
    assert "cpq_model.safetensors" not in whole["small"]  # the branch began with it
    assert sum(name.startswith("cpq_model-0") for name in whole["small"]) > 1
    card = ModelCard(whole["main"]["README.md"].decode())
    assert 'from_pretrained("me/whole")' in card.text
    assert set(card.data.tags) == {"cpq", "quantized", "tiny"}


def test_loaded_by_id(pushed, tmp_path):
    """In a fresh process; and where a config, an index or weights were altered on the Hub, not loaded."""
    torch.save(expected(), tmp_path / "expected.pt")
    files = pushed.repositories["me/whole"]["main"]
    for number, (name, old, new) in enumerate(
        [
            ("config.json", b'"bits": 4', b'"bits": 5'),
            ("config.json", b'"embedding_size": 8', b'"embedding_size": 8000000000'),
            ("cpq_model.safetensors", files["cpq_model.safetensors"][-40:], bytes(40)),
            ("cpq_model.safetensors.index.json", b"cpq_model.safetensors", b"../model.safetensors"),
        ]
    ):
        pushed.repositories[f"me/damaged-{number}"] = {"main": files | {name: files[name].replace(old, new)}}
    printed = run(
        pushed,
        tmp_path / "home",
        f"""
load = transformers.AutoModelForImageClassification.from_pretrained
wanted = torch.load({str(tmp_path / "expected.pt")!r})
for name, revision in (("me/whole", "main"), ("me/shards", "main"), ("me/whole", "small"), ("me/saved", "main")):
    assert torch.equal(logits(load(name, revision=revision), inputs("resnet")), wanted), name
for number in range(4):
    try:
        load(f"me/damaged-{{number}}")
    except (ValueError, OSError) as error:
        print(type(error).__name__, error)
""",
    )
    for line, message in zip(
        printed.splitlines(),
        (
            r"CPQError \S*config.json: altered since it was saved",
            r"CPQError \S*config.json: altered since it was saved",
            r"CPQError \S*cpq_model.safetensors: `\S+` of .*layer `\S+` was altered",
            r"(ValueError|OSError) Invalid filename '\.\./model.safetensors'",  # by the client
        ),
        strict=True,
    ):
        assert re.match(message, line), line


def test_not_loaded_without_the_plugin(pushed, tmp_path):
    printed = run(
        pushed,
        tmp_path / "home",
        """
for name in ("me/whole", "me/shards"):
    try:
        transformers.AutoModelForImageClassification.from_pretrained(name)
    except (OSError, ValueError) as error:
        print(error)
assert "cpq_hf" not in sys.modules
""",
        plugin=False,
    )
    assert printed.count("cpq_model.safetensors.index.json, which is read after `import cpq_hf`") == 2


def test_a_refused_push_says_how_to_go_on(hub, tmp_path):
    printed = run(
        hub,
        tmp_path / "home",
        """
model = packed()
for name in ("me/refused", "me/dropped"):
    try:
        model.push_to_hub(name, private=True, revision="small", commit_message="It's ready")
    except CPQError as error:
        print(error)
    try:
        model.save_pretrained("kept", push_to_hub=True, repo_id=name)
    except CPQError as error:
        assert f"To go on: cpq-hf push kept {name}" in str(error), error
    verify_checkpoint("kept")
""",
    )
    for name in ("me/refused", "me/dropped"):
        assert f"{name}: the push was refused or interrupted: " in printed
        command = printed.partition(f"{name}: ")[2].partition("To go on: ")[2].splitlines()[0]
        _, _, folder, *rest = shlex.split(command)
        assert rest == [name, "--private", "--revision", "small", "--message", "It's ready"]
        assert verify_checkpoint(folder)["layers"] == 6
    assert not hub.commits


def test_a_page_that_somebody_wrote_stays(hub, tmp_path):
    mine = "---\nlicense: mit\n---\n\n# Mine\n"
    run(
        hub,
        tmp_path / "one",
        f"""
from pathlib import Path
model = packed()
model.push_to_hub("me/model")
HfApi().upload_file(path_or_fileobj={mine.encode()!r}, path_in_repo="README.md", repo_id="me/model")
model.push_to_hub("me/model", commit_message="again")
Path("kept").mkdir()
Path("kept/README.md").write_text({mine!r})
model.save_pretrained("kept", push_to_hub=True, repo_id="me/other")
""",
    )
    assert hub.commits[-2]["summary"] == "again"
    assert hub.repositories["me/model"]["main"]["README.md"].decode() == mine
    assert hub.repositories["me/other"]["main"]["README.md"].decode() == mine
    assert "bits.png" not in hub.repositories["me/other"]["main"]


TRAINER = """
import datasets
from transformers import Trainer, TrainingArguments
from transformers.utils.logging import set_verbosity_error
data = datasets.Dataset.from_dict({"pixel_values": torch.randn(16, 3, 32, 32).tolist(), "labels": [0, 1] * 8})
data.info.builder_name, data.info.config_name = "digits", "plain"
data = data.with_format("torch")
def trainer(folder, callback, **more):
    args = TrainingArguments(
        folder, max_steps=2, per_device_train_batch_size=4, eval_strategy="steps", eval_steps=1, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=1, **more)
    metrics = lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())}
    return Trainer(build("resnet"), args, train_dataset=data, eval_dataset=data, callbacks=[callback],
                   compute_metrics=metrics)
"""


def card_of(hub: Hub, name: str) -> ModelCard:
    return ModelCard(hub.repositories[name]["main"]["README.md"].decode())


@pytest.mark.parametrize("processes", [1, 2])
def test_pushed_at_the_end_of_training(processes, hub, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
    printed = run(
        hub,
        tmp_path / "one",
        TRAINER
        + """
push = {"repo_id": "me/trained", "private": True, "commit_message": "Trained"}
run = trainer("out", CPQCallback(CPQConfig(weight_bits=2), push=push))
run.train()
if run.is_world_process_zero():
    torch.save(logits(run.model, inputs("resnet")), "expected.pt")
    print("accuracy", run.evaluate()["eval_accuracy"]) if run.args.world_size == 1 else None
""",
        launcher=launcher if processes > 1 else (),
    )
    assert [(c["repository"], c["summary"]) for c in hub.commits] == [("me/trained", "Trained")]
    assert hub.created[0][1]
    card = card_of(hub, "me/trained")
    (result,) = [r for r in card.data.eval_results if r.metric_type == "accuracy"]
    assert (result.dataset_name, result.dataset_config, result.task_type) == (
        "digits",
        "plain",
        "image-classification",
    )
    if processes == 1:
        assert f"accuracy {result.metric_value}" in printed
    assert f"| batch size | {4 * processes} (4 a device, {processes} processes, 1 accumulated) |" in card.text
    assert "| steps | 2 |" in card.text
    assert "weight_bits=2," in card.text
    assert card.data.datasets == ["digits"]
    for name, content in hub.repositories["me/trained"]["main"].items():
        (tmp_path / name).write_bytes(content)
    model = auto_class("resnet").from_pretrained(tmp_path)
    assert torch.equal(logits(model, inputs("resnet")), torch.load(tmp_path / "one" / "expected.pt"))


def test_trainer_push_to_hub(hub, tmp_path):
    """The page is ours with what the Trainer knows, unless somebody wrote one."""
    run(
        hub,
        tmp_path / "one",
        TRAINER
        + """
from pathlib import Path
run = trainer("out", CPQCallback(CPQConfig(weight_bits=2), pack=True), hub_model_id="me/ours", hub_private_repo=True)
run.train()
run.push_to_hub(license="mit", commit_message="Done", tags=["tiny"])
verify_checkpoint("out")
run = trainer("theirs", CPQCallback(CPQConfig(weight_bits=2), pack=True), hub_model_id="me/theirs")
run.train()
Path("theirs/README.md").write_text("# Mine\\n")
run.push_to_hub()
assert Path("theirs/README.md").read_text() == "# Mine\\n"
""",
    )
    assert hub.created[0][1]
    assert hub.commits[0]["summary"] == "Done"
    card = card_of(hub, "me/ours")
    assert MARK in card.text
    assert 'from_pretrained("me/ours")' in card.text
    assert (card.data.license, card.data.library_name) == ("mit", "transformers")
    assert {"cpq", "quantized", "tiny", "generated_from_trainer"} <= set(card.data.tags)
    assert {result.metric_type for result in card.data.eval_results} >= {"accuracy", "loss"}
    assert "bits.png" in hub.repositories["me/ours"]["main"]
    assert hub.repositories["me/theirs"]["main"]["README.md"] == b"# Mine\n"


def test_a_trainers_push_that_fails_leaves_a_whole_page(hub, tmp_path):
    """Before the model is saved, and after it."""
    run(
        hub,
        tmp_path / "one",
        TRAINER
        + """
import os
from pathlib import Path
from huggingface_hub import metadata_load
def failing(run, error, **options):
    try:
        run.push_to_hub(**options)
    except error:
        return
    raise AssertionError
for name in ("ours", "theirs"):
    run = trainer(name, CPQCallback(CPQConfig(weight_bits=2), pack=True), hub_model_id="a/b/c")
    run.train()
    card = Path(name, "README.md")
    if name == "theirs":
        card.write_text("# Mine\\n")
    failing(run, ValueError)  # no such name
    run.args.hub_model_id = f"me/{name}"
    failing(run, TypeError, nonsense=1)  # nothing that the page of a Trainer takes
    assert metadata_load(card)["library_name"] == "peft"
    run.save_model()
    run.save_model()
    if name == "ours":
        assert metadata_load(card)["library_name"] == "transformers"
    else:
        assert card.read_text() == "# Mine\\n"
    run.push_to_hub()
    failing(run, TypeError, nonsense=1)
    from cpq_hf.hf.hub import push_folder
    push_folder(name, f"me/{name}-folder") if name == "ours" else None
""",
    )
    for name in ("me/ours", "me/ours-folder"):
        assert card_of(hub, name).data.library_name == "transformers"
    assert hub.repositories["me/theirs"]["main"]["README.md"] == b"# Mine\n"


def test_page(tmp_path, monkeypatch):
    config = CPQConfig(weight_bits=3, base_model="org/float-resnet", overrides={"classifier": {"weight_bits": 8}})
    model = pack_model(prepare_model(build("resnet"), config))
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.base_model, card.data.base_model_relation) == ("org/float-resnet", "quantized")
    assert (card.data.pipeline_tag, card.data.library_name) == ("image-classification", "transformers")
    loaded = f"import cpq_hf  # {how_to_install()}\nfrom transformers import AutoModelForImageClassification\n"
    for text in ("of 3 to 8 (mean 3.04) bits", "6,107 (97", loaded):
        assert text in card.text, text
    assert "![Bits by layer](bits.png)" in card.text
    assert (tmp_path / "bits.png").read_bytes().startswith(b"\x89PNG")
    recipe = card.text.partition("CPQConfig(\n")[2].partition("\n)")[0]
    assert eval(f"CPQConfig({recipe})", {"CPQConfig": CPQConfig}).overrides == config.overrides  # noqa: S307
    assert (
        json.loads((tmp_path / "config.json").read_text())["quantization_config"]["base_model"] == "org/float-resnet"
    )

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    model.save_pretrained(tmp_path / "plain")
    assert "bits.png" not in (tmp_path / "plain" / "README.md").read_text()
    (tmp_path / "README.md").write_text("# Mine\n")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


def test_only_packed_folders_are_pushed(tmp_path):
    from cpq_hf.hf.hub import push_folder

    build("resnet").save_pretrained(tmp_path)
    with pytest.raises(CPQError, match="not a CPQ checkpoint"):
        push_folder(tmp_path, "me/model")
    pack_model(prepare_model(build("resnet"), CPQConfig())).save_pretrained(tmp_path)
    with pytest.raises(CPQError, match=r"a/b/c: the push was refused or interrupted: Repo id must"):
        push_folder(tmp_path, "a/b/c")
