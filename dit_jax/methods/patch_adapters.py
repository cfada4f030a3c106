"""What a transformer needs to work on larger patches than it was made for (DDiT, arXiv 2602.16968): tokenizer, head and
low-rank additions of each size.

An adapted model is an ordinary backbone with another patch, whose blocks are the base model's own arrays.

Shapes: B samples, N tokens, T Y X latent grid, C latent channels, P channels of a patch row, D width, F MLP width, G
blocks, R rank, E hidden channels of the residual block.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit_jax.config import UserError
from dit_jax.methods.method import Part
from dit_jax.models.flux import FluxConfig
from dit_jax.models.wan import WanConfig
from dit_jax.ops.linear import Linear, precision_in
from dit_jax.ops.timestep import sinusoids
from dit_jax.parameters import Precision, cast, named_leaves, with_leaves

# Logical axes of every parameter of the adapters.
AXES = {
    "*.patch.kernel": (None, None),
    "*.patch.bias": (None,),
    "*.patch.size": (None,),
    "*.lora.*.up.down": ("blocks", "embed", None),
    "*.lora.*.up.up": ("blocks", None, "mlp"),
    "*.lora.*.down.down": ("blocks", "mlp", None),
    "*.lora.*.down.up": ("blocks", None, "embed"),
    "*.residual.conv": (None, None, None, None),
    "*.residual.conv_bias": (None,),
    "*.residual.time.kernel": (None, None),
    "*.residual.time.bias": (None,),
    "*.residual.out.kernel": (None, None),
    "*.residual.out.bias": (None,),
    "?p.out.kernel": (None, None),
    "?p.out.bias": (None,),
}

TIME_CHANNELS = 256  # of a timestep's sinusoids, as the backbones have

Config = WanConfig | FluxConfig


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """Sizes of the adapters, as their config.json has them.

    scales             how many base patches a token of each size covers along y and along x
    rank               of what is added to the blocks' MLPs; 0: nothing is (the paper's ablation)
    residual_channels  hidden channels of the residual block
    """

    scales: tuple[int, ...] = (2, 4)
    rank: int = 32
    residual_channels: int = 64


class SizedLinear(Linear):
    """A patch embedding that adds its size's own vector to every token."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs):
        super().__init__(inputs, outputs, rngs=rngs)
        self.size = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        return super().__call__(x) + self.size[...]


class LowRank(nnx.Module):
    """x·down·up of every block."""

    def __init__(self, blocks: int, inputs: int, outputs: int, rank: int):
        self.down = nnx.Param(jnp.zeros((blocks, inputs, rank)))
        self.up = nnx.Param(jnp.zeros((blocks, rank, outputs)))

    def __call__(self, x: jax.Array) -> jax.Array:
        product = functools.partial(jnp.matmul, precision=precision_in(x.dtype))
        return product(product(x, self.down[...].astype(x.dtype)), self.up[...].astype(x.dtype))


class AddedLinear(nnx.Module):
    """A linear map with a low-rank one added; the two share no weights, so that the base map stays what it is."""

    def __init__(self, base: Linear, added: LowRank):
        self.base, self.added = base, added

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.base(x)
        return y + self.added(x.astype(y.dtype))


class ResidualBlock(nnx.Module):
    """From what the backbone sees to what is added to the velocity, frame by frame, in fp32: 3x3 convolution, scale and
    shift by the timestep, SiLU, 1x1.

    The velocity goes along the noise at pure noise and against it without: what tokens of fewer channels than their
    patches have numbers cannot carry passes here, and how much of it is for the timestep to say.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, rngs: nnx.Rngs):
        self.conv = nnx.Param(jnp.zeros((3, 3, inputs, hidden)))
        self.conv_bias = nnx.Param(jnp.zeros(hidden))
        self.time = Linear(TIME_CHANNELS, 2 * hidden, rngs=rngs)
        self.out = Linear(hidden, outputs, rngs=rngs)

    def __call__(self, seen_BTYXC: jax.Array, t: jax.Array) -> jax.Array:
        """What is added [B, T, Y, X, C'] at timesteps t, one or [B]."""
        frames = einops.rearrange(seen_BTYXC.astype(jnp.float32), "b t y x c -> (b t) y x c")
        conv = jax.lax.conv_general_dilated(
            frames, self.conv[...].astype(jnp.float32), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=precision_in(jnp.float32),
        )  # fmt: skip
        hidden = (conv + self.conv_bias[...]).reshape(*seen_BTYXC.shape[:-1], -1)
        told_B = self.time(sinusoids(jnp.broadcast_to(t, seen_BTYXC.shape[:1]), TIME_CHANNELS)).astype(jnp.float32)
        scale, shift = jnp.split(told_B[:, None, None, None], 2, axis=-1)
        return self.out(jax.nn.silu(hidden * (1 + scale) + shift)).astype(jnp.float32)


class SizeAdapter(nnx.Module):
    """All that one patch size adds: embedding, head, low-rank maps of the MLPs (none of rank 0), residual block."""

    def __init__(self, config: Config, scale: int, settings: AdapterSettings, rngs: nnx.Rngs):
        cells = int(np.prod(config.patch)) * scale**2
        maps = {"up": (config.width, config.mlp_width), "down": (config.mlp_width, config.width)}
        self.patch = SizedLinear(config.in_channels * cells, config.width, rngs)
        self.lora = nnx.data(
            {
                f"{path}.{name}": LowRank(blocks, *sizes, settings.rank)
                for path, blocks in _mlps(config).items()
                for name, sizes in maps.items()
                if settings.rank
            }
        )
        self.residual = ResidualBlock(config.in_channels, settings.residual_channels, config.out_channels, rngs)
        self.out = Linear(config.width, config.out_channels * cells, rngs=rngs)


Adapters = dict[str, SizeAdapter]
"""The adapter of each size, by `size_name`."""


def size_name(scale: int) -> str:
    """How a patch size is written, in units of the base size p: 2p."""
    return f"{scale}p" if scale > 1 else "p"


def _mlps(config: Config) -> dict[str, int]:
    """Paths of the MLPs that are added to, and how many blocks each has."""
    if isinstance(config, WanConfig):
        return {"blocks.mlp": config.blocks}
    double, single = config.double_blocks, config.single_blocks
    return {"double.image.mlp": double, "double.text.mlp": double, "single.mlp": single}


def bilinear(size: int, larger: int) -> np.ndarray:
    """Operator [larger, size] that resizes `size` cells by linear interpolation between their centres."""
    places = np.clip((np.arange(larger) + 0.5) * size / larger - 0.5, 0, size - 1)
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(size)))


