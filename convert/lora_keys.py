"""What a key of a LoRA file means: which component, which of its outside modules, and which part of an adapter.

Three styles are told apart by how a key begins: diffusers/PEFT (`transformer.`), kohya (`lora_unet_`, dots written as
underscores) and ComfyUI (`diffusion_model.`). The modules' names are those of the tables, in either layout.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from convert.components import Component
from convert.tables import Layout, Row
from dit_jax.config import UserError

Role = Literal["down", "up", "alpha", "up_bias", "weight", "bias"]

# How a key begins -> (component, style); the first that fits counts. Only kohya writes dots as underscores.
PREFIXES: tuple[tuple[str, str, str], ...] = (
    ("lora_unet__", "transformer", "kohya"),
    ("lora_unet_", "transformer", "kohya"),
    ("lora_transformer_", "transformer", "kohya"),
    ("lora_te1_", "text_encoder", "kohya"),
    ("lora_te2_", "text_encoder_2", "kohya"),
    ("lora_te3_", "text_encoder_2", "kohya"),
    ("lora_te_", "text_encoder", "kohya"),
    ("model.diffusion_model.", "transformer", "comfyui"),
    ("diffusion_model.", "transformer", "comfyui"),
    ("text_encoders.clip_l.transformer.", "text_encoder", "comfyui"),
    ("text_encoders.umt5xxl.transformer.", "text_encoder", "comfyui"),
    ("text_encoders.t5xxl.transformer.", "text_encoder_2", "comfyui"),
    ("base_model.model.", "transformer", "diffusers"),
    ("transformer_2.", "transformer_2", "diffusers"),
    ("transformer.", "transformer", "diffusers"),
    ("text_encoder_2.", "text_encoder_2", "diffusers"),
    ("text_encoder.", "text_encoder", "diffusers"),
    ("", "transformer", "diffusers"),
)

_DOWN = r"lora_A|lora_down|lora\.down|lora_linear_layer\.down"
_UP = r"lora_B|lora_up|lora\.up|lora_linear_layer\.up"
_ADAPTER_NAME = r"(\.[^.]+)?"
# How a key ends -> (part of an adapter, what then ends the module's name).
SUFFIXES: tuple[tuple[re.Pattern[str], Role, str], ...] = (
    (re.compile(rf"\.({_DOWN}){_ADAPTER_NAME}\.weight$"), "down", ""),
    (re.compile(rf"\.({_UP}){_ADAPTER_NAME}\.weight$"), "up", ""),
    (re.compile(rf"\.({_UP}){_ADAPTER_NAME}\.bias$"), "up_bias", ""),
    (re.compile(r"\.alpha$"), "alpha", ""),
    (re.compile(r"\.diff$"), "weight", ""),
    (re.compile(r"\.diff_b$"), "bias", ""),
    (re.compile(r"\.diff_m$"), "weight", ".modulation"),
)

# What is no plain LoRA, and would be silently wrong if only its familiar keys were read.
_OTHER_ADAPTERS = (
    (re.compile(r"dora_scale|lora_magnitude_vector"), "a DoRA, whose magnitudes depend on the weights below it"),
    (re.compile(r"\.hada_w"), "a LoHa, a product of two low-rank pairs"),
    (re.compile(r"\.lokr_"), "a LoKr, a Kronecker product"),
    (re.compile(r"\.lora_mid\."), "a LoCon with a middle factor"),
    (re.compile(r"\.(oft_|boft_)"), "an OFT, a rotation"),
)
_CONTROL = re.compile(r"(query|key)_norm\.scale$|\.norm_(added_)?[qk]\.weight$|\.(lora_A|lora_down)(\.[^.]+)?\.bias$")


@dataclass(frozen=True)
class Address:
    """A key of a LoRA file, taken apart; `module` has underscores for dots in kohya's style."""

    component: str
    module: str
    role: Role
    style: str


