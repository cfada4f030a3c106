"""What a checkpoint is, without reading its weights: layout, model, sizes, dtypes, components."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from convert.checkpoint import INDEX, Checkpoint, checkpoint_hash
from convert.components import class_name, read_json
from convert.original import TRANSFORMER
from dit_jax.models.wan import PRESETS, WanConfig


@dataclass(frozen=True, kw_only=True)
class ComponentSummary:
    """One component with weights: its class, parameter count, and the dtypes from the commonest to the rarest."""

    class_name: str
    parameters: int
    bytes: int
    dtypes: list[str]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A checkpoint at a glance; `variant` is a preset's name, or the sizes of a model that is none."""

    path: str
    kind: str
    layout: str
    variant: str
    parameters: int
    dtypes: list[str]
    hash: str
    components: dict[str, ComponentSummary]
    other_components: list[str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The summary for people."""
        rows = [
            f"{self.path}: {self.kind} in {self.layout} layout, {self.variant}",
            f"{self.parameters:,} parameters, {', '.join(self.dtypes)}, hash {self.hash}",
        ]
        for name, part in self.components.items():
            size = f"{part.parameters:>14,} parameters  {part.bytes / 1e6:>10,.1f} MB  {', '.join(part.dtypes)}"
            rows.append(f"  {name or '(model)':<16} {part.class_name:<30} {size}")
        if self.other_components:
            rows.append(f"  without weights: {', '.join(self.other_components)}")
        return rows


def summarise(checkpoint: Checkpoint) -> Summary:
    """What a checkpoint is. Raises UserError when a component's weights do not fit its config."""
    components = {name: _component(checkpoint, name) for name in checkpoint.settings}
    dtypes = Counter[str]()
    for part in components.values():
        dtypes.update(dict.fromkeys(part.dtypes[:1], part.parameters))
        dtypes.update(dict.fromkeys(part.dtypes[1:], 0))
    folders = {place.partition("/")[0] for place in checkpoint.files if "/" in place}
    return Summary(
        path=str(checkpoint.folder),
        kind=_kind(checkpoint),
        layout=checkpoint.layout,
        variant=_variant(checkpoint),
        parameters=sum(part.parameters for part in components.values()),
        dtypes=[name for name, _ in dtypes.most_common()],
        hash=checkpoint_hash(checkpoint),
        components=components,
        other_components=sorted(folders - set(components)),
    )


def _component(checkpoint: Checkpoint, name: str) -> ComponentSummary:
    leaves = checkpoint.leaves(name).values()
    dtypes = Counter[str]()
    for leaf in leaves:
        dtypes[leaf.dtype.name] += leaf.size
    return ComponentSummary(
        class_name=class_name(checkpoint.settings[name]) or "",
        parameters=sum(leaf.size for leaf in leaves),
        bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
        dtypes=[name for name, _ in dtypes.most_common()],
    )


def _kind(checkpoint: Checkpoint) -> str:
    if not checkpoint.is_pipeline:
        return "model"
    if checkpoint.layout == "original":
        return "pipeline"
    return f"pipeline {read_json(checkpoint.folder / INDEX).get('_class_name', 'of no class')}"


def _variant(checkpoint: Checkpoint) -> str:
    name = TRANSFORMER if TRANSFORMER in checkpoint.settings else ""
    if name not in checkpoint.settings:
        return "no transformer"
    config = checkpoint.component(name).config
    if not isinstance(config, WanConfig):
        return class_name(checkpoint.settings[name]) or "unknown"
    for preset, known in PRESETS.items():
        if config == known:
            return preset
    task = "image-to-video" if config.in_channels > config.out_channels else "text-to-video"
    return f"Wan {task}, {config.blocks} blocks of width {config.width} with {config.heads} heads"
