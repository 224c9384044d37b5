"""Packed checkpoints damaged at random: each ends in `CPQError` or in the same logits, never in another model.

transformers reads config.json before it asks the plugin anything: what it refuses by itself then (a file that is no
JSON, an unknown `model_type`, a packed folder that is not said to be CPQ's any more) is an error of its own. With the
checksum of config.json made anew, as somebody who alters a checkpoint on purpose would, another model is possible,
but nothing else.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import struct
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import auto_class, build, inputs, logits

from cpq_hf import CPQConfig, CPQError, calibrate_model, pack_model, prepare_model, verify_checkpoint
from cpq_hf.hf.checkpoint import INDEX, config_checksum

MODELS = {"resnet": CPQConfig(weight_bits=3, activation_bits=4), "llama-tied": CPQConfig(quantize_embeddings=True)}
DEEP = 100_000  # brackets inside each other, more than Python's parser goes down
SILLY: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 7, 8, 9, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "x", "x" * 9999, "\0", "../x", "/etc/passwd", "\ud800", "4", "F32", "cpq", "channel", "group", "tensor"),
    *([], [0], [1, 2], [[]], {}, {"a": 1}, [10**9] * 4, ["x"] * 99),
]


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every `(container, key)` in a JSON tree."""
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree))) if isinstance(tree, list) else []
    return [(tree, key) for key in keys] + [place for key in keys for place in places(tree[key])]


def change(tree: Any, dice: random.Random) -> None:
    """Change one thing in a JSON tree."""
    container, key = dice.choice(places(tree))
    other_container, other_key = dice.choice(places(tree))
    kind = dice.randrange(7)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, dict):
        container[str(key) + "x"] = container.pop(key)
    elif kind == 2 and isinstance(container, dict):
        container[dice.choice(["surprise", "bits", "weight", "0", ""])] = dice.choice(SILLY)
    elif (
        kind == 3 and type(container[key]) is type(other_container[other_key]) and not isinstance(container[key], dict)
    ):
        container[key], other_container[other_key] = other_container[other_key], container[key]
    elif kind == 4 and type(container[key]) in (int, float):
        container[key] += dice.choice([-1, 1, 0.5, 10**12])
    else:
        container[key] = dice.choice(SILLY)


def change_json(file: Path, dice: random.Random) -> None:
    tree = json.loads(file.read_text())
    change(tree, dice)
    file.write_text(json.dumps(tree))


def change_config(folder: Path, dice: random.Random) -> None:
    change_json(folder / "config.json", dice)


def change_quantization(folder: Path, dice: random.Random) -> None:
    tree = json.loads((folder / "config.json").read_text())
    change(tree["quantization_config"], dice)
    (folder / "config.json").write_text(json.dumps(tree))


def forge_quantization(folder: Path, dice: random.Random) -> None:
    """The same with the seal renewed: what lies behind it has to hold by itself."""
    tree = json.loads((folder / "config.json").read_text())
    table = tree["quantization_config"]
    change(dice.choice([table, table["layers"], dice.choice(list(table["layers"].values()))]), dice)
    table["config_checksum"] = config_checksum(tree)
    (folder / "config.json").write_text(json.dumps(tree))


def change_index(folder: Path, dice: random.Random) -> None:
    change_json(folder / INDEX, dice)


def change_text(folder: Path, dice: random.Random) -> None:
    """JSON that no `json.dumps` writes: deep, with keys twice, cut off, with huge numbers."""
    file = folder / dice.choice(["config.json", INDEX])
    text = file.read_text()
    at = dice.randrange(len(text))
    deep = dice.choice("[{")
    tricks = [
        lambda: text.replace("{", '{"deep": ' + ('{"":' if deep == "{" else "[") * DEEP, 1),
        lambda: text.replace("{", '{"number": ' + "9" * 5000 + ",", 1),
        lambda: text[: text.rindex("}")] + ', "quantization_config": null}',
        lambda: text.replace('"bits": ', '"bits": 8, "bits": ', 1),
        lambda: text[:at] + dice.choice(["\0", "}", '"', "NaN", "\n"]) + text[at:],
        lambda: text[:at],
        lambda: " " + text + "\n\n",
        lambda: "",
    ]
    file.write_text(dice.choice(tricks)())


def weights(folder: Path, dice: random.Random) -> Path:
    return dice.choice(sorted(folder.glob("*.safetensors")))


def any_file(folder: Path, dice: random.Random) -> Path:
    return dice.choice([weights(folder, dice), weights(folder, dice), folder / INDEX, folder / "config.json"])


