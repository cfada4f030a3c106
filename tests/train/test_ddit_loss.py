"""DDiT's loss against PyTorch autograd, on diffusers' models at a larger patch size."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel, WanTransformer3DModel
from diffusers.models.embeddings import get_timestep_embedding
from torch_twins import (
    FLUX,
    WAN,
    as_jax,
    batch_of,
    counted_mean,
    flux_velocity,
    gradients_of,
    random_adapters,
    relative,
    told_levels,
    torch_leaves,
    twin,
    use_rounded_frequencies,
    velocity,
    wan_velocity,
)

from train.ddit_loss import ddit
from train.losses import FlowSettings, noised

KEY = jax.random.key(3)


@pytest.fixture(autouse=True)
def _frequencies(monkeypatch):
    use_rounded_frequencies(monkeypatch)


class Affine(torch.nn.Module):
    """x·kernel + bias in our layout."""

    def __init__(self, kernel, bias):
        super().__init__()
        self.kernel, self.bias = kernel, bias

    def forward(self, x):
        return x @ self.kernel + self.bias


class PatchRows(torch.nn.Module):
    """Stands for Wan's convolution: cells of a patch in the order (y x c), then a linear map."""

    def __init__(self, affine, side):
        super().__init__()
        self.affine, self.side = affine, side

    def forward(self, x):
        b, c, t, y, x_size = x.shape
        cells = x.reshape(b, c, t, y // self.side, self.side, x_size // self.side, self.side)
        return self.affine(cells.permute(0, 2, 3, 5, 4, 6, 1).flatten(4)).permute(0, 4, 1, 2, 3)


class Centres(torch.nn.Module):
    """Wan's rotations at the centres of merged patches."""

    def __init__(self, widths, scale):
        super().__init__()
        self.widths, self.scale = widths, scale

    def forward(self, x):
        side = 2 * self.scale
        sizes = x.shape[2], x.shape[3] // side, x.shape[4] // side
        places = torch.meshgrid(*[torch.arange(size, dtype=torch.float64) for size in sizes], indexing="ij")
        angles = []
        for axis, (place, width) in enumerate(zip(places, self.widths, strict=True)):
            centre = place * self.scale + (self.scale - 1) / 2 if axis else place
            frequencies = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
            angles.append((centre.reshape(-1, 1) * frequencies).repeat_interleave(2, dim=1))
        angles = torch.cat(angles, dim=1)[None, :, None]
        return angles.cos().float(), angles.sin().float()


def embedding(adapter):
    """Patch rows to tokens, with the size's own vector."""
    patch = adapter.patch
    return Affine(patch.kernel.get_value(), patch.bias.get_value() + patch.size.get_value())


def added(lora, block, part=slice(None)):
    """A hook that adds x·down·up."""
    down, up = lora.down.get_value(), lora.up.get_value()
    return lambda module, args, output: output + args[0][..., part] @ down[block] @ up[block]


def larger_wan(adapter, scale):
    model = WanTransformer3DModel(**WAN | dict(patch_size=(1, 2 * scale, 2 * scale)))
    _with_base_weights(model, "wan", ("patch_embedding", "proj_out"))
    model.patch_embedding, model.rope = PatchRows(embedding(adapter), 2 * scale), Centres((4, 4, 4), scale)
    model.proj_out = Affine(adapter.out.kernel.get_value(), adapter.out.bias.get_value())
    for index, block in enumerate(model.blocks):
        block.ffn.net[0].proj.register_forward_hook(added(adapter.lora["blocks.mlp.up"], index))
        block.ffn.net[2].register_forward_hook(added(adapter.lora["blocks.mlp.down"], index))
    return model


def larger_flux(adapter, scale):
    model = FluxTransformer2DModel(**FLUX | dict(in_channels=16 * scale**2))
    _with_base_weights(model, "flux", ("x_embedder", "proj_out"))
    model.x_embedder = embedding(adapter)
    model.proj_out = Affine(adapter.out.kernel.get_value(), adapter.out.bias.get_value())
    for index, block in enumerate(model.transformer_blocks):
        for name, mlp in (("image", block.ff), ("text", block.ff_context)):
            mlp.net[0].proj.register_forward_hook(added(adapter.lora[f"double.{name}.mlp.up"], index))
            mlp.net[2].register_forward_hook(added(adapter.lora[f"double.{name}.mlp.down"], index))
    for index, block in enumerate(model.single_transformer_blocks):
        block.proj_mlp.register_forward_hook(added(adapter.lora["single.mlp.up"], index))
        mlp = slice(block.attn.inner_dim, None)  # behind the attention's output
        block.proj_out.register_forward_hook(added(adapter.lora["single.mlp.down"], index, mlp))
    return model


def _with_base_weights(model, kind, other):
    weights = {name: value for name, value in twin(kind, 0).theirs.state_dict().items() if not name.startswith(other)}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.startswith(other) for name in missing)


