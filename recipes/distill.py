"""Let the float model teach its 2-bit copy, and train another 2-bit copy without a teacher to compare.

    python recipes/distill.py

needs no network: the text is the source code of the Python standard library, and a small Llama is made here and
trained in float first. Perplexity is that of files it never saw. Your own model and data:

    accelerate launch --config_file recipes/accelerate/one_gpu.yaml recipes/distill.py \
        --model_name_or_path meta-llama/Llama-3.2-1B --dataset_name Salesforce/wikitext \
        --dataset_config wikitext-2-raw-v1 --block_size 1024 --weight_bits 2 \
        --per_device_train_batch_size 4 --gradient_accumulation_steps 8 --learning_rate 2e-5 --bf16

Every setting of CPQConfig and TrainingArguments is an option, as `--resume_from_checkpoint True` or `--push_to_hub`.
`output_dir` then holds `float`, and in `alone` and `distilled` each `trained` (can be trained further) and `packed`.
"""

from __future__ import annotations

import itertools
import math
import shutil
import sysconfig
from dataclasses import dataclass, field, replace
from pathlib import Path

import datasets
import torch
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers import AutoModelForCausalLM as AutoModel
from transformers import GPT2Tokenizer as SmallTokenizer
from transformers.data.data_collator import default_data_collator
from transformers.trainer_utils import get_last_checkpoint

import cpq_hf
from cpq_hf import CPQCallback, CPQConfig, CPQError, CPQOptimizer

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 192}  # fmt: skip


@dataclass
class Arguments:
    model_name_or_path: str | None = field(default=None, metadata={"help": "model of the Hub, or folder"})
    teacher_name_or_path: str | None = field(default=None, metadata={"help": "another teacher than the float model"})
    dataset_name: str | None = field(default=None, metadata={"help": "data set of the Hub, or folder; else source"})
    dataset_config: str | None = field(default=None, metadata={"help": "which of its configurations"})
    text_column: str = field(default="text", metadata={"help": "its column of text"})
    block_size: int = field(default=512, metadata={"help": "tokens in a row of training; 128 for a small model"})
    float_epochs: float = field(default=0, metadata={"help": "epochs in float first; 3 for a small model"})
    float_lr: float = field(default=2e-5, metadata={"help": "its rate; 4e-3 for a small model"})
    distillation_weight: float = field(default=0.9, metadata={"help": "share of the teacher in the loss"})
    temperature: float = field(default=1.0, metadata={"help": "softens what the teacher says"})
    overwrite: bool = field(default=False, metadata={"help": "replace the packed models in output_dir"})


def parse() -> tuple[Arguments, CPQConfig, TrainingArguments]:
    gpu = torch.accelerator.is_available()
    parser = HfArgumentParser((Arguments, CPQConfig, TrainingArguments))
    parser.set_defaults(
        output_dir="runs/distill", weight_bits=2, learning_rate=2e-5, lr_scheduler_type="cosine", warmup_steps=0.1,
        per_device_train_batch_size=16, per_device_eval_batch_size=16, logging_steps=50, num_train_epochs=1,
        prediction_loss_only=True, dataloader_pin_memory=gpu, use_cpu=not gpu, ddp_find_unused_parameters=False,
    )  # fmt: skip
    if parser.parse_args().model_name_or_path is None:  # a small model that knows nothing yet
        parser.set_defaults(float_epochs=3, float_lr=4e-3, num_train_epochs=0.5, learning_rate=1e-3, block_size=128)
    return parser.parse_args_into_dataclasses()


