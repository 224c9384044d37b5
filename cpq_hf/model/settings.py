"""Validate the settings of a quantized model, and match module names against their patterns."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any

from ..errors import CPQError
from ..tensor.fake_quantize import MAX_NOISE, MIN_NOISE
from ..tensor.spec import MIN_BITS, ActivationSpec, LayerSpec, WeightSpec, check_bits, check_granularity

OVERRIDABLE = ("weight_bits", "activation_bits", "granularity", "group_size", "learn_bits")
BUDGETS = ("weights", "macs")
# what decides which tensors a model gets and what their numbers mean; the rest only steers training
CHECKPOINT_FIELDS = (
    *OVERRIDABLE, "centered", "min_bits", "learn_activation_bits", "quantize_embeddings", "modules_to_not_convert",
    "overrides",
)  # fmt: skip


@dataclass
class QuantizationSettings:
    """The settings of a quantized model. `CPQConfig` is this plus what transformers needs; its docstring explains
    the fields."""

    weight_bits: int = 4
    activation_bits: int | None = None
    granularity: str = "channel"
    group_size: int = 128
    centered: bool = True
    learn_bits: bool = False
    min_bits: int = MIN_BITS
    target_bits: float | None = None
    budget: str = "weights"
    tie_bits: bool = False
    learn_activation_bits: bool = False
    target_activation_bits: float | None = None
    dropbits: float = 0.0
    activation_dropbits: float = 0.0
    noise_start: float = 1 / 3
    noise_end: float = 0.1
    freeze_oscillating: bool = False
    quantize_embeddings: bool = False
    modules_to_not_convert: list[str] | None = None
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)

    def checkpoint_fields(self) -> dict[str, Any]:
        """The settings that a resumed run has to share with the one that saved, as plain JSON types."""
        return {name: copy.deepcopy(getattr(self, name)) for name in CHECKPOINT_FIELDS}

    def check_resumes(self, saved: dict[str, Any]) -> None:
        """Raise `CPQError` if a checkpoint of a run with other `checkpoint_fields` was `saved`."""
        for name, value in self.checkpoint_fields().items():
            if name in saved and saved[name] != value:
                raise CPQError(
                    f"the checkpoint was saved with `{name}={saved[name]!r}`, this run has `{name}={value!r}`: "
                    "resume with the config that it was saved with, or start a new run from its weights"
                )

    def check(self) -> None:
        """Raise `CPQError` on the first field that breaks its rule."""
        _check_tensor_fields({name: getattr(self, name) for name in OVERRIDABLE})
        check_bits(self.min_bits, "min_bits")
        if self.min_bits > self.weight_bits:
            raise CPQError(f"`min_bits` (={self.min_bits}) is above `weight_bits` (={self.weight_bits}); lower it")
        for name in ("dropbits", "activation_dropbits"):
            _check_number(name, getattr(self, name), 0.0, 0.9)
        for name in ("noise_start", "noise_end"):
            _check_number(name, getattr(self, name), MIN_NOISE, MAX_NOISE)
        for name in ("centered", "quantize_embeddings", "tie_bits", "learn_activation_bits", "freeze_oscillating"):
            _check_flag(name, getattr(self, name))
        skipped = self.modules_to_not_convert
        if skipped is not None and not (_is_list(skipped) and all(isinstance(item, str) for item in skipped)):
            raise CPQError(f"`modules_to_not_convert` must be a list of module names or patterns, got {skipped!r}")
        if not isinstance(self.overrides, dict):
            raise CPQError(
                f'`overrides` must map patterns to fields, as in {{"classifier": {{"weight_bits": 8}}}}; '
                f"got {self.overrides!r}"
            )
        for pattern, changes in self.overrides.items():
            if not isinstance(pattern, str) or not isinstance(changes, dict):
                raise CPQError(f"`overrides[{pattern!r}]` must be a dict of fields, got {changes!r}")
            for name in changes:
                if name not in OVERRIDABLE:
                    raise CPQError(
                        f"`overrides[{pattern!r}]` has the field {name!r}; a module can override "
                        f"{', '.join(OVERRIDABLE)}{suggest(name, OVERRIDABLE)}"
                    )
            try:
                _check_tensor_fields(changes)
            except CPQError as error:
                raise CPQError(f"in `overrides[{pattern!r}]`: {error}") from error
        self._check_widths()

    def _check_widths(self) -> None:
        if self.budget not in BUDGETS:
            raise CPQError(f"`budget` must be one of {', '.join(map(repr, BUDGETS))}, got {self.budget!r}")
        for learn, target, largest in (
            ("learn_bits", "target_bits", "weight_bits"),
            ("learn_activation_bits", "target_activation_bits", "activation_bits"),
        ):
            learned, wanted, most = getattr(self, learn), getattr(self, target), getattr(self, largest)
            anywhere = learned or any(changes.get(learn) for changes in self.overrides.values())
            if most is None and (learned or wanted is not None):
                raise CPQError(f"`{learn if learned else target}` needs `{largest}`, the largest width, to be set")
            if wanted is None:
                continue
            if not anywhere:
                raise CPQError(
                    f"`{target}` (={wanted!r}) goes with `{learn}=True`: without it every layer has `{largest}` "
                    f"(={most}) bits. Set `{learn}=True`, or leave `{target}` out"
                )
            # an override may give a layer a larger width, so only the lower end is certain here
            highest = max([most, *(changes.get(largest) or 0 for changes in self.overrides.values())])
            _check_number(target, wanted, self.min_bits, highest, f" (`min_bits` to the largest `{largest}`)")

    def layer_spec(
        self, name: str, shape: tuple[int, ...], transposed: bool, has_float_input: bool, stacked: bool = False
    ) -> LayerSpec:
        """Return how the module `name` with a weight of this shape is quantized; later overrides win."""
        settings = {key: getattr(self, key) for key in OVERRIDABLE}
        for pattern, changes in self.overrides.items():
            if matches(pattern, name):
                settings |= changes
        grouped = settings["granularity"] == "group"
        learned = settings["learn_bits"] and self.min_bits < settings["weight_bits"]
        weight = WeightSpec(
            shape,
            bits=settings["weight_bits"],
            granularity=settings["granularity"],
            group_size=settings["group_size"] if grouped else None,
            transposed=transposed,
            min_bits=self.min_bits if learned else None,
            centered=self.centered,
            stacked=stacked,
        )
        bits = settings["activation_bits"] if has_float_input else None
        if bits is None:
            return LayerSpec(weight)
        learned = self.learn_activation_bits and self.min_bits < bits
        return LayerSpec(weight, ActivationSpec(bits, min_bits=self.min_bits if learned else None))

    def overridden(self, name: str) -> bool:
        """Return whether some override names this module."""
        return any(matches(pattern, name) for pattern in self.overrides)

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        return tuple(item.name for item in fields(QuantizationSettings))


def matches(pattern: str, name: str) -> bool:
    """Return whether `pattern` means the module `name`.

    With a wildcard (`*`, `?`, `[`) it is `fnmatch` on the whole dotted name. A plain name means the module itself, a
    module whose dotted name ends in it, and everything inside either, as in transformers.
    """
    if any(character in pattern for character in "*?["):
        return fnmatchcase(name, pattern)
    return f".{pattern}." in f".{name}."


def check_patterns(field_name: str, patterns: Iterable[str], names: list[str]) -> None:
    """Raise on a pattern that matches none of `names`, listing near misses."""
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            raise CPQError(
                f"the pattern {pattern!r} in `{field_name}` matches no module that could be quantized"
                f"{suggest(pattern, names) or f'; there are {len(names)}: ' + ', '.join(names[:5]) + ' ...'}"
            )


def suggest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean ...?"` with the nearest of `known`, or nothing."""
    known = list(known)
    tails = {name.rsplit(".", depth)[-depth]: name for name in known for depth in (1, 2) if name.count(".") >= depth}
    plain = word.strip("*.?")
    close = [name for name in known if plain and plain in name][:5]
    for candidate in difflib.get_close_matches(plain, [*known, *tails], n=5, cutoff=0.6):
        name = tails.get(candidate, candidate)
        if name not in close:
            close.append(name)
    return f"; did you mean {', '.join(map(repr, close[:5]))}?" if close else ""


def _check_tensor_fields(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if name == "weight_bits" or (name == "activation_bits" and value is not None):
            check_bits(value, name)
        elif name == "granularity":
            check_granularity(value, name)
        elif name == "group_size" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise CPQError(f"`group_size` must be a positive integer, got {value!r}")
        elif name == "learn_bits":
            _check_flag(name, value)


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple, set, frozenset))


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise CPQError(f"`{name}` must be true or false, got {value!r}")


def _check_number(name: str, value: object, low: float, high: float, meaning: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise CPQError(f"`{name}` must be a number from {low:g} to {high:g}{meaning}, got {value!r}")
