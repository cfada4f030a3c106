"""Tiny FLUX and Wan transformers of diffusers, and random LoRAs of them written in each style of keys."""

import json
from typing import NamedTuple

import numpy as np
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, WanPipeline, WanTransformer3DModel
from safetensors.numpy import save_file

from convert.checkpoint import load_model, open_checkpoint
from convert.lora import read_lora
from convert.lora_keys import Target
from convert.tables import assign
from dit_jax.lora import Adapter, merged, untrained
from dit_jax.parameters import named_leaves

FLUX = dict(
    in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=8, num_attention_heads=3,
    joint_attention_dim=10, pooled_projection_dim=14, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
)  # fmt: skip
WAN = dict(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, ffn_dim=20, num_layers=3, in_channels=4,
    out_channels=4, text_dim=10, freq_dim=16, cross_attn_norm=True,
)  # fmt: skip
WAN_IMAGE = WAN | dict(in_channels=12, image_dim=14, added_kv_proj_dim=24)

# The authors' module -> diffusers' modules that it joins.
FLUX_MODULES = {
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    "vector_in.in_layer": ["time_text_embed.text_embedder.linear_1"],
    "final_layer.linear": ["proj_out"],
    "double_blocks.{i}.img_attn.qkv": [f"transformer_blocks.{{i}}.attn.to_{name}" for name in "qkv"],
    "double_blocks.{i}.img_attn.proj": ["transformer_blocks.{i}.attn.to_out.0"],
    "double_blocks.{i}.txt_attn.qkv": [f"transformer_blocks.{{i}}.attn.add_{name}_proj" for name in "qkv"],
    "double_blocks.{i}.txt_attn.proj": ["transformer_blocks.{i}.attn.to_add_out"],
    "double_blocks.{i}.img_mod.lin": ["transformer_blocks.{i}.norm1.linear"],
    "double_blocks.{i}.txt_mlp.2": ["transformer_blocks.{i}.ff_context.net.2"],
    "single_blocks.{i}.linear1": [f"single_transformer_blocks.{{i}}.attn.to_{name}" for name in "qkv"]
    + ["single_transformer_blocks.{i}.proj_mlp"],
    "single_blocks.{i}.linear2": ["single_transformer_blocks.{i}.proj_out"],
    "single_blocks.{i}.modulation.lin": ["single_transformer_blocks.{i}.norm.linear"],
}
WAN_MODULES = {
    f"blocks.{{i}}.{theirs}_attn.{name}": [f"blocks.{{i}}.{ours}.{to}"]
    for theirs, ours in (("self", "attn1"), ("cross", "attn2"))
    for name, to in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
} | {"blocks.{i}.ffn.0": ["blocks.{i}.ffn.net.0.proj"], "blocks.{i}.ffn.2": ["blocks.{i}.ffn.net.2"]}
BLOCKS = {"double_blocks": 2, "single_blocks": 3, "blocks": 3}


class Pair(NamedTuple):
    """Factors of one of the authors' modules: down [r, i], up [o, r]."""

    modules: list[str]
    sizes: list[int]
    down: np.ndarray
    up: np.ndarray
    alpha: float


def flux_model():
    return randomised(FluxTransformer2DModel(**FLUX))


def wan_model():
    return randomised(WanTransformer3DModel(**WAN))


def wan_image_model():
    return randomised(WanTransformer3DModel(**WAN_IMAGE))


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        size = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
        parameter.data = torch.randn(parameter.shape, generator=generator) * size
    return model.eval()


def random_pairs(model, modules, seed=0):
    """The authors' module -> Pair, with other ranks and alphas from layer to layer."""
    rng, shapes = np.random.default_rng(seed), {name: p.shape for name, p in model.state_dict().items()}
    pairs = {}
    for name, theirs in modules.items():
        for block in range(BLOCKS.get(name.split(".")[0], 1)):
            rank = 1 + len(pairs) % 4
            covered = [module.replace("{i}", str(block)) for module in theirs]
            sizes = [shapes[f"{module}.weight"][0] for module in covered]
            inputs = int(np.prod(shapes[f"{covered[0]}.weight"][1:]))
            down = rng.standard_normal((rank, inputs), np.float32) * inputs**-0.5
            up = rng.standard_normal((sum(sizes), rank), np.float32)
            pairs[name.replace("{i}", str(block))] = Pair(covered, sizes, down, up, rank * (0.5 + len(pairs) % 3))
            if "{i}" not in name:
                break
    return pairs


def random_lora(model, seed=0):
    """A LoRA of every linear map in the blocks of a model of ours: ranks 0 to 3 from leaf to leaf and block to block,
    scales from block to block."""
    rng, lora = np.random.default_rng(seed), {}
    for number, (name, adapter) in enumerate(untrained(model, rank=3, seed=seed).items()):
        ranks = (number + np.arange(len(adapter.down))) % 4
        down, up = adapter.down[..., : ranks.max()], rng.standard_normal(adapter.up.shape, np.float32)
        up = up[:, : ranks.max()]
        for block, rank in enumerate(ranks):
            down[block, ..., rank:] = up[block, rank:] = 0
        alpha = (ranks * (0.5 + np.arange(len(ranks)) % 3)).astype(np.float32)
        rank = np.maximum(ranks, 1).astype(np.float32)  # as a LoRA that was read has it
        lora[name] = Adapter(stacked=True, down=down, up=up, alpha=alpha, rank=rank)
    return lora


def write_diffusers(file, pairs):
    """Diffusers' keys, alphas in its metadata."""
    tensors, ranks, alphas = {}, {}, {}
    for pair in pairs.values():
        for module, up in zip(pair.modules, np.split(pair.up, np.cumsum(pair.sizes)[:-1]), strict=True):
            tensors[f"transformer.{module}.lora_A.weight"] = pair.down
            tensors[f"transformer.{module}.lora_B.weight"] = np.ascontiguousarray(up)
            ranks[f"^{module}"], alphas[f"^{module}"] = len(pair.down), pair.alpha
    config = {
        "r": 7, "lora_alpha": 9, "rank_pattern": ranks, "alpha_pattern": alphas,
        "target_modules": [name[1:] for name in ranks],
    }  # fmt: skip
    metadata = {f"transformer.{name}": value for name, value in config.items()}
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps(metadata)})
    return file


def write_kohya(file, pairs):
    return _write_original(file, pairs, lambda name: "lora_unet_" + name.replace(".", "_"), "lora_down", "lora_up")


def write_comfyui(file, pairs):
    return _write_original(file, pairs, lambda name: f"diffusion_model.{name}", "lora_A", "lora_B")


def _write_original(file, pairs, key, down, up):
    tensors = {}
    for name, pair in pairs.items():
        tensors[f"{key(name)}.{down}.weight"], tensors[f"{key(name)}.{up}.weight"] = pair.down, pair.up
        tensors[f"{key(name)}.alpha"] = np.array(pair.alpha, np.float32)
    save_file(tensors, file)
    return file


WRITERS = {"diffusers": write_diffusers, "kohya": write_kohya, "comfyui": write_comfyui}


def fused(model):
    """Weights by name of a diffusers model whose adapters are merged."""
    model.fuse_lora()
    return {
        name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items() if "lora_" not in name
    }


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
        """Leaves of ours from the weights that diffusers merges the LoRA into."""
        return self.leaves(fused_by_diffusers(self.pipeline, self.make(), file))

    def leaves(self, state):
        """Leaves of ours from a state dict of diffusers."""
        tensors = {key: tensor.detach().numpy() for key, tensor in state.items()}
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


def saved(file, tensors):
    save_file({key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}, file)
    return file