@dataclass(frozen=True, kw_only=True)
class Module:
    """A module of the outside world: the rows of its weight and of its bias, under its name in one layout."""

    name: str
    layout: Layout
    weight: tuple[Row, ...] = ()
    bias: tuple[Row, ...] = ()

    @property
    def is_matrix(self) -> bool:
        """Whether its weight takes a low-rank pair."""
        return bool(self.weight) and all(row.is_matrix(self.layout) for row in self.weight)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A component that a LoRA may add to; `shapes` (leaf -> shape) is None where no model is at hand."""

    rows: Sequence[Row]
    canonical: Callable[[str], str | None] = lambda key: key
    shapes: Mapping[str, tuple[int, ...]] | None = None

    @classmethod
    def of(cls, component: Component) -> Target:
        """The target that a component of a checkpoint is."""
        return cls(rows=component.rows, canonical=component.canonical, shapes=component.shapes)

    @cached_property
    def modules(self) -> dict[str, Module]:
        """Every module under its names in both layouts, with `{i}` for the block."""
        return _modules(self.rows, "original") | _modules(self.rows, "diffusers")

    @cached_property
    def matrices(self) -> dict[str, Row]:
        """Our leaf -> its row, of those that diffusers' LoRAs have low-rank pairs of."""
        modules = [module for module in self.modules.values() if module.layout == "diffusers" and module.is_matrix]
        return {row.ours: row for module in modules for row in module.weight}

    @cached_property
    def flat_modules(self) -> dict[str, Module]:
        """The same with kohya's names."""
        return {name.replace(".", "_"): module for name, module in self.modules.items()}

    def find(self, address: Address) -> tuple[Module, int | None] | None:
        """The module that a key speaks of, and its block; None when there is none."""
        modules, name = self.modules, address.module
        if address.style == "kohya":
            modules = self.flat_modules
        elif name not in modules:
            canonical = self.canonical(f"{name}.weight") or ""
            name = canonical.removesuffix(".weight")
        if name in modules:
            return modules[name], None
        # In every table's names the block is the first number that stands alone.
        number = re.search(r"(?<=[._])\d{1,4}(?=[._])", name)
        if number is None:
            return None
        module = modules.get(f"{name[: number.start()]}{{i}}{name[number.end() :]}")
        if module is None or not self._has_block(module, int(number[0])):
            return None
        return module, int(number[0])

    def _has_block(self, module: Module, block: int) -> bool:
        row = (module.weight or module.bias)[0]
        return self.shapes is None or block < self.shapes[row.ours][0]


def _modules(rows: Sequence[Row], layout: Layout) -> dict[str, Module]:
    found: dict[str, Module] = {}
    for row in rows:
        key = row.key(layout)
        name = module_name(key)
        module = found.get(name, Module(name=name, layout=layout))
        if key.endswith(".bias"):
            found[name] = replace(module, bias=(*module.bias, row))
        elif key:
            found[name] = replace(module, weight=(*module.weight, row))
    return found


def module_name(key: str) -> str:
    """`blocks.{i}.attn1.to_q` of the key of its weight or bias; a parameter that is neither is a module of its own."""
    return key.removesuffix(".weight").removesuffix(".bias")


def address_of(key: str, file: Path) -> Address | None:
    """A key taken apart; None for one that is no part of a LoRA.

    Raises UserError for a key that only other kinds of adapters have.
    """
    for pattern, kind in (*_OTHER_ADAPTERS, (_CONTROL, "a control LoRA, which replaces norms or adds to the input")):
        if pattern.search(key):
            raise UserError(
                f"{file} is {kind} ({key}): expected a plain LoRA of low-rank pairs; use another file, or merge this "
                "one with the program that made it."
            )
    for pattern, role, ending in SUFFIXES:
        suffix = pattern.search(key)
        if suffix:
            prefix, component, style = next(entry for entry in PREFIXES if key.startswith(entry[0]))
            return Address(component, key[len(prefix) : suffix.start()] + ending, role, style)
    return None


def is_adapter_key(key: str) -> bool:
    """Whether a key is of a LoRA or of another kind of adapter, and not of a model."""
    suffixes, adapters = (pattern for pattern, _, _ in SUFFIXES), (pattern for pattern, _ in _OTHER_ADAPTERS)
    return any(pattern.search(key) for pattern in (*suffixes, *adapters))
