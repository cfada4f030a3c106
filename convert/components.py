"""The components that have a table: which model of ours a config.json stands for, and how its weights are found."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from flax import nnx

from convert.safetensors_files import Tensor, same_values
from convert.tables import Layout, Row
from dit_jax.config import UserError
from dit_jax.parameters import Precision, named_leaves

Settings = dict[str, Any]  # the contents of a component's config.json, as diffusers or transformers wrote it
DIFFUSERS_STEM = "diffusion_pytorch_model"
TRANSFORMERS_STEM = "model"
ELSEWHERE = "pretrained_model_name_or_path"
_MOST_BLOCKS = 100
_MOST_VALUES = 1 << 48  # in one leaf


@dataclass(frozen=True, kw_only=True)
class Component:
    """A model of ours with its table.

    stem       name of its weights' files in a diffusers folder, without suffix
    canonical  from a key as some release spells it to the table's spelling; None for what no model reads (buffers, say)
    written    the table with the keys that this config's own library would write, where `rows` has the canonical ones
    fp32       dotted prefixes of the leaves that stay fp32 when the rest is cast
    axes       glob over dotted paths -> logical axes of the leaf, for its sharding
    """

    class_name: str
    config: Any
    model: Callable[..., nnx.Module]
    rows: Sequence[Row]
    stem: str
    canonical: Callable[[str], str | None] = lambda key: key
    written: Sequence[Row] | None = None
    fp32: tuple[str, ...] = ()
    axes: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)

    @property
    def abstract(self) -> nnx.Module:
        """The model with shapes in place of arrays."""
        return _abstract(self.model, self.config)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Dotted path of every leaf -> shape."""
        return {name: tuple(leaf.shape) for name, leaf in named_leaves(self.abstract)}

    def precision(self, dtype: Any) -> Precision:
        """The policy that its weights are kept by in this dtype."""
        return Precision(weights=dtype, exact=self.fp32)

    def rows_to_write(self, layout: Layout) -> Sequence[Row]:
        """The table for writing this layout."""
        return self.written if self.written is not None and layout == "diffusers" else self.rows

    def canonical_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors under the table's spelling of their keys, without those that no model reads.

        Raises UserError when two keys are two spellings of one and their tensors differ.
        """
        found: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            name = self.canonical(key)
            if name is None:
                continue
            if name in found and not same_values(found[name], tensor):
                raise UserError(
                    f"{tensor.file}: {key} and {found[name].key} are one tensor, found different values; drop one."
                )
            found.setdefault(name, tensor)
        return found


@lru_cache
def _abstract(model: Callable[..., nnx.Module], config: Any) -> nnx.Module:
    """Tracing an initialisation takes a second or more, and one process may open a model several times."""
    return nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0)))


def _wan(settings: Settings, name: str) -> Component:
    from convert.wan import wan_config, wan_rows
    from dit_jax.models import wan

    config = wan_config(settings)
    return Component(
        class_name=name,
        config=config,
        model=wan.Wan,
        rows=wan_rows(config),
        stem=DIFFUSERS_STEM,
        fp32=wan.FP32_LEAVES,
        axes=_axes(wan),
    )


def _vae_wan(settings: Settings, name: str) -> Component:
    from convert.vae_wan import config_from_diffusers, vae_wan_rows
    from dit_jax.models import vae_wan

    config = config_from_diffusers(settings)
    return Component(
        class_name=name,
        config=config,
        model=vae_wan.WanVAE,
        rows=vae_wan_rows(config),
        stem=DIFFUSERS_STEM,
        axes=_axes(vae_wan),
    )


def _vae_kl(settings: Settings, name: str) -> Component:
    from convert.vae_kl import config_from_diffusers, vae_kl_rows
    from dit_jax.models import vae_kl

    config = config_from_diffusers(settings)
    return Component(
        class_name=name,
        config=config,
        model=vae_kl.AutoencoderKL,
        rows=vae_kl_rows(config),
        stem=DIFFUSERS_STEM,
        axes=_axes(vae_kl),
    )


def _t5(settings: Settings, name: str) -> Component:
    from convert.encoders import canonical_t5_key, t5_config, t5_rows
    from dit_jax.models import t5

    config = t5_config(settings)
    return Component(
        class_name=name,
        config=config,
        model=t5.T5Encoder,
        rows=t5_rows(config),
        stem=TRANSFORMERS_STEM,
        canonical=canonical_t5_key,
        axes=_axes(t5),
    )


def _clip_vision(settings: Settings, name: str) -> Component:
    from convert.encoders import canonical_clip_vision_key, clip_vision_config, clip_vision_prefixed, clip_vision_rows
    from dit_jax.models import clip

    config = clip_vision_config(settings)
    return Component(
        class_name=name,
        config=config,
        model=clip.CLIPVision,
        rows=clip_vision_rows(config),
        written=clip_vision_rows(config, clip_vision_prefixed(settings)),
        stem=TRANSFORMERS_STEM,
        canonical=canonical_clip_vision_key,
        axes=_axes(clip),
    )


def _clip_text(settings: Settings, name: str) -> Component:
    from convert.encoders import canonical_clip_text_key, clip_text_config, clip_text_prefixed, clip_text_rows
    from dit_jax.models import clip_text

    config = clip_text_config(settings)
    return Component(
        class_name=name,
        config=config,
        model=clip_text.CLIPText,
        rows=clip_text_rows(config),
        written=clip_text_rows(config, clip_text_prefixed(settings)),
        stem=TRANSFORMERS_STEM,
        canonical=canonical_clip_text_key,
        axes=_axes(clip_text),
    )


def _flux(settings: Settings, name: str) -> Component:
    from convert.flux import flux_config, flux_rows
    from dit_jax.models import flux

    config = flux_config(settings)
    return Component(
        class_name=name,
        config=config,
        model=flux.Flux,
        rows=flux_rows(config),
        stem=DIFFUSERS_STEM,
        axes=_axes(flux),
    )


def _axes(module: ModuleType) -> Mapping[str, tuple[str | None, ...]]:
    return getattr(module, "AXES", {})


COMPONENTS: dict[str, Callable[[Settings, str], Component]] = {
    "WanTransformer3DModel": _wan,
    "FluxTransformer2DModel": _flux,
    "AutoencoderKLWan": _vae_wan,
    "AutoencoderKL": _vae_kl,
    "UMT5EncoderModel": _t5,
    "T5EncoderModel": _t5,
    "CLIPTextModel": _clip_text,
    "CLIPVisionModel": _clip_vision,
    "CLIPVisionModelWithProjection": _clip_vision,
}


def class_name(settings: Settings) -> str | None:
    """The class that a config.json names: `_class_name` of diffusers, `architectures` of transformers."""
    architectures = settings.get("architectures")
    named = settings.get("_class_name") or (isinstance(architectures, list) and architectures and architectures[0])
    return named if isinstance(named, str) else None


def with_class(settings: Settings, name: str) -> Settings:
    """A config that names its class: transformers does not always write it, the pipeline's index does."""
    return settings if class_name(settings) else settings | {"architectures": [name]}