def torch_residual(block, seen, t_B):
    """3x3 convolution, scale and shift by the timestep, SiLU, 1x1, frame by frame."""
    frames = seen.flatten(0, 1).permute(0, 3, 1, 2)
    kernel = block.conv.get_value().permute(3, 2, 0, 1)
    hidden = torch.nn.functional.conv2d(frames, kernel, block.conv_bias.get_value(), padding=1).permute(0, 2, 3, 1)
    hidden = hidden.reshape(*seen.shape[:-1], -1)
    told_B = (
        get_timestep_embedding(t_B, 256, flip_sin_to_cos=True, downscale_freq_shift=0) @ block.time.kernel.get_value()
    )
    scale, shift = (told_B + block.time.bias.get_value())[:, None, None, None].chunk(2, dim=-1)
    hidden = hidden * (1 + scale) + shift
    return torch.nn.functional.silu(hidden) @ block.out.kernel.get_value() + block.out.bias.get_value()


def enlarged(latents, side):
    """Filled up to whole patches by the last cells."""
    for axis in (2, 3):
        last = latents.narrow(axis, latents.shape[axis] - 1, 1)
        latents = torch.cat([latents, *[last] * (-latents.shape[axis] % side)], dim=axis)
    return latents


@partial(jax.jit, static_argnames=("scale", "settings"))
def ours(trained, frozen, batch, key, scale, settings):
    return jax.value_and_grad(ddit, has_aux=True)(trained, frozen, batch, key, scale=scale, settings=settings)


@pytest.mark.parametrize(
    ("kind", "scale", "share"),
    [("wan", 2, 0), ("wan", 2, 0.5), ("flux", 2, 0)]
    + [pytest.param(kind, 4, 0, marks=pytest.mark.long) for kind in ("wan", "flux")],
)
def test_values_and_gradients_are_pytorchs(kind, scale, share):
    adapters, batch, name = random_adapters(kind), batch_of(kind), f"{scale}p"
    frozen = {"teacher": twin(kind, 0).model}
    settings = FlowSettings(first_frame_conditioning=share)
    (loss, metrics), gradients = ours({"adapters": adapters}, frozen, as_jax(batch), KEY, scale, settings)

    at = noised(jnp.asarray(batch["latents"]), KEY, settings)
    noisy, levels = torch.tensor(np.asarray(at.latents)), np.asarray(at.levels)
    with torch.no_grad():
        target = velocity(twin(kind, 0), noisy, told_levels(at, noisy.shape), batch)[0]
    leaves = torch_leaves(adapters[name])
    model = (larger_flux if kind == "flux" else larger_wan)(leaves, scale)
    wide = enlarged(noisy, 2 * scale)
    if kind == "flux":
        found = flux_velocity(model, wide, levels, batch, scale)
    else:
        found = wan_velocity(model, wide, told_levels(at, wide.shape, 2 * scale), batch)
    found = found[:, :, : noisy.shape[2], : noisy.shape[3]] + torch_residual(
        leaves.residual, noisy, torch.tensor(levels) * 1000
    )
    expected = counted_mean((found - target).square(), at.held)
    expected.backward()
    assert relative(loss, expected.detach()) <= 1e-4
    assert relative(gradients["adapters"][name], gradients_of(leaves)) <= 1e-4
    slow = counted_mean((found.detach().numpy().astype(np.float64) - target.numpy()) ** 2, at.held)
    assert relative(metrics["loss_teacher"], slow) <= 1e-4
    other = gradients["adapters"]["2p" if scale == 4 else "4p"]
    assert all((leaf == 0).all() for leaf in map(np.asarray, jax.tree.leaves(other)))
