"""The keys and axes that a method's weights have in PyTorch: one table a method, read both ways as a model's is.

A router has the keys of three linear maps. DDiT's adapters have those of diffusers' own model, behind the size that
they are for: `2p.patch_embedding.weight`, `2p.blocks.0.ffn.net.2.lora_A.weight`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flax import nnx

from convert.components import Component, usable_config
from convert.tables import CONV2D, LINEAR, Row, linear_rows
from dit_jax.methods.ddit import Ddit
from dit_jax.methods.method import Part
from dit_jax.methods.patch_adapters import AdapterSettings, abstract_adapters, size_name
from dit_jax.methods.routing import ROUTER, Router, router_config
from dit_jax.parameters import named_leaves

POINTWISE = "o i 1 1 -> i o"


@dataclass(frozen=True, kw_only=True)
class MethodKeys:
    """A method's table for one model; `shapes` are those of our leaves by dotted path."""

    rows: Sequence[Row]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def theirs(self) -> set[str]:
        """All of PyTorch's keys."""
        return {
            row.key("diffusers", block)
            for row in self.rows
            for block in (range(self.shapes[row.ours][0]) if row.stacked("diffusers") else [None])
        }


def method_keys(name: str, settings: Mapping[str, Any], component: Component) -> MethodKeys | None:
    """The table of what a checkpoint holds for a method, of these settings and for this model; None for a method that
    has none.

    Raises UserError for settings that are not those of this method and model.
    """
    if name not in TABLES:
        return None
    with usable_config(name, Path(f"methods/{name}/config.json")):
        return TABLES[name](settings, component)


def _router(settings: Mapping[str, Any], component: Component) -> MethodKeys:
    model: Any = component.abstract
    config = router_config({ROUTER: Part(settings, {})}, sum(model.stacks))
    router = nnx.eval_shape(lambda: Router(config, nnx.Rngs(0)))
    rows = [row for name in ("up", "middle", "out") for row in linear_rows(name, name, name)]
    return MethodKeys(rows=rows, shapes=_shapes(router))


def _adapters(settings: Mapping[str, Any], component: Component) -> MethodKeys:
    sizes = AdapterSettings(**{**settings, "scales": tuple(settings["scales"])})
    adapters = abstract_adapters(component.config, sizes)
    shapes = _shapes(adapters)
    rows = [row for scale in sizes.scales for row in _adapter_rows(scale, component.rows, shapes)]
    return MethodKeys(rows=rows, shapes=shapes)


def _adapter_rows(scale: int, model: Sequence[Row], shapes: Mapping[str, Any]) -> list[Row]:
    """The table of one size, from that of the model."""
    size, rows = size_name(scale), []
    for row in model:
        layer, _, leaf = row.ours.rpartition(".")
        if layer in ("patch", "out"):
            larger = {axis: count * scale if axis in "yx" else count for axis, count in row.sizes.items()}
            rows.append(replace(row, ours=f"{size}.{row.ours}", diffusers=f"{size}.{row.diffusers}", sizes=larger))
        elif leaf == "kernel" and f"{size}.lora.{layer}.down" in shapes:
            key = f"{size}.{row.diffusers.removesuffix('.weight')}"
            for ours, theirs in (("down", "lora_A"), ("up", "lora_B")):
                rows.append(Row(ours=f"{size}.lora.{layer}.{ours}", pattern=LINEAR, diffusers=f"{key}.{theirs}.weight"))
    residual = f"{size}.residual"
    return [
        *rows,
        Row(ours=f"{size}.patch.size", diffusers=f"{size}.size_embedding"),
        Row(ours=f"{residual}.conv", pattern=CONV2D, diffusers=f"{residual}.conv.weight"),
        Row(ours=f"{residual}.conv_bias", diffusers=f"{residual}.conv.bias"),
        *linear_rows(f"{residual}.time", f"{residual}.time", ""),
        *linear_rows(f"{residual}.out", f"{residual}.out", "", POINTWISE),
    ]


def _shapes(module: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in named_leaves(module)}


TABLES: dict[str, Callable[[Mapping[str, Any], Component], MethodKeys]] = {ROUTER: _router, Ddit.name: _adapters}