def class_in_index(entry: Any) -> str | None:
    """The class that a value of model_index.json names; None for an absent component and for what is no component."""
    names = [part for part in entry if not isinstance(part, dict)] if isinstance(entry, list) else []
    return names[-1] if names and isinstance(names[-1], str) else None


def reference_in_index(entry: Any) -> tuple[str, str] | None:
    """(checkpoint, folder in it) of a component that another checkpoint holds, as a value of model_index.json tells."""
    told = entry[-1] if isinstance(entry, list) and entry and isinstance(entry[-1], dict) else {}
    return (str(told[ELSEWHERE]), str(told["subfolder"])) if {ELSEWHERE, "subfolder"} <= set(told) else None


def lora_in_index(entry: Any) -> str | None:
    """The file of a LoRA that such a component is merged with, if any."""
    told = entry[-1] if isinstance(entry, list) and reference_in_index(entry) else {}
    return str(told["lora"]) if "lora" in told else None


def referring(entry: list[Any], checkpoint: str, folder: str, lora: str | None = None) -> list[Any]:
    """A value of model_index.json whose component another checkpoint holds, in the words of diffusers' modular
    pipelines, and the file of a LoRA that it is merged with."""
    return [*entry[:2], {ELSEWHERE: checkpoint, "subfolder": folder} | ({"lora": lora} if lora else {})]


def read_json(file: Path | bytes) -> dict[str, Any]:
    """A JSON object from a file, or from contents that were made here. Raises UserError for a file that is not one."""
    if isinstance(file, bytes):
        return json.loads(file)
    try:
        content = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({error}); download it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} should hold a JSON object, found {type(content).__name__}; download it again.")
    return content


def component_of(settings: Settings, source: Path) -> Component:
    """The component that a config.json describes.

    Raises UserError for a class without a table and for a config that lacks a setting.
    """
    name = class_name(settings)
    if name not in COMPONENTS:
        raise UserError(
            f"{source}: no converter for {name or 'a config without a class'}; known: {', '.join(COMPONENTS)}."
        )
    with usable_config(name, source):
        _refuse_endless(settings)
        described = COMPONENTS[name](settings, name)
        for leaf, shape in described.shapes.items():
            if not 0 < math.prod(shape) <= _MOST_VALUES:
                raise UserError(f"{leaf} would have shape {shape}, which no model has; download the config again.")
    return described


def _refuse_endless(settings: Settings) -> None:
    """Blocks that are not stacked are built one by one, so that a damaged count would keep us busy for ever."""
    for name in ("layers_per_block", "num_res_blocks"):
        count = settings.get(name, 1)
        if isinstance(count, int) and not 0 < count <= _MOST_BLOCKS:
            raise UserError(f"{name} is {count}, expected 1 to {_MOST_BLOCKS}; download the config again.")


@contextlib.contextmanager
def usable_config(name: str, source: Path) -> Iterator[None]:
    """Raises UserError in place of what reading a config raises when a setting is missing or makes no model."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be used ({error})"
        raise UserError(
            f"{source}: the config of {name} {reason}; expected the settings of its class; download it again."
        ) from error
