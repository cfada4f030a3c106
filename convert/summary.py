"""What a checkpoint is, without reading its weights: layout, model, sizes, dtypes, components."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from convert.checkpoint import Checkpoint, checkpoint_hash
from convert.components import class_name, read_json
from convert.encoders import ORIGINAL_CLIP
from convert.original import INDEX, TRANSFORMER
from convert.wan import LOW_NOISE
from dit_jax.models import clip, clip_text, flux, t5, vae_kl, vae_wan, wan
from dit_jax.models.flux import FluxConfig
from dit_jax.models.wan import WanConfig

PRESETS: Mapping[str, Any] = {
    **wan.PRESETS,
    **flux.PRESETS,
    **t5.PRESETS,
    **clip.PRESETS,
    **clip_text.PRESETS,
    **vae_kl.PRESETS,
    **{f"{name}-vae": config for name, config in vae_wan.PRESETS.items()},
    "clip-vit-h-14-projecting": ORIGINAL_CLIP,
}


@dataclass(frozen=True, kw_only=True)
class ComponentSummary:
    """One component with weights: its class, parameter count, and the dtypes from the commonest to the rarest."""

    class_name: str
    variant: str
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
            rows.append(f"  {name or '(model)':<16} {part.class_name:<30} {size}  {part.variant}")
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
    main = TRANSFORMER if checkpoint.is_pipeline else ""
    folders = {place.partition("/")[0] for place in checkpoint.files if "/" in place}
    return Summary(
        path=str(checkpoint.place),
        kind=_kind(checkpoint),
        layout=checkpoint.layout,
        variant=components[main].variant if main in components else "no transformer",
        parameters=sum(part.parameters for part in components.values()),
        dtypes=[name for name, _ in dtypes.most_common()],
        hash=checkpoint_hash(checkpoint),
        components=components,
        other_components=sorted(folders - set(components)),
    )


def _component(checkpoint: Checkpoint, name: str) -> ComponentSummary:
    """Dtypes and bytes are those on disk: fp8 counts as fp8, and its scales count as nothing."""
    leaves = checkpoint.leaves(name).values()
    dtypes = Counter[np.dtype]()
    if checkpoint.layout == "native":
        for leaf in leaves:
            dtypes[leaf.dtype] += leaf.size
    else:
        for tensor in checkpoint.tensors(name).values():
            dtypes[tensor.stored or tensor.dtype] += tensor.size
    return ComponentSummary(
        class_name=class_name(checkpoint.settings[name]) or "",
        variant=_variant(checkpoint.component(name).config, LOW_NOISE in checkpoint.settings),
        parameters=sum(leaf.size for leaf in leaves),
        bytes=sum(size * dtype.itemsize for dtype, size in dtypes.items()),
        dtypes=[dtype.name for dtype, _ in dtypes.most_common()],
    )


def _kind(checkpoint: Checkpoint) -> str:
    if not checkpoint.is_pipeline:
        return class_name(checkpoint.settings[""]) or "model"
    return f"pipeline {read_json(checkpoint.files[INDEX]).get('_class_name', 'of no class')}"


def _variant(config: Any, experts: bool) -> str:
    """The name of a preset, or the sizes of a model that is none; one of two experts is Wan 2.2's."""
    names = [preset for preset, known in PRESETS.items() if config == known]
    if names:
        return names[-1] if experts else names[0]
    if isinstance(config, WanConfig):
        task = "image-to-video" if config.in_channels > config.out_channels else "text-to-video"
        return f"Wan {task}, {config.blocks} blocks of width {config.width} with {config.heads} heads"
    if isinstance(config, FluxConfig):
        guidance = "with" if config.guidance else "without"
        blocks = f"{config.double_blocks} double and {config.single_blocks} single blocks"
        return f"FLUX {guidance} guidance embedding, {blocks} of width {config.width} with {config.heads} heads"
    if hasattr(config, "blocks") and hasattr(config, "width"):
        return f"{config.blocks} blocks of width {config.width}"
    return "custom sizes"
