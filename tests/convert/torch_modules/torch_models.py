"""Tiny pipelines, pruned and with random parts of every method, in a native checkpoint and as `to-torch` writes that;
one request run by this project from the first and by diffusers from the second."""

import copy
from dataclasses import replace
from functools import cached_property

import diffusers
import jax
import numpy as np
import tiny_flux
import tiny_wan
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel, WanTransformer3DModel
from flax import nnx
from PIL import Image

from convert.checkpoint import open_checkpoint
from convert.cli import main
from convert.method_parts import part_files
from convert.torch_modules.pare import load_transformer
from convert.transfer import convert
from convert.widths import with_widths
from dit_jax.methods.method import Part
from dit_jax.methods.patch_adapters import AdapterSettings, abstract_adapters, part_of
from dit_jax.methods.pruning import Widths, attentions, mlps
from dit_jax.methods.routing import Router, RouterConfig
from dit_jax.parameters import named_leaves
from infer import load_pipeline
from infer.request import Request

torch.set_num_threads(1)  # threads of a busy machine wait for each other, and these models need none
SIZE, FRAMES = (112, 80), 9  # 14x10 latent cells: 7x5 tokens a frame, which neither 3 nor the cells of 4p divide
PROMPTS, NEGATIVE = ["a red cat runs under the moon", "a blue fish sleeps"], "the dog"
HEADS, KEPT, MLP, BLOCKS = 5, 3, 23, 5
CONTENT = {"text-to-video": ("latents", 9), "image-to-video": ("image", tiny_wan.IMAGE_WIDTH), "flux": ("pooled", 16)}
CONTENT["first-frame"] = CONTENT["text-to-video"]
# Of routers that tell two samples apart, and of noise.
ROUTERS = {"text-to-video": 3, "first-frame": 3, "image-to-video": 0, "flux": 4}
NOISES = {"text-to-video": 2, "first-frame": 2, "image-to-video": 3, "flux": 3}
ADAPTERS = AdapterSettings(rank=3, residual_channels=5)
RATIOS = {"ratios": [0.1, 0.45, 0.0, 0.6, 0.3], "stride": 3, "target": 0.29}


def transformer(kind):
    """Five blocks, five heads."""
    if kind == "flux":
        return tiny_wan.randomise(
            FluxTransformer2DModel(
                in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=HEADS,
                joint_attention_dim=tiny_flux.TEXT_WIDTH, pooled_projection_dim=tiny_flux.POOLED_WIDTH,
                guidance_embeds=True, axes_dims_rope=(4, 6, 6),
            )
        )  # fmt: skip
    image = kind == "image-to-video"
    return tiny_wan.randomise(
        WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=HEADS, attention_head_dim=16, ffn_dim=37, num_layers=BLOCKS,
            in_channels=12 if image else 4, out_channels=4, text_dim=tiny_wan.TEXT_WIDTH, freq_dim=32,
            cross_attn_norm=True, image_dim=tiny_wan.IMAGE_WIDTH if image else None,
            added_kv_proj_dim=16 * HEADS if image else None,
        )
    )  # fmt: skip


def inputs(kind, rows, columns, count=1, dtype=torch.float32):
    """What a transformer is called with, at so many tokens a frame: random, of ordinary size."""
    random = torch.Generator().manual_seed(5)

    def of(*shape):
        return torch.randn(count, *shape, generator=random).to(dtype)

    if kind != "flux":
        told = {"hidden_states": of(4, 3, 2 * rows, 2 * columns), "encoder_hidden_states": of(6, tiny_wan.TEXT_WIDTH)}
        return told | {"timestep": torch.full((count,), 500.0)}
    told = {"hidden_states": of(rows * columns, 16), "encoder_hidden_states": of(6, tiny_flux.TEXT_WIDTH)}
    told |= {"pooled_projections": of(tiny_flux.POOLED_WIDTH), "guidance": torch.full((count,), 2.5)}
    places = torch.cartesian_prod(*(torch.arange(float(size)) for size in (1, rows, columns)))
    return told | {"timestep": torch.full((count,), 0.5), "img_ids": places, "txt_ids": torch.zeros(6, 3)}


def random_widths(config, seed=0):
    rng = np.random.default_rng(seed)

    def kept(all_of, count, blocks):
        return np.stack([np.sort(rng.permutation(all_of)[:count]) for _ in range(blocks)])

    heads = {}
    for modules, blocks in attentions(config).items():
        heads |= dict.fromkeys(modules, kept(config.heads, KEPT, blocks))
    counts = {"blocks.mlp": BLOCKS, "double.image.mlp": 2, "double.text.mlp": 2, "single.mlp": 3}
    return Widths(heads=heads, neurons={name: kept(config.mlp_width, MLP, counts[name]) for name in mlps(config)})


def filled(module, seed):
    """A module of shapes with random weights of ordinary size."""
    rng = np.random.default_rng(seed)

    def fill(leaf):
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim != 3 else leaf.shape[1]
        spread = max(fan_in, 1) ** -0.5 if leaf.ndim > 1 else 0.3
        return (rng.standard_normal(leaf.shape) * spread).astype(np.float32)

    return jax.tree.map(fill, module)


