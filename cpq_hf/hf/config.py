"""The config that users write and that is stored in a checkpoint's config.json."""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import re
import reprlib
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import CPQError
from ..model.settings import QuantizationSettings, suggest
from ..tensor.spec import LayerSpec

QUANT_METHOD = "cpq"
FORMAT_VERSION = 1
_STORED_TYPES = {"packed": bool, "layers": dict, "checksums": dict, "config_checksum": int, "base_model": str}
_STORED = ("format_version", *_STORED_TYPES)


@dataclass(repr=False)
class CPQConfig(QuantizationSettings, QuantizationConfigMixin):
    """Settings of Cluster-Promoting Quantization, for `from_pretrained(..., quantization_config=CPQConfig(...))`.

    Args:
        weight_bits (`int`, defaults to 4): Bit-width of weights, 2 to 8.
        activation_bits (`int`, *optional*): Bit-width of the inputs of quantized layers, 2 to 8; None leaves them in
            floating point.
        granularity (`str`, defaults to `"channel"`): What shares a step size: `"tensor"`, `"channel"` (an output
            channel) or `"group"` (`group_size` input features of an output channel).
        group_size (`int`, defaults to 128): Input features per group, with `granularity="group"`. Must divide them.
        centered (`bool`, defaults to True): Give weights of 2 bits the levels -1.5, -0.5, 0.5 and 1.5 steps, which fit
            them better than -2, -1, 0 and 1. Other widths are not touched.
        learn_bits (`bool`, defaults to False): Learn the width of each weight between `min_bits` and `weight_bits`, in
            the first quarter of training; the rest trains at the widths that were decided.
        min_bits (`int`, defaults to 2): Smallest learned width, and the bits that DropBits never drops.
        target_bits (`float`, *optional*): With `learn_bits`, the mean width over the quantized weights to end at or
            under. None leaves it to the loss, which may hold [`bit_penalty`].
        budget (`str`, defaults to `"weights"`): What the mean of `target_bits` counts: `"weights"`, or `"macs"`,
            multiply-accumulates as seen in the first batch.
        tie_bits (`bool`, defaults to False): Learn one width for layers that inference engines fuse: query, key and
            value; gate and up; the experts of a layer.
        learn_activation_bits (`bool`, defaults to False): Learn the width of each layer's inputs between `min_bits`
            and `activation_bits`, as `learn_bits` does for weights.
        target_activation_bits (`float`, *optional*): With `learn_activation_bits`, the mean width over the elements of
            the inputs to end at or under.
        dropbits (`float`, defaults to 0): Rate at which DropBits drops a bit of a weight at the start of training,
            0 to 0.9; it falls to 0 over the first three quarters of training. Not for weights that learn their width.
            Off by default, since 0.1 gained nothing in docs/results.md.
        activation_dropbits (`float`, defaults to 0): Rate at which DropBits drops a bit of an input, as `dropbits`.
        noise_start (`float`, defaults to 1/3): Scale of the logistic noise at the start of training, in grid steps,
            0.02 to 0.5. At 1/2 the estimator is nearly plain straight-through.
        noise_end (`float`, defaults to 0.1): Scale of the noise at the end, for weights: the smaller, the
            more of them cluster on the grid. Activations keep `noise_start`.
        freeze_oscillating (`bool`, defaults to False): Freeze weights that oscillate between two levels. It helps
            where many do: a distilled language model at 2 bits, in docs/results.md; the image models there lose by it.
        quantize_embeddings (`bool`, defaults to False): Quantize `nn.Embedding` too.
        modules_to_not_convert (`list[str]`, *optional*): Names or patterns to leave in floating point. None means
            what transformers leaves out, the output head and tied embeddings; `[]` means nothing.
        overrides (`dict[str, dict]`, *optional*): Other settings for single modules, by name or pattern:
            `weight_bits`, `activation_bits`, `granularity`, `group_size`, `learn_bits`. Later entries win. A module
            named here is quantized even if it is the output head or an embedding. As text, it has to be JSON.
        layers, packed, format_version, checksums, config_checksum: Written into checkpoints, never by hand: the table
            of quantized layers as it was resolved, whether they are packed, and the CRC-32 of each tensor and of
            config.json.
        base_model (`str`, *optional*): Repository of the float model, for the model card. None takes the one that the
            model was loaded from, if it was loaded from the Hub.

    A name without wildcard means the module, any module whose dotted name ends in it, and what is inside them; with
    a wildcard it is matched with `fnmatch` against the whole dotted name.

    Raises:
        CPQError: On a value that breaks its rule; the message names field, value, rule and remedy.

    Example:

    ```python
    >>> from cpq_hf import CPQConfig
    >>> config = CPQConfig(weight_bits=2, activation_bits=4, overrides={"embeddings": {"weight_bits": 8}})
    >>> config.to_dict()["weight_bits"]
    2

    ```
    """

    # text is JSON, from a command line: HfArgumentParser hands it on if the type has `str`, and only beside `None`
    overrides: dict[str, dict[str, Any]] | str | None = field(default_factory=dict)  # type: ignore[assignment]
    layers: dict[str, dict[str, Any]] | None = None
    packed: bool = False
    format_version: int = FORMAT_VERSION
    checksums: dict[str, int] | None = None
    config_checksum: int | None = None
    base_model: str | None = None
    quant_method: str = field(default=QUANT_METHOD, init=False)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if isinstance(self.overrides, str):
            with contextlib.suppress(ValueError):  # then `check` says what it has to be
                self.overrides = json.loads(self.overrides)
        self.overrides = {} if self.overrides is None else self.overrides
        self.check()
        for name, kind in _STORED_TYPES.items():
            value = getattr(self, name)
            if not isinstance(value, kind) and not (value is None and kind is not bool):
                raise CPQError(f"`{name}` in config.json is not a {kind.__name__}, but {reprlib.repr(value)}")

    def resolved(self, layers: dict[str, LayerSpec], packed: bool = False) -> CPQConfig:
        """Return a copy that carries the table of quantized layers."""
        other = copy.deepcopy(self)
        other.note_layers(layers, packed)
        return other

    def note_layers(self, layers: dict[str, LayerSpec], packed: bool = False) -> None:
        """Take up the table of quantized layers; checksums of an earlier save do not hold any more."""
        self.layers = {name: spec.to_dict() for name, spec in layers.items()}
        self.packed, self.checksums, self.config_checksum = packed, None, None

    def layer_specs(self) -> dict[str, LayerSpec]:
        """The stored table of layers, checked."""
        if not isinstance(self.layers, dict) or not self.layers:
            raise CPQError(
                "`quantization_config` of the checkpoint has no table of `layers`; config.json is incomplete"
            )
        specs = {}
        for name, data in self.layers.items():
            try:
                specs[name] = LayerSpec.from_dict(data)
            except CPQError as error:
                raise CPQError(f"`{name}` in the table of quantized layers in config.json: {error}") from error
        for name, spec in specs.items():
            if spec.tied_to is not None and (spec.tied_to not in specs or specs[spec.tied_to].tied_to is not None):
                raise CPQError(f"`{name}` in the table of quantized layers in config.json: tied to no layer of it")
        return specs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read what `to_dict` wrote. A newer layout or an unknown field is a `CPQError`."""
        data = {key: value for key, value in config_dict.items() if key != "quant_method"}
        version = data.get("format_version", FORMAT_VERSION)
        if type(version) is not int or version != FORMAT_VERSION:
            raise CPQError(
                f"the checkpoint has layout version {version!r}, this cpq_hf reads version {FORMAT_VERSION}; "
                "upgrade cpq_hf"
            )
        known = (*cls.field_names(), *_STORED)
        for key in data:
            if key not in known:
                raise CPQError(f"CPQConfig has no field {key!r}{suggest(key, known)}")
        config = cls(**data)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types only."""
        values = {name: copy.deepcopy(getattr(self, name)) for name in (*self.field_names(), *_STORED)}
        return {"quant_method": QUANT_METHOD} | values

    def get(self, key: str, default: Any = None) -> Any:
        """As on a dict: transformers reads `config.quantization_config` this way when a config is used again."""
        return getattr(self, key, default)


def _prepare_for_command_lines() -> None:
    """Set what `HfArgumentParser` reads of each field of `CPQConfig`.

    The help of an option is its text in the docstring; the parser shows a default only beside a help. What a
    checkpoint stores is no option: `CPQConfig(**stored)` takes it, because `__init__` exists by now, but parsers leave
    out fields with `init=False`.
    """
    entries = re.findall(r"^ {4}(\w+) \(.*?\): (.*(?:\n {8}.*)*)", inspect.getdoc(CPQConfig) or "", re.MULTILINE)
    texts = {name: " ".join(text.replace("`", "").split()) for name, text in entries}
    for item in fields(CPQConfig):
        if item.name in _STORED and item.name != "base_model":
            item.init = False
        elif item.name in texts:  # `python -OO` drops docstrings
            item.metadata = MappingProxyType({"help": texts[item.name].replace("%", "%%")})


_prepare_for_command_lines()
