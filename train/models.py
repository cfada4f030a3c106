"""The models that a recipe trains and learns from: read onto the mesh, or as shapes alone to be compiled for a pod."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from convert.checkpoint import Checkpoint, load_model, open_checkpoint
from convert.components import Component
from convert.method_parts import read_parts, transformers
from convert.wan import HIGH_NOISE
from dit_jax.config import UserError
from dit_jax.flops import Config
from dit_jax.methods.ddit import Ddit, written_sizes
from dit_jax.methods.method import Part
from dit_jax.methods.patch_adapters import Adapters, AdapterSettings, abstract_adapters, adapters_from
from dit_jax.methods.pruning import pruned_config
from dit_jax.methods.routing import ROUTER, Router, read_router, router_config
from dit_jax.models.wan import WanConfig
from dit_jax.parameters import cast
from dit_jax.sampling.schedules import TRAIN_STEPS
from infer.adapt import KINDS
from infer.random_pipeline import PRESETS, transformer_component
from infer.wan_variant import wan_variant
from train.placement import sharding_of

TEXT_OR_IMAGE = "wan2.2-ti2v-5b"  # the preset of a model that makes videos of text and of a first frame


@dataclass(frozen=True)
class Source:
    """A transformer and its methods' parts, of a checkpoint or of a preset, which has sizes alone.

    model    folder, hub id, shipped model, or a preset such as wan2.1-t2v-14b where nothing is to be run
    mesh     that its weights are read onto
    pruned   shares of heads and neurons that it lacks, where its sizes are enough
    planned  whether its sizes are enough, to compile for a pod
    expert   which transformer of a checkpoint of two experts: `transformer` (high noise) or `transformer_2`
    """

    model: str
    mesh: Mesh
    pruned: tuple[float, float] = (0.0, 0.0)
    planned: bool = False
    expert: str = ""
    _read: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.is_preset and self.expert:
            raise UserError(
                f"expert is {self.expert!r}, and {self.model} is a preset, whose sizes are those of every expert: "
                "expected none; leave expert out"
            )

    @property
    def is_preset(self) -> bool:
        """Whether there is no checkpoint."""
        return self.model in PRESETS

    @property
    def abstract(self) -> bool:
        """Whether sizes are all that is there, or all that is wanted."""
        return self.planned or self.is_preset

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """Its files; UserError for a preset, for what is no pipeline, and where `expert` does not name one of two."""
        if self.is_preset:
            raise UserError(
                f"{self.model} is a preset, which has sizes and no weights: expected a checkpoint; give its folder or "
                "hub id (presets are for dit-plan)"
            )
        checkpoint = open_checkpoint(self.model)
        if not checkpoint.is_pipeline:
            raise UserError(
                f"{self.model} is a lone model: expected a whole pipeline (transformer, VAE, text encoder, tokenizer)"
            )
        experts = transformers(checkpoint)
        if len(experts) == 1 and self.expert:
            raise UserError(
                f"expert is {self.expert!r}, and {self.model} has one transformer: expected none; leave expert out, or "
                "name a model of two experts"
            )
        if len(experts) > 1 and self.expert not in experts:
            raise UserError(
                f"{self.model} has two experts, and expert is {self.expert!r}: expected {' or '.join(experts)}; train "
                f"one with --set expert={experts[0]} (high noise), the other with --set expert={experts[1]} (low noise)"
            )
        return checkpoint

    @property
    def component_name(self) -> str:
        """The component of its checkpoint that it is."""
        return self.expert or HIGH_NOISE

    @property
    def noise_levels(self) -> tuple[float, float]:
        """The lowest and the highest that it runs at, σ behind the shift: an expert's side of the boundary."""
        boundary = wan_variant(self.checkpoint).boundary if self.expert else None
        if boundary is None:
            return 0.0, 1.0
        level = boundary / TRAIN_STEPS
        return (level, 1.0) if self.component_name == HIGH_NOISE else (0.0, level)

    @cached_property
    def component(self) -> Component:
        """What its transformer is."""
        own = PRESETS[self.model] if self.is_preset else self.checkpoint.component(self.component_name)
        if isinstance(own, Component) and not any(self.pruned):
            return own
        whole = own.config if isinstance(own, Component) else own
        return transformer_component(pruned_config(whole, *self.pruned))

    @property
    def config(self) -> Config:
        """Sizes of its transformer."""
        return self.component.config

    @property
    def holds_first_frame(self) -> bool:
        """Whether it also makes videos of a first frame, which is held clean in the latents (`expand_timesteps`)."""
        if self.is_preset:
            return self.model == TEXT_OR_IMAGE
        return isinstance(self.config, WanConfig) and wan_variant(self.checkpoint).image == "optional"

    def kept_of(self, whole: Source) -> dict[str, float]:
        """Which shares of another's heads, neurons and parameters this one, which was made from it, has."""
        ours, theirs = self.config, whole.config
        sizes = [sum(leaf.size for leaf in jax.tree.leaves(each.component.abstract)) for each in (self, whole)]
        return {
            "kept_heads": ours.heads / theirs.heads,
            "kept_neurons": ours.mlp_width / theirs.mlp_width,
            "kept_parameters": sizes[0] / sizes[1],
        }

    @property
    def stacks(self) -> tuple[int, ...]:
        """Blocks of each of its stacks."""
        model: Any = self.component.abstract
        return model.stacks

    def transformer(self, dtype: Any = jnp.float32) -> Any:
        """Its weights in this dtype (of leaves that are kept in fp32: fp32)."""
        if self.abstract:
            return cast(self.component.abstract, self.component.precision(dtype))
        kind = self.component.model

        def place(name: str, shape: tuple[int, ...]):
            return sharding_of(kind, name, shape, self.mesh)

        return load_model(self.checkpoint, self.component_name, shardings=place, dtype=dtype)

    @cached_property
    def parts(self) -> Mapping[str, Part]:
        """What its checkpoint holds for methods."""
        return {} if self.is_preset else read_parts(self.checkpoint, self.component_name)

    def part(self, name: str, seed: int, **kind: Any) -> Part:
        """That of its checkpoint, of whatever kind, or an untrained one of this kind (`infer.adapt.KINDS`)."""
        if name in self.parts:
            return self.parts[name]
        leaves = {} if self.is_preset else self.checkpoint.leaves(self.component_name)
        return KINDS[name](self.component, leaves, seed, **kind)

    def router(self, seed: int = 0, content: bool = True) -> Router:
        """Its router, or an untrained one, which is told the content or the timestep alone."""
        parts = {ROUTER: self.part(ROUTER, seed, content=content)}
        blocks = sum(self.stacks)
        if self.abstract:
            return nnx.eval_shape(lambda: Router(router_config(parts, blocks), nnx.Rngs(0)))
        return jax.tree.map(jnp.asarray, read_router(parts, blocks))

    def adapters(self, seed: int, wanted: AdapterSettings) -> tuple[Adapters, AdapterSettings]:
        """Its DDiT adapters, or untrained ones as wanted, and their sizes; UserError where it has some of another rank
        or lacks a size."""
        part = None if self.is_preset else self.part(Ddit.name, seed, settings=wanted)
        settings = wanted
        if part is not None:
            settings = AdapterSettings(**{**part.settings, "scales": tuple(part.settings["scales"])})
        if settings.rank != wanted.rank:
            raise UserError(
                f"rank is {wanted.rank}, and {self.model} has adapters of rank {settings.rank}: expected the same; set "
                f"rank={settings.rank}, or give a model without adapters"
            )
        if missing := set(wanted.scales) - set(settings.scales):
            raise UserError(
                f"sizes are {written_sizes(wanted.scales)}, and {self.model} has adapters for "
                f"{written_sizes(settings.scales)}: expected no {written_sizes(sorted(missing))}; set "
                f"sizes={written_sizes(settings.scales)}, or give a model without adapters"
            )
        if part is None or self.abstract:
            return abstract_adapters(self.config, settings), settings
        return jax.tree.map(jnp.asarray, adapters_from(self.config, part)), settings


def check_student(student: Source, source: Source, alike: tuple[str, ...] = ()) -> None:
    """UserError unless the student takes what the model takes, and has these sizes (`alike`) in common with it."""
    ours, theirs = student.config, source.config
    kinds = [type(config).__name__.removesuffix("Config") for config in (ours, theirs)]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"{student.model} is no student of {source.model}: expected a {kinds[1]}, found a {kinds[0]}; choose "
            "another student"
        )
    for name in ("in_channels", "out_channels", "patch", "text_width", *alike):
        if getattr(ours, name) != getattr(theirs, name):
            raise UserError(
                f"{student.model} is no student of {source.model}: its {name} is {getattr(ours, name)}, expected "
                f"{getattr(theirs, name)}; choose another student"
            )
