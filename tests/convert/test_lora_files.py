"""LoRA files of every style against diffusers and PEFT, and what is refused."""

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, WanPipeline
from lora_models import (
    FLUX_MODULES,
    WAN_MODULES,
    WRITERS,
    flux_model,
    fused,
    random_pairs,
    wan_model,
    write_comfyui,
    write_diffusers,
    write_kohya,
)
from safetensors.numpy import load_file, save_file

from convert.checkpoint import load_model, open_checkpoint
from convert.components import component_of
from convert.lora import read_lora
from convert.lora_keys import Target
from convert.tables import assign
from dit_jax.config import UserError
from dit_jax.lora import merged
from dit_jax.parameters import named_leaves

STYLES = pytest.mark.parametrize("style", list(WRITERS))


def fused_by_diffusers(pipeline, model, file):
    """Weights of diffusers' model with the LoRA that its own loader reads from the file."""
    if pipeline is WanPipeline:
        tensors, metadata = WanPipeline.lora_state_dict(file, return_lora_metadata=True)
        WanPipeline.load_lora_into_transformer(tensors, model, metadata=metadata)
    else:
        tensors, alphas, metadata = FluxPipeline.lora_state_dict(file, return_alphas=True, return_lora_metadata=True)
        FluxPipeline.load_lora_into_transformer(tensors, alphas, model, metadata=metadata)
    return fused(model)


class Tiny:
    """A tiny model on disk, ours and its tables."""

    def __init__(self, folder, make, modules, pipeline):
        self.make, self.modules, self.pipeline = make, modules, pipeline
        make().save_pretrained(folder)
        checkpoint = open_checkpoint(folder)
        self.component = checkpoint.component("")
        self.targets = {"transformer": Target.of(self.component)}
        self.ours = load_model(checkpoint)

    def pairs(self, seed=0):
        return random_pairs(self.make(), self.modules, seed)

    def merged(self, *files, **options):
        """Leaves of ours with LoRAs, (file, strength) each."""
        loras = [(read_lora(file, self.targets, **options)[1]["transformer"], strength) for file, strength in files]
        return leaves(merged(self.ours, loras))

    def fused(self, file):
        """Leaves of ours from diffusers' merged weights."""
        tensors = fused_by_diffusers(self.pipeline, self.make(), file)
        return leaves(assign(self.component.abstract, self.component.rows, tensors))

    def error(self, found, expected):
        """Relative error of what was added, over all leaves."""
        base = leaves(self.ours)
        gap = [found[name] - expected[name] for name in base]
        added = [expected[name] - base[name] for name in base]
        return norm(gap) / norm(added)


def leaves(model):
    return {name: np.asarray(leaf) for name, leaf in named_leaves(model)}


def norm(arrays):
    return np.sqrt(sum(float((array.astype(np.float64) ** 2).sum()) for array in arrays))


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return Tiny(tmp_path_factory.mktemp("flux"), flux_model, FLUX_MODULES, FluxPipeline)


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return Tiny(tmp_path_factory.mktemp("wan"), wan_model, WAN_MODULES, WanPipeline)


@STYLES
def test_wan_in_every_style_is_merged_as_diffusers_merges_it(wan, tmp_path, style):
    file = WRITERS[style](tmp_path / "lora.safetensors", wan.pairs())
    assert wan.error(wan.merged((file, 1.0)), wan.fused(file)) <= 1e-5


def test_flux_is_merged_as_diffusers_merges_it(flux, tmp_path):
    file = write_diffusers(tmp_path / "lora.safetensors", flux.pairs())
    assert flux.error(flux.merged((file, 1.0)), flux.fused(file)) <= 1e-5


@pytest.mark.parametrize("style", ["kohya", "comfyui"])
def test_flux_with_fused_projections_is_the_same_as_with_separate_ones(flux, tmp_path, style):
    apart = write_diffusers(tmp_path / "diffusers.safetensors", flux.pairs())
    fused_file = WRITERS[style](tmp_path / "fused.safetensors", flux.pairs())
    assert flux.error(flux.merged((fused_file, 1.0)), flux.merged((apart, 1.0))) <= 1e-6
