"""Everything of transformers and accelerate that the package uses without a promise that it stays.

One function or constant per borrowed name; its docstring names the line of the other package that it relies on. For
each there is a test in tests/hf/test_private_apis.py, which fails by that name when a new version changes it. No
other file uses a private attribute of these packages. What is borrowed from torch is in torch_private.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import metadata_load, metadata_save
from torch import nn

# Methods with a private name that the package overrides, because the other package's base class calls them.
OVERRIDDEN = {
    "_process_model_before_weight_loading": '"self._process_model_before_weight_loading(model" in '
    "`HfQuantizer.preprocess_model`, whose docstring says to override it",
    "_process_model_after_weight_loading": '"return self._process_model_after_weight_loading(model" in '
    "`HfQuantizer.postprocess_model`, whose docstring says to override it",
    "_dequantize": '"model = self._dequantize(model" in `HfQuantizer.dequantize`',
    "_apply_gate": '"self._apply_gate(" in `transformers.integrations.moe`: what is between both weights of experts',
}


# --- saving and loading ----------------------------------------------------------------------------------------------


def save_under_own_names(model: Any) -> None:
    """Have a model save its tensors under the names that they have in the model.

    `transformers.core_model_loading.revert_weight_conversion`, by which `save_pretrained` gives tensors their names of
    the Hub, reads "getattr(model, "_weight_conversions", None)": an empty list reverts nothing.
    """
    model._weight_conversions = []


@contextmanager
def names_of_the_hub(model: Any) -> Iterator[None]:
    """End [`save_under_own_names`] for the duration of the context.

    Without the attribute, `revert_weight_conversion` looks the conversions up: "get_model_conversion_mapping(model".
    """
    kept = vars(model).pop("_weight_conversions", None)
    try:
        yield
    finally:
        if kept is not None:
            model._weight_conversions = kept


def expect_missing(model: Any, pattern: str) -> None:
    """Tell `from_pretrained` that tensors whose name matches `pattern` need not be in the checkpoint.

    `PreTrainedModel._adjust_missing_and_unexpected_keys` reads "self._keys_to_ignore_on_load_missing".
    """
    model._keys_to_ignore_on_load_missing = {*(model._keys_to_ignore_on_load_missing or ()), pattern}


def stop_expecting(model: Any, pattern: str) -> None:
    """Take back [`expect_missing`]."""
    model._keys_to_ignore_on_load_missing.discard(pattern)


def names_not_saved(model: Any) -> set[str]:
    """Return the names of tensors that are not saved: "in self._keys_to_ignore_on_save" in `save_pretrained`."""
    return set(model._keys_to_ignore_on_save or ())


def mark_initialized(target: Any, value: bool = True) -> None:
    """Say that a module or tensor has its values, so that `from_pretrained` does not initialize it.

    "if getattr(module, "_is_hf_initialized", False): return" in `PreTrainedModel._initialize_weights`, and the same of
    tensors in `transformers.initialization`.
    """
    target._is_hf_initialized = value


def was_loaded(tensor: Any) -> bool:
    """Return whether a tensor came out of the checkpoint that was loaded.

    "param_value._is_hf_initialized = True" in `transformers.core_model_loading.set_param_for_module`.
    """
    return bool(getattr(tensor, "_is_hf_initialized", False))


def initialize_module(model: Any, module: nn.Module) -> None:
    """Initialize one module as `from_pretrained` does: "self._init_weights(module)" in `_initialize_weights`."""
    model._init_weights(module)


# --- configs ---------------------------------------------------------------------------------------------------------


def mark_quantized(config: Any) -> None:
    """Say in a config that its model is quantized, as `from_pretrained` does.

    `transformers.quantizers.base._assign_is_quantized` does it there. A few models then compute otherwise in the last
    digits: "if hasattr(self.config, "_is_quantized")" in `FalconMambaMixer.slow_forward` and in Jamba's.
    """
    config._is_quantized = True


def attention_implementation(config: Any) -> str | None:
    """Return what `from_pretrained(attn_implementation=...)` has set: "config._attn_implementation =" there."""
    name: str | None = config._attn_implementation
    return name


def experts_implementation(config: Any) -> str | None:
    """Return what `from_pretrained(experts_implementation=...)` has set: "config._experts_implementation =" there."""
    name: str | None = getattr(config, "_experts_implementation", None)
    return name


def auto_class_name(model: Any) -> str | None:
    """Return the name of the auto class that loads this class of models, or None.

    "cls._model_mapping" in `_BaseAutoModelClass.from_pretrained`: config class -> model class.
    """
    for name, loader in vars(transformers.models.auto.modeling_auto).items():
        mapping = getattr(loader, "_model_mapping", None)
        if name.startswith("Auto") and mapping is not None and mapping.get(type(model.config), None) is type(model):
            return name
    return None


# --- modules ---------------------------------------------------------------------------------------------------------


def hook_of(module: nn.Module) -> Any:
    """Return the hook of accelerate on a module, or None: "module._hf_hook = hook" in `add_hook_to_module`."""
    return getattr(module, "_hf_hook", None)


def has_gate(module_class: type[nn.Module]) -> bool:
    """Return whether fused experts call "self._apply_gate(" between their two weights; see `OVERRIDDEN`."""
    return hasattr(module_class, "_apply_gate")


# --- the model card of a Trainer -------------------------------------------------------------------------------------


@dataclass
class _LastWord:
    model: Any
    card: Path
    before: str
    complete: Callable[[], None]

    def __call__(self, directory: str) -> None:
        del vars(self.model)["create_or_update_model_card"]
        self.complete()


def take_last_word(model: Any, card: Path, complete: Callable[[], None]) -> None:
    """Have the `Trainer` that is about to write a model card call `complete` when it has written.

    `Trainer.push_to_hub` writes the card last, over whatever is there, and uploads the folder at once: no callback is
    called between, nothing of the old card but its tags is kept, and the upload leaves out no `README.md`. One line of
    `Trainer.create_model_card` lets a model complete the card: "if is_peft_library: self.accelerator.unwrap_model(
    self.model).create_or_update_model_card(self.args.output_dir)", with "is_peft_library = library_name == "peft"" of
    the card that was there before. So the card says that until then.
    """
    vars(model)["create_or_update_model_card"] = _LastWord(model, card, card.read_text(encoding="utf-8"), complete)
    metadata_save(card, (metadata_load(card) or {}) | {"library_name": "peft"})


def drop_last_word(model: Any) -> None:
    """Undo [`take_last_word`] where the Trainer has not come to it: the card is as it was."""
    word = vars(model).pop("create_or_update_model_card", None)
    if word is not None:
        word.card.write_text(word.before, encoding="utf-8")