def flip_bits(folder: Path, dice: random.Random) -> None:
    file = any_file(folder, dice)
    data = bytearray(file.read_bytes())
    near = dice.choice([8, 200, len(data)])  # the length of the header, the header, anywhere
    for _ in range(dice.choice([1, 1, 1, 5])):
        data[dice.randrange(min(near, len(data)))] ^= 1 << dice.randrange(8)
    file.write_bytes(data)


def overwrite(folder: Path, dice: random.Random) -> None:
    file = any_file(folder, dice)
    data = bytearray(file.read_bytes())
    start = dice.randrange(len(data))
    data[start : start + dice.randrange(64)] = dice.choice([b"\0", b"\xff", dice.randbytes(1)]) * dice.randrange(64)
    file.write_bytes(data)


def truncate(folder: Path, dice: random.Random) -> None:
    file = any_file(folder, dice)
    file.write_bytes(file.read_bytes()[: dice.choice([0, 7, 8, dice.randrange(file.stat().st_size)])])


def append(folder: Path, dice: random.Random) -> None:
    file = any_file(folder, dice)
    file.write_bytes(file.read_bytes() + dice.randbytes(dice.choice([1, 4, 4096])))


def delete(folder: Path, dice: random.Random) -> None:
    any_file(folder, dice).unlink()


def rename(folder: Path, dice: random.Random) -> None:
    any_file(folder, dice).rename(folder / dice.choice(["model.safetensors", "cpq_model.safetensors", "x", INDEX]))


def swap_files(folder: Path, dice: random.Random) -> None:
    one, other = any_file(folder, dice), any_file(folder, dice)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def replace_by_folder(folder: Path, dice: random.Random) -> None:
    file = any_file(folder, dice)
    file.unlink()
    file.mkdir()