def _resized(rows: Any, operator: np.ndarray, patch: tuple[int, int, int]) -> np.ndarray:
    """[P, ...] over the cells of a patch (t, y, x, c), with y and x through the operator, in fp64."""
    rows = np.asarray(rows, np.float64)
    cells = rows.reshape(*patch, -1, *rows.shape[1:])
    return np.einsum("Yy,Xx,tyx...->tYX...", operator, operator, cells).reshape(-1, *rows.shape[1:])


def abstract_adapters(config: Config, settings: AdapterSettings) -> Adapters:
    """Shapes of a model's adapters."""
    return nnx.eval_shape(
        lambda: {size_name(scale): SizeAdapter(config, scale, settings, nnx.Rngs(0)) for scale in settings.scales}
    )


def initial_adapters(
    config: Config, layers: Mapping[str, Any], seed: int = 0, settings: AdapterSettings = AdapterSettings()
) -> Adapters:
    """Untrained adapters of a model from its own patch embedding and head, leaves `patch.kernel`, `patch.bias`,
    `out.kernel` and `out.bias`.

    The embedding is pinv(Bᵀ)·w of the base one, so that a patch enlarged by bilinear resizing B gives the token that it
    gave before; the head is B·w, an enlarged velocity. Low-rank maps and residual blocks add nothing yet: their first
    weights are random, their last zero, as are the sizes' vectors.
    """
    rng = np.random.default_rng(seed)
    adapters = abstract_adapters(config, settings)
    values: dict[str, np.ndarray] = {}
    for name, leaf in named_leaves(adapters):
        values[name] = np.zeros(leaf.shape)
        if name.endswith((".conv", ".up.down", ".down.down")):
            inputs = np.prod(leaf.shape[:-1]) if name.endswith(".conv") else leaf.shape[-2]
            values[name] = rng.standard_normal(leaf.shape, np.float32) / inputs**0.5
    for scale in settings.scales:
        # Patches are square: y says how many cells are enlarged.
        enlarge, size = bilinear(config.patch[1], config.patch[1] * scale), size_name(scale)
        values[f"{size}.patch.kernel"] = _resized(layers["patch.kernel"], np.linalg.pinv(enlarge.T), config.patch)
        values[f"{size}.patch.bias"] = np.asarray(layers["patch.bias"])
        values[f"{size}.out.kernel"] = _resized(np.asarray(layers["out.kernel"]).T, enlarge, config.patch).T
        values[f"{size}.out.bias"] = _resized(layers["out.bias"], enlarge, config.patch)
    return with_leaves(adapters, {name: jnp.asarray(value, jnp.float32) for name, value in values.items()})


def part_of(adapters: Adapters, settings: AdapterSettings) -> Part:
    """Adapters as a checkpoint holds them."""
    return Part(asdict(settings), dict(named_leaves(adapters)))


def untrained_part(
    config: Config, layers: Mapping[str, Any], seed: int, settings: AdapterSettings = AdapterSettings()
) -> Part:
    """Untrained adapters as a checkpoint holds them (`initial_adapters`)."""
    return part_of(initial_adapters(config, layers, seed, settings), settings)


def adapters_from(config: Config, part: Part) -> Adapters:
    """Adapters of a model from what its checkpoint holds; UserError where that is of another model."""
    settings = AdapterSettings(**{**part.settings, "scales": tuple(part.settings["scales"])})
    abstract = abstract_adapters(config, settings)
    missing = sorted({name for name, _ in named_leaves(abstract)} - set(part.leaves))
    if missing:
        raise UserError(
            f"the DDiT adapters lack {missing[0]}: expected those of this model; make them with `dit-adapt --add ddit`"
        )
    return with_leaves(abstract, part.leaves)


def adapted(model: Any, adapter: SizeAdapter, scale: int) -> Any:
    """The model at a larger patch size, in its own dtype; the blocks' arrays are the model's own, not copies."""
    larger = jax.tree.map(lambda leaf: leaf, model)
    time, rows, columns = model.config.patch
    larger.config = replace(model.config, patch=(time, rows * scale, columns * scale), merged=scale)
    dtype = model.patch.kernel[...].dtype
    larger.patch, larger.out = (cast(layer, Precision(weights=dtype)) for layer in (adapter.patch, adapter.out))
    for path, added in adapter.lora.items():
        *parents, name = path.split(".")
        mlp = functools.reduce(getattr, parents, larger)
        setattr(mlp, name, AddedLinear(getattr(mlp, name), added))
    return larger


def scales_of(settings: Mapping[str, Any]) -> tuple[int, ...]:
    """Sizes that a checkpoint's adapters are for."""
    return tuple(settings["scales"])
