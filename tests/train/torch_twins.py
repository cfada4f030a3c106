"""Small Wan and FLUX models with random weights, each also as diffusers' own, whose losses autograd differentiates.

What the methods do to them is written out here once more in torch, as hooks: gates, taps, CoReDiT's masked attention.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import FluxTransformer2DModel, WanTransformer3DModel
from flax import nnx

from convert.flux import flux_config, flux_rows
from convert.tables import assign
from convert.wan import wan_config, wan_rows
from dit_jax.methods.patch_adapters import AdapterSettings, abstract_adapters
from dit_jax.methods.routing import Content, Router, RouterConfig
from dit_jax.models.flux import Flux
from dit_jax.models.wan import Wan

WAN = dict(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=11,
    freq_dim=16, ffn_dim=37, num_layers=4, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
)  # fmt: skip
FROM_IMAGE = WAN | dict(in_channels=9, image_dim=13, added_kv_proj_dim=24)
FLUX = dict(
    in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=11, pooled_projection_dim=9, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
)  # fmt: skip
SETTINGS = {"wan": WAN, "wan-i2v": FROM_IMAGE, "flux": FLUX}
CONTENT: dict[str, Content] = {"wan": "latents", "wan-i2v": "image", "flux": "pooled"}
FEATURES = {"latents": 9, "image": 13, "pooled": 9}


@dataclass
class Twin:
    """A model of ours, the same of diffusers', and the table between their weights."""

    model: Any
    theirs: Any
    rows: Any

    @property
    def blocks(self) -> list[Any]:
        if isinstance(self.theirs, WanTransformer3DModel):
            return list(self.theirs.blocks)
        return [*self.theirs.transformer_blocks, *self.theirs.single_transformer_blocks]

    def gradients(self) -> Any:
        """What autograd found, in the layout of our model, and nothing left behind."""
        found = {}
        for name, parameter in self.theirs.named_parameters():
            found[name] = np.zeros(parameter.shape, np.float32) if parameter.grad is None else parameter.grad.numpy()
            parameter.grad = None
        return assign(jax.eval_shape(lambda: self.model), self.rows, found)


@lru_cache
def twin(kind: str, seed: int, narrower: int = 0) -> Twin:
    """A pair of random weights; a Wan may have so many neurons fewer."""
    torch.manual_seed(seed)
    if kind == "flux":
        theirs, config_of, rows_of, ours = FluxTransformer2DModel(**FLUX), flux_config, flux_rows, Flux
    else:
        settings = SETTINGS[kind] | dict(ffn_dim=WAN["ffn_dim"] - narrower)
        theirs, config_of, rows_of, ours = WanTransformer3DModel(**settings), wan_config, wan_rows, Wan
    for parameter in theirs.parameters():
        matrix = parameter.ndim > 1 and parameter.shape[0] > 1
        spread = parameter[0].numel() ** -0.5 if matrix else 0.3
        parameter.data = torch.randn_like(parameter) * spread + (parameter.ndim == 1) * (parameter.data == 1)
    config: Any = config_of(dict(theirs.config))
    rows, tensors = rows_of(config), {name: value.numpy() for name, value in theirs.state_dict().items()}
    return Twin(assign(nnx.eval_shape(lambda: ours(config, nnx.Rngs(0))), rows, tensors), theirs, rows)