def read(file: Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def write(file: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def change_header(folder: Path, dice: random.Random) -> None:
    """Forge the header of a file: names, types, shapes, places of tensors."""
    file = weights(folder, dice)
    header, data = read(file)
    names = [name for name in header if name != "__metadata__"]
    one, other = dice.choice(names), dice.choice(names)
    entry = header[one]
    kind = dice.randrange(9)
    if kind == 0:
        header[one + dice.choice(["", "x", ".weight_packed"])] = header.pop(one)
    elif kind == 1:
        header[one], header[other] = header[other], header[one]
    elif kind == 2:
        entry["dtype"] = dice.choice(["I32", "F32", "I64", "F16", "BF16", "U8", "BOOL", "F8_E4M3", "F4", "C64", "x"])
    elif kind == 3:
        entry["shape"] = entry["shape"][::-1] if dice.random() < 0.5 else [1, *entry["shape"]]
    elif kind == 4:
        entry["shape"] = dice.choice([[10**12], [2**40, 2**40], [-1], [0], [], [1.5]])
    elif kind == 5:
        entry["data_offsets"] = dice.choice([[0, 10**15], [10**15, 0], [0, 0], header[other]["data_offsets"]])
    elif kind == 6:
        header["forged"] = {"dtype": "F32", "shape": [10**12], "data_offsets": [len(data), len(data) + 4 * 10**12]}
    elif kind == 7:
        header["stranger.weight"] = {"dtype": "U8", "shape": [5], "data_offsets": [len(data), len(data) + 5]}
        data += b"hello"
    else:
        change(header, dice)
    write(file, header, data)


def forge_length(folder: Path, dice: random.Random) -> None:
    file = weights(folder, dice)
    data = file.read_bytes()
    file.write_bytes(struct.pack("<Q", dice.choice([0, 1, 10**6, 10**8, 2**40, 2**63, 2**64 - 1])) + data[8:])


def reshard(folder: Path, dice: random.Random) -> None:
    """Other shards with an index that fits (the same model), or one that lost a shard or names one twice."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        header, data = read(file)
        header.pop("__metadata__", None)
        tensors |= {n: (e, data[e["data_offsets"][0] : e["data_offsets"][1]]) for n, e in header.items()}
        file.unlink()
    count = dice.randrange(1, 5)
    shards: dict[str, list[str]] = {f"part{number}.safetensors": [] for number in range(count)}
    for name in tensors:
        shards[dice.choice(list(shards))].append(name)
    if dice.random() < 0.3:
        shards["part0.safetensors"].append(dice.choice(list(tensors)))  # perhaps a second time
    for shard, names in shards.items():
        header, data = {"__metadata__": {"format": "pt"}}, b""
        for name in dict.fromkeys(names):
            entry, content = tensors[name]
            header[name] = entry | {"data_offsets": [len(data), len(data) + len(content)]}
            data += content
        write(folder / shard, header, data)
    index = {"metadata": {}, "weight_map": {name: shard for shard, names in shards.items() for name in names}}
    if dice.random() < 0.3:
        lost = dice.choice(list(shards))
        index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if shard != lost}
    (folder / INDEX).write_text(json.dumps(index))


DAMAGES: list[Callable[[Path, random.Random], None]] = [
    *(flip_bits, flip_bits, overwrite, truncate, append, delete, rename, swap_files, replace_by_folder),
    *(change_config, change_quantization, change_quantization, forge_quantization, forge_quantization, change_index),
    *(change_text, change_header, change_header, forge_length, reshard),
]


class Checkpoints:
    """The whole checkpoints, what they answer, and what became of damaged ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.expected: dict[str, torch.Tensor] = {}
        self.classes: dict[str, Any] = {}
        for name, config in MODELS.items():
            model = calibrate_model(prepare_model(build(name), config), [inputs(name)])
            self.expected[name] = logits(pack_model(model), inputs(name))
            self.classes[name] = type(model)
            model.save_pretrained(folder / f"{name}-single")
            model.save_pretrained(folder / f"{name}-sharded", max_shard_size="2KB")

    def needs_auto_class(self, copy: Path) -> bool:
        """Whether the index, or what config.json says of the model itself, is not the whole one's.

        A model class that is named directly keeps no path that the plugin could look at before these are used.
        """
        whole = copy.parent / "whole"
        try:
            if (copy / INDEX).read_bytes() != (whole / INDEX).read_bytes():
                return True
            one, other = (json.loads((folder / "config.json").read_text()) for folder in (copy, whole))
            return dict(one, quantization_config=0) != dict(other, quantization_config=0)
        except (OSError, ValueError, TypeError, RecursionError):
            return True

    def damage(self, seed: int, asked: list[bool]) -> str:
        """Damage a copy; the outcome, or `AssertionError`."""
        dice = random.Random(seed)
        name = dice.choice(list(MODELS))
        copy, kind = self.folder / "copy", dice.choice(["single", "sharded"])
        for folder in (copy, self.folder / "whole"):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(self.folder / f"{name}-{kind}", folder)
        function = dice.choice(DAMAGES)
        function(copy, dice)
        auto = self.needs_auto_class(copy) or dice.random() < 0.5
        load = auto_class(name).from_pretrained if auto else self.classes[name].from_pretrained
        what = f"seed {seed}, {function.__name__} of {name}, {'auto' if auto else 'its'} class"
        try:
            verify_checkpoint(copy)
            whole = True
        except CPQError:
            whole = False
        except BaseException as error:
            raise AssertionError(
                f"{what}: {type(error).__name__} instead of CPQError from verify_checkpoint"
            ) from error
        asked.clear()
        try:
            model = load(copy)
            same = torch.equal(logits(model, inputs(name)), self.expected[name])
        except CPQError:
            return "CPQError" if not whole else "CPQError on loading alone"
        except BaseException as error:
            if asked or not isinstance(error, Exception):
                raise AssertionError(f"{what}: {type(error).__name__} instead of CPQError on loading") from error
            return "transformers' own error"
        if function is forge_quantization:
            return "same" if same else "another model, forged"
        assert same, f"{what}: another model"
        return "same" if whole else "same, though verify_checkpoint raises"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture
def asked(monkeypatch) -> list[bool]:
    """Filled once transformers has turned to the plugin."""
    calls: list[bool] = []
    make = CPQConfig.from_dict.__func__

    def from_dict(cls, *args, **kwargs):
        calls.append(True)
        return make(cls, *args, **kwargs)

    monkeypatch.setattr(CPQConfig, "from_dict", classmethod(from_dict))
    return calls


def fuzz(checkpoints: Checkpoints, asked: list[bool], seeds: range) -> Counter[str]:
    before, slowest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0
    outcomes: Counter[str] = Counter()
    for seed in seeds:
        started = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of transformers, about configs that make no sense
            outcomes[checkpoints.damage(seed, asked)] += 1
        slowest = max(slowest, time.process_time() - started)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300_000, f"memory has grown by {grown} KB"
    assert slowest < 10, f"one took {slowest} s"
    assert outcomes["CPQError"] > len(seeds) / 2
    assert outcomes["same"] > 0
    return outcomes


def test_damage_at_random(checkpoints, asked):
    fuzz(checkpoints, asked, range(150))


@pytest.mark.slow
def test_much_damage_at_random(checkpoints, asked):
    outcomes = fuzz(checkpoints, asked, range(1000, 3500))
    sys.stdout.write(f"{sum(outcomes.values())} damaged checkpoints: {dict(outcomes)}\n")
