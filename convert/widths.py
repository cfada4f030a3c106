"""Checkpoints whose blocks keep fewer heads and neurons: leaves that are cut where they are read, and their config."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from convert.checkpoint import Checkpoint
from convert.components import Settings, component_of
from convert.flux import flux_settings
from convert.leaves import Leaf
from convert.original import CONFIG
from convert.wan import wan_settings
from dit_jax.methods.pruning import Widths
from dit_jax.models.wan import WanConfig
from dit_jax.sharding import AxesTable, logical_axes

_SETTINGS: dict[str, Callable[[Any], Settings]] = {
    "WanTransformer3DModel": wan_settings,
    "FluxTransformer2DModel": flux_settings,
}


def with_widths(checkpoint: Checkpoint, widths: Mapping[str, Widths], norm_counts_pruned: bool) -> Checkpoint:
    """The checkpoint with narrower transformers: component -> what is kept of it.

    Nothing is read until the new checkpoint's leaves are; then block by block.
    norm_counts_pruned  Wan: queries and keys are normalised as if the heads that are gone were there with zeros
    """
    settings, files, edited = dict(checkpoint.settings), dict(checkpoint.files), dict(checkpoint.edited)
    for name, kept in widths.items():
        component = checkpoint.component(name)
        sizes = {"heads": kept.kept_heads, "mlp_width": kept.kept_neurons}
        if norm_counts_pruned and _has_all_heads(component.config) and kept.kept_heads < component.config.heads:
            sizes["norm_counts_pruned"] = True
        config = replace(component.config, **sizes)
        # What diffusers wrote beside the sizes (its version, say) stays.
        settings[name] = {**_without_pruned(checkpoint.settings[name]), **_SETTINGS[component.class_name](config)}
        files[f"{name}/{CONFIG}" if name else CONFIG] = (json.dumps(settings[name], indent=2) + "\n").encode()
        edited[name] = cut_leaves(checkpoint.leaves(name), component.axes, kept)
        assert component_of(settings[name], checkpoint.folder).config == config
    return replace(checkpoint, settings=settings, files=files, edited=edited, _components={})


def _has_all_heads(config: Any) -> bool:
    """Whether it is a Wan whose norms can count pruned heads; one that was pruned before keeps what it does."""
    return isinstance(config, WanConfig) and config.heads * config.head_width == config.width


def _without_pruned(settings: Settings) -> Settings:
    return {key: value for key, value in settings.items() if key != "pruned"}


def cut_leaves(leaves: Mapping[str, Leaf], axes: AxesTable, widths: Widths) -> dict[str, Leaf]:
    """The leaves with only the kept heads and neurons, read block by block when their turn comes."""
    kept = {"heads": widths.heads, "mlp": widths.neurons}
    return {name: _cut(name, leaf, axes, kept) for name, leaf in leaves.items()}


def _cut(name: str, leaf: Leaf, axes: AxesTable, kept: Mapping[str, Mapping[str, np.ndarray]]) -> Leaf:
    logical = logical_axes(name, axes)
    for axis, groups in kept.items():
        for module, indexes_GK in groups.items():
            if name.startswith(f"{module}.") and axis in logical:
                return _taken(leaf, logical.index(axis), indexes_GK)
    return leaf


def _taken(leaf: Leaf, axis: int, indexes_GK: np.ndarray) -> Leaf:
    if indexes_GK.shape[1] == leaf.shape[axis]:
        return leaf
    shape = (*leaf.shape[:axis], indexes_GK.shape[1], *leaf.shape[axis + 1 :])

    def read(block: int | None) -> np.ndarray:
        if block is None:
            return np.stack([read(each) for each in range(len(indexes_GK))])
        return np.take(leaf.block(block), indexes_GK[block], axis=axis - 1)

    return Leaf(shape, leaf.dtype, True, read)