def random_parts(kind, component, seed=None):
    """A router that is told what a model of this kind has, adapters of 2p and 4p, ratios."""
    content, features = CONTENT[kind]
    seed = ROUTERS[kind] if seed is None else seed
    config = RouterConfig(content=content, features=features, blocks=BLOCKS, hidden=24, time_frequencies=16)
    router = filled(nnx.eval_shape(lambda: Router(config, nnx.Rngs(0))), seed)
    settings = {"content": content, "features": features, "blocks": BLOCKS, "hidden": 24, "time_frequencies": 16}
    leaves = {name: np.asarray(leaf) for name, leaf in named_leaves(router)}
    # Content that differs little, as that of two noises does, is to decide here.
    leaves["up.kernel"][16:] *= 30
    adapters = part_of(filled(abstract_adapters(component.config, ADAPTERS), seed + 1), ADAPTERS)
    return {"router": Part(settings, leaves), "ddit": adapters, "coredit": Part(RATIOS, {})}


class Written:
    """A pipeline of one kind in its two layouts."""

    def __init__(self, kind, folder):
        self.kind, self.native, self.folder = kind, folder / "native", folder / "torch"
        self._of_size(SIZE)
        made = {
            "flux": lambda: tiny_flux.pipeline(dev=True),
            "text-to-video": tiny_wan.text_to_video,
            "image-to-video": tiny_wan.image_to_video,
            "first-frame": tiny_wan.text_or_image,
        }
        plain = made[kind]()
        plain.register_modules(transformer=transformer(kind))
        plain.save_pretrained(folder / "plain")
        source = open_checkpoint(folder / "plain")
        widths = random_widths(source.component("transformer").config)
        # Wan's two ways to normalise: one in each of its kinds.
        pruned = with_widths(source, {"transformer": widths}, norm_counts_pruned=kind == "text-to-video")
        parts = random_parts(kind, pruned.component("transformer"))
        convert(replace(pruned, files=pruned.files | part_files(parts)), self.native, "native")
        assert main(["to-torch", str(self.native), str(self.folder)]) == 0

    def _of_size(self, size):
        self.size = (2 * size[0], 2 * size[1]) if self.kind == "first-frame" else size
        self.cells = size[0] // 8, size[1] // 8

    def with_size(self, size):
        """The same pipeline, run at another size."""
        other = copy.copy(self)
        other._of_size(size)
        return other

    def with_adapters(self, settings, folder):
        """The same pipeline with random adapters of these settings."""
        other = copy.copy(self)
        other.native, other.folder = folder / "native", folder / "torch"
        other.__dict__.pop("pipe", None)
        source = open_checkpoint(self.native)
        shapes = abstract_adapters(source.component("transformer").config, settings)
        files = part_files({"ddit": part_of(filled(shapes, 9), settings)})
        convert(replace(source, files=source.files | files), other.native, "native")
        assert main(["to-torch", str(other.native), str(other.folder)]) == 0
        return other

    @cached_property
    def pipe(self):
        return load_pipeline(self.native)

    def theirs(self):
        """diffusers' pipeline with a fresh transformer."""
        index = diffusers.DiffusionPipeline.load_config(self.folder)
        loaded = getattr(diffusers, index["_class_name"]).from_pretrained(
            self.folder, transformer=load_transformer(self.folder / "transformer")
        )
        if self.kind == "first-frame":
            loaded = diffusers.WanImageToVideoPipeline(**loaded.components, expand_timesteps=True)
        loaded.set_progress_bar_config(disable=True)
        return loaded

    def noise(self, count):
        shape = (count, 1 if self.kind == "flux" else 3, self.cells[1], self.cells[0], 4)
        return np.random.default_rng(NOISES[self.kind]).standard_normal(shape).astype(np.float32)

    @property
    def has_image(self):
        return self.kind in ("image-to-video", "first-frame")

    @property
    def image(self):
        return Image.fromarray(np.random.default_rng(3).integers(0, 256, (50, 70, 3), np.uint8))

    def by_ours(self, plan, steps, count=1, guided=True, **told):
        """Final latents [B, T, Y, X, C]."""
        if self.kind == "flux":
            options = dict(true_cfg=3.0 if guided else 1.0, guidance=2.5)
        else:
            options = dict(frames=FRAMES, guidance=3.5 if guided else 1.0, solver="euler" if steps == 1 else "unipc")
        if self.has_image:
            options["image"] = self.image if count == 1 else [self.image] * count
        request = Request(
            prompt=PROMPTS[:count], negative_prompt=NEGATIVE, size=self.size, steps=steps, plan=plan,
            latents=self.noise(count), **options,
        )  # fmt: skip
        return self.pipe.denoise(self.pipe.prepare(request), **told)

    def by_diffusers(self, pipeline, steps, count=1, guided=True, **told):
        """The same by diffusers' pipeline, whatever has been done to its transformer."""
        shared = dict(
            prompt=PROMPTS[:count], negative_prompt=[NEGATIVE] * count, width=self.size[0], height=self.size[1],
            num_inference_steps=steps, output_type="latent", **told,
        )  # fmt: skip
        noise = torch.tensor(self.noise(count)).permute(0, 4, 1, 2, 3)
        with torch.no_grad():
            if self.kind == "flux":
                cells = torch.nn.functional.pixel_unshuffle(noise[:, :, 0], 2).flatten(2).transpose(1, 2)
                cfg = 3.0 if guided else 1.0
                found = pipeline(**shared, latents=cells, true_cfg_scale=cfg, guidance_scale=2.5).images
                cells = found.transpose(1, 2).unflatten(2, (self.cells[1] // 2, self.cells[0] // 2))
                return torch.nn.functional.pixel_shuffle(cells, 2).permute(0, 2, 3, 1)[:, None].float().numpy()
            if steps == 1:
                pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
            scale = 3.5 if guided else 1.0
            more = dict(num_frames=FRAMES, guidance_scale=scale, latents=noise)
            if self.has_image:
                more["image"] = self.image
            return pipeline(**shared, **more).frames.permute(0, 2, 3, 4, 1).numpy()


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)