def library_text(part: str) -> datasets.Dataset:
    """Modules of the standard library: every twentieth is for the test."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    chosen = [file for number, file in enumerate(files) if (number % 20 == 0) == (part == "test")]
    return datasets.Dataset.from_dict({"text": [file.read_text(encoding="utf-8") for file in chosen]})


def load_data(args: Arguments, seed: int) -> datasets.DatasetDict:
    """The parts `train` and `test` with a column of text."""
    if args.dataset_name is None:
        data = datasets.DatasetDict({part: library_text(part) for part in ("train", "test")})
    else:
        data = datasets.load_dataset(args.dataset_name, args.dataset_config)
    if "train" not in data:
        raise SystemExit(f"the data have no part 'train', only: {', '.join(data)}")
    features = data["train"].features
    if args.text_column not in features:
        raise SystemExit(f"the data have no column {args.text_column!r}; set --text_column to: {', '.join(features)}")
    if "string" not in getattr(features[args.text_column], "dtype", ""):
        raise SystemExit(f"the column {args.text_column!r} holds no text; set --text_column to one that does")
    test = next((name for name in ("validation", "test") if name in data), None)
    if test is None:
        return data["train"].train_test_split(test_size=0.1, seed=seed)
    return datasets.DatasetDict(train=data["train"], test=data[test])


def load_float(args: Arguments, texts: list[str]):
    """A model and its tokenizer."""
    if (source := args.model_name_or_path) is not None:
        return AutoModel.from_pretrained(source, dtype=torch.float32), AutoTokenizer.from_pretrained(source)
    tokenizer = SmallTokenizer().train_new_from_iterator(texts, 1024, show_progress=False)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    shape = SMALL | {"vocab_size": len(tokenizer), "max_position_embeddings": args.block_size}
    return AutoModel.from_config(AutoConfig.for_model("llama", **shape, **ends)), tokenizer


def main() -> None:
    args, config, training = parse()
    output, resume = Path(training.output_dir), training.resume_from_checkpoint
    push, training.push_to_hub = training.push_to_hub, False  # the packed model only, in the end
    folders = [output / name for name in ("alone", "distilled")]
    named = None if resume in (None, "True") else Path(resume).resolve().parent
    if named is not None and named not in [folder.resolve() for folder in folders]:
        raise SystemExit(f"{resume} is no checkpoint in {folders[0]} or {folders[1]}; give one, or True")
    packed = [folder for folder in folders if (folder / "packed").exists()]
    done = [folder for folder in packed if resume is not None and folder.resolve() != named]
    if packed != done and not args.overwrite:
        raise SystemExit(f"{output} holds a packed model; choose another --output_dir, or --overwrite it")
    if resume is not None:  # the float model of the run that was interrupted
        args.model_name_or_path = str((output / "float").resolve())
    set_seed(training.seed)
    datasets.disable_progress_bars()
    data = load_data(args, training.seed)
    model, tokenizer = load_float(args, data["train"][args.text_column])

    def to_blocks(batch):
        """All texts in one line, cut into rows of equal length; what is left over is dropped."""
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        texts = tokenizer(batch[args.text_column], add_special_tokens=False, verbose=False)["input_ids"]
        line = [*itertools.chain.from_iterable(text + end for text in texts)]
        starts = range(0, len(line) - args.block_size + 1, args.block_size)
        blocks = [line[start : start + args.block_size] for start in starts]
        return {"input_ids": blocks, "labels": blocks}

    with training.main_process_first():  # the others read what it stored
        data = data.map(to_blocks, batched=True, remove_columns=data["train"].column_names)
    if not all(map(len, data.values())):
        raise SystemExit(f"too little text for one row of {args.block_size} tokens; set a smaller --block_size")
    parts = {"train_dataset": data["train"], "eval_dataset": data["test"], "processing_class": tokenizer}
    parts["data_collator"] = default_data_collator

    def perplexity(model) -> float:
        run = Trainer(model, training, **parts)
        run.is_fsdp_enabled = run.is_deepspeed_enabled = False  # they cannot evaluate what they did not train
        return math.exp(run.evaluate()["eval_loss"])

    if resume is None:  # 1. the float model, trained if asked for
        floating = {"num_train_epochs": args.float_epochs, "learning_rate": args.float_lr, "save_strategy": "no"}
        run = Trainer(model, replace(training, load_best_model_at_end=False, **floating), **parts)
        if args.float_epochs:
            run.train()
        run.save_model(output / "float")
        run.accelerator.wait_for_everyone()
    for folder in {*packed} - {*done}:  # --overwrite
        shutil.rmtree(folder / "packed", ignore_errors=True)
    rows = [("float", None, perplexity(AutoModel.from_pretrained(output / "float")), None)]
    teacher = AutoModel.from_pretrained(args.teacher_name_or_path or output / "float", dtype=torch.float32)

    for folder in folders:
        set_seed(training.seed)  # 2. on the grid, and trained there, unless the run that was interrupted has done it
        model = AutoModel.from_pretrained(output / "float", quantization_config=config)
        if folder.name == "distilled":
            cpq_hf.distill(model, teacher, weight=args.distillation_weight, temperature=args.temperature)
        cpq = {"callbacks": [CPQCallback()], "optimizer_cls_and_kwargs": (CPQOptimizer, {"args": training})}
        run = Trainer(model, replace(training, output_dir=str(folder)), **parts, **cpq)
        cpq_hf.calibrate_model(model.to(training.device), itertools.islice(run.get_train_dataloader(), 4))
        rounded = perplexity(model)
        if folder not in done:
            last = None if resume is None else get_last_checkpoint(folder)
            run.train(resume_from_checkpoint=resume if folder.resolve() == named else last)
            run.save_model(folder / "trained")
        run.accelerator.wait_for_everyone()
        model = AutoModel.from_pretrained(folder / "trained")
        trained = perplexity(model)

        cpq_hf.pack_model(model)  # 3. as integers; saved by one process, loaded again by all
        if run.is_world_process_zero():
            model.save_pretrained(folder / "packed")
            tokenizer.save_pretrained(folder / "packed")
        run.accelerator.wait_for_everyone()
        model = AutoModel.from_pretrained(folder / "packed")
        rows.append((folder.name, rounded, trained, perplexity(model)))

    if run.is_world_process_zero():
        report, size = cpq_hf.summarize(model), cpq_hf.verify_checkpoint(folder / "packed")["bytes"]
        print(f"\n{report}\n\nPerplexity\n{'model':10}{'rounded':>12}{'trained':>12}{'reloaded':>12}")
        for name, *values in rows:
            print(f"{name:10}" + "".join(f"{'-' if value is None else format(value, '.4f'):>12}" for value in values))
        print(f"{folder / 'packed'}: mean {report.mean_bits:.2f} bits, {size / 1e6:.3f} MB")
        for part in (model, tokenizer) if push else ():
            part.push_to_hub(training.hub_model_id or output.name, private=training.hub_private_repo)
    run.accelerator.end_training()
    if any(trained != reloaded for _, _, trained, reloaded in rows[1:]):
        raise SystemExit("a packed model does not score as the trained one")


if __name__ == "__main__":
    try:
        main()
    except (CPQError, OSError) as error:  # a setting or a name to set right, which it says
        raise SystemExit(f"{error}") from error