def batch_of(kind: str, seed: int = 0, empty: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    latents = normal(2, 1, 8, 10, 4) if kind == "flux" else normal(2, 3, 6, 10, 4)
    # diffusers cuts image tokens off before 512 of text.
    batch = {"latents": latents, "text": normal(2, 512 if kind == "wan-i2v" else 5, 11)}
    if kind == "flux":
        batch |= {"pooled": normal(2, 9), "guidance": np.float32([3.5, 1.25])}
    if kind == "wan-i2v":
        batch |= {"extra": normal(*latents.shape[:-1], 5), "image": normal(2, 4, 13)}
    if empty:
        told = [name for name in ("text", "pooled") if name in batch]
        batch |= {f"empty_{name}": np.repeat(normal(1, *batch[name].shape[1:]), 2, axis=0) for name in told}
    return batch


@dataclass
class Seen:
    """What hooks saw of every block in a call: its output, and its attention's, of the latents' tokens [B, N, D]."""

    outputs: dict[int, torch.Tensor] = field(default_factory=dict)
    attention: dict[int, torch.Tensor] = field(default_factory=dict)


def velocity(
    pair: Twin,
    latents: torch.Tensor,
    levels: np.ndarray,
    batch: dict[str, np.ndarray],
    gates: torch.Tensor | None = None,
    masked: "Masked | None" = None,
) -> tuple[torch.Tensor, Seen]:
    """Velocity [B, T, Y, X, C] of diffusers' model at levels [B] or (Wan) of each token [B, N], gated [B, G] and with
    masked attention if asked, and what was seen on the way."""
    seen = Seen()
    hooks = [hook for index, block in enumerate(pair.blocks) for hook in _hooks(block, index, seen, gates, masked)]
    try:
        return (flux_velocity if "pooled" in batch else wan_velocity)(pair.theirs, latents, levels, batch), seen
    finally:
        for hook in hooks:
            hook.remove()


def wan_velocity(model, latents, levels, batch):
    if "extra" in batch:
        latents = torch.cat([latents, torch.tensor(batch["extra"])], dim=-1)
    image = torch.tensor(batch["image"]) if "image" in batch else None
    t, text = torch.tensor(levels) * 1000, torch.tensor(batch["text"])
    return model(latents.permute(0, 4, 1, 2, 3), t, text, image).sample.permute(0, 2, 3, 4, 1)


def told_levels(at, shape, side=2) -> np.ndarray:
    """The levels of noised latents [B], or of every token [B, N] where first frames are held."""
    levels = np.asarray(at.levels)
    if at.held is None:
        return levels
    frame = (shape[2] // side) * (shape[3] // side)
    of_tokens = np.repeat(levels[:, None], shape[1] * frame, axis=1)
    of_tokens[np.asarray(at.held), :frame] = 0
    return of_tokens


def counted_mean(squared, held=None):
    """The mean, in torch or NumPy; over samples of each one's without its first frame where some are held."""
    if held is None:
        return squared.mean()
    means = [of_sample[int(first) :].mean() for of_sample, first in zip(squared, np.asarray(held), strict=True)]
    return sum(means) / len(means)


def flux_velocity(model, latents, levels, batch, scale=1):
    """Rows of a token are packed in the order (c y x), as diffusers has them, or (y x c) at another patch size."""
    (b, _, y, x, c), patch = latents.shape, 2 * scale
    cells = latents[:, 0].reshape(b, y // patch, patch, x // patch, patch, c)
    cells = cells.permute(0, 1, 3, 5, 2, 4) if scale == 1 else cells.permute(0, 1, 3, 2, 4, 5)
    ids = torch.zeros(y // patch, x // patch, 3)
    ids[..., 1] += torch.arange(y // patch)[:, None] * scale + (scale - 1) / 2
    ids[..., 2] += torch.arange(x // patch)[None] * scale + (scale - 1) / 2
    rows = model(
        hidden_states=cells.reshape(b, y * x // patch**2, -1), encoder_hidden_states=torch.tensor(batch["text"]),
        pooled_projections=torch.tensor(batch["pooled"]), timestep=torch.tensor(levels), img_ids=ids.reshape(-1, 3),
        txt_ids=torch.zeros(batch["text"].shape[1], 3), guidance=torch.tensor(batch["guidance"]),
    ).sample  # fmt: skip
    if scale == 1:
        return rows.reshape(b, y // 2, x // 2, c, 2, 2).permute(0, 1, 4, 2, 5, 3).reshape(latents.shape)
    return rows.reshape(b, y // patch, x // patch, patch, patch, c).permute(0, 1, 3, 2, 4, 5).reshape(latents.shape)


def _hooks(block, index, seen, gates, masked):
    wan = hasattr(block, "attn1")
    attention = block.attn1 if wan else block.attn
    text = {}

    def entered(module, args, kwargs):
        text["tokens"] = 0 if wan else kwargs["encoder_hidden_states"].shape[1]

    def gated(module, args, kwargs, output):
        before = args[:1] if wan else (kwargs["encoder_hidden_states"], kwargs["hidden_states"])
        after = (output,) if wan else output
        if gates is not None:
            gate = gates[:, index, None, None]
            after = tuple(gate * new + (1 - gate) * old for new, old in zip(after, before, strict=True))
        seen.outputs[index] = after[-1]
        return after[0] if wan else after

    def masking(module, args, kwargs):
        if masked is None:
            return None
        x = args[0] if wan else kwargs["hidden_states"]
        joint = not wan and kwargs.get("encoder_hidden_states") is None  # text lies in front, in a single block
        kept = masked.begin(x[:, text["tokens"] :] if joint else x, index)
        mask = torch.cat([torch.ones(len(x), text["tokens"], dtype=torch.bool), kept], dim=1)[:, None, None]
        return ((*args[:2], mask, *args[3:]), kwargs) if wan else (args, kwargs | {"attention_mask": mask})

    def attended(module, args, kwargs, output):
        single = not wan and torch.is_tensor(output)
        found = output if wan else output[:, text["tokens"] :] if single else output[0]
        found = found if masked is None else masked.rebuilt(found)
        width = found.shape[-1]
        seen.attention[index] = found @ block.proj_out.weight[:, :width].T if single else found
        if single:
            return torch.cat([output[:, : text["tokens"]], found], dim=1)
        return found if wan else (found, *output[1:])

    return (
        block.register_forward_pre_hook(entered, with_kwargs=True),
        block.register_forward_hook(gated, with_kwargs=True),
        attention.register_forward_pre_hook(masking, with_kwargs=True),
        attention.register_forward_hook(attended, with_kwargs=True),
    )


@dataclass
class Masked:
    """CoReDiT's masked attention on a lattice (T, Y, X): which tokens stay, and the outputs of the others.

    skipped  tokens, of every block [G] or of every sample too [G, B]
    """

    grid: tuple[int, int, int]
    cells: tuple[int, int]
    skipped: np.ndarray
    stride: int = 3

    def begin(self, x: torch.Tensor, block: int) -> torch.Tensor:
        """Which tokens stay [B, N], by the coherence of the attention's input."""
        unit = x / x.norm(dim=-1, keepdim=True)
        same = torch.tensor(self._same(self.cells[block % 2]), dtype=x.dtype)
        self.coherence = (unit * ((same / same.sum(1, keepdim=True)) @ unit)).sum(-1)
        protects = torch.tensor(self._protected(block))
        order = torch.where(protects, torch.inf, -self.coherence.detach()).argsort(dim=1, stable=True)
        counts = torch.tensor(np.broadcast_to(self.skipped[block], len(x)))
        self.kept = order.argsort(dim=1) >= counts[:, None]
        return self.kept

    def rebuilt(self, y: torch.Tensor) -> torch.Tensor:
        """y_i = Σ_j SC_j·y_j / Σ_j SC_j over the kept tokens of a skipped one's 3x3 cell."""
        weights = torch.where(self.kept, self.coherence.clamp(min=1e-3), 0)[:, None] * torch.tensor(self._same(3))
        means = (weights / weights.sum(-1, keepdim=True)) @ y
        return torch.where(self.kept[..., None], y, means)

    def _same(self, cell: int) -> np.ndarray:
        """1 where two tokens are of one cell [N, N]."""
        frame, row, column = (axis.reshape(-1) for axis in np.meshgrid(*map(np.arange, self.grid), indexing="ij"))
        name = np.stack([frame, row // cell, column // cell])
        return (name[:, :, None] == name[:, None]).all(0).astype(np.float32)

    def _protected(self, block: int) -> np.ndarray:
        _, row, column = (axis.reshape(-1) for axis in np.meshgrid(*map(np.arange, self.grid), indexing="ij"))
        found = (row + column - block) % self.stride == 0
        for members in self._same(3).astype(bool):
            if not found[members].any():
                found[np.flatnonzero(members)[0]] = True
        return found


@lru_cache
def router_of(kind: str) -> Router:
    """A router of ordinary weights, told what its backbone's usually is."""
    blocks, content = sum(twin(kind, 0).model.stacks), CONTENT[kind]
    config = RouterConfig(content=content, features=FEATURES[content], blocks=blocks, hidden=16, time_frequencies=8)
    rng = np.random.default_rng(8)

    def fill(leaf):
        return jnp.asarray(rng.standard_normal(leaf.shape) / leaf.shape[0] ** 0.5, jnp.float32)

    return jax.tree.map(fill, nnx.eval_shape(lambda: Router(config, nnx.Rngs(0))))


def router_gates(leaves, kind, noisy, levels, batch, limits):
    """Straight-through gates [B, G] of a router's torch leaves, of so many blocks at t = 0 and at t = 1000."""
    x = torch.as_tensor(noisy)
    t = torch.as_tensor(levels) * 1000
    frequencies = torch.exp(-np.log(10_000.0) * torch.arange(4, dtype=torch.float64) / 4).float()
    waves = torch.cat([torch.cos(t[:, None] * frequencies), torch.sin(t[:, None] * frequencies)], dim=1)
    content = {
        "latents": lambda: torch.cat(
            [x.mean((1, 2, 3)), x.std((1, 2, 3), correction=0), x.diff(dim=1).abs().mean((1, 2, 3, 4))[:, None]], dim=1
        ),
        "image": lambda: torch.tensor(batch["image"])[:, 0],
        "pooled": lambda: torch.tensor(batch["pooled"]),
    }[CONTENT[kind]]()
    silu = torch.nn.functional.silu
    hidden = silu(torch.cat([waves, content], dim=1) @ leaves.up.kernel.get_value() + leaves.up.bias.get_value())
    hidden = silu(hidden @ leaves.middle.kernel.get_value() + leaves.middle.bias.get_value())
    logits = hidden @ leaves.out.kernel.get_value() + leaves.out.bias.get_value()
    hard = torch.zeros_like(logits)
    for row, level in enumerate(levels):
        count = round(limits[0] + (limits[1] - limits[0]) * float(level))
        inner = logits[row, 1:-1].argsort(descending=True)[: count - 2] + 1
        hard[row, [0, logits.shape[1] - 1, *inner.tolist()]] = 1
    soft = torch.sigmoid(logits[:, 1:-1])
    return torch.cat([hard[:, :1], hard[:, 1:-1] + (soft - soft.detach()), hard[:, -1:]], dim=1)


def use_rounded_frequencies(monkeypatch) -> None:
    """diffusers takes the exponentials in fp32; here they are rounded from fp64, as ours are."""

    def sinusoids(timesteps, channels, **_):
        frequencies = torch.exp(-np.log(10_000.0) * torch.arange(channels // 2, dtype=torch.float64) / (channels // 2))
        angles = timesteps[:, None].float() * frequencies.float()
        return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)

    monkeypatch.setattr("diffusers.models.embeddings.get_timestep_embedding", sinusoids)


def torch_leaves(tree) -> Any:
    """Our own pytree as torch parameters, leaf by leaf, for what diffusers does not have."""
    return jax.tree.map(lambda leaf: torch.tensor(np.asarray(leaf), requires_grad=True), tree)


def gradients_of(leaves) -> Any:
    """What autograd found for these."""

    def gradient(leaf):
        return np.zeros(leaf.shape, np.float32) if leaf.grad is None else leaf.grad.numpy()

    return jax.tree.map(gradient, leaves)


def relative(found, expected) -> float:
    """Relative error of two trees of the same structure, over all elements together."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    flat = [(np.ravel(np.asarray(a, np.float64)), np.ravel(np.asarray(b, np.float64))) for a, b in pairs]
    found, expected = (np.concatenate(side) for side in zip(*flat, strict=True))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def as_jax(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(value) for name, value in batch.items()}


def random_adapters(kind: str) -> dict[str, Any]:
    """DDiT's adapters of ordinary weights."""
    rng = np.random.default_rng(7)

    def fill(leaf):
        fan_in = np.prod(leaf.shape[1:-1]) if leaf.ndim > 2 else leaf.shape[0] if leaf.ndim == 2 else 4
        return jnp.asarray(rng.standard_normal(leaf.shape) / fan_in**0.5, jnp.float32)

    settings = AdapterSettings(rank=3, residual_channels=5)
    return jax.tree.map(fill, abstract_adapters(twin(kind, 0).model.config, settings))
