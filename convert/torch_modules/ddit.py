"""DDiT in PyTorch (arXiv 2602.16968): patches of 2p and 4p for diffusers' Wan and FLUX, chosen anew at every step.

    choose = ThirdDifference(threshold=0.02)
    sizes = PatchSizes(pipe.transformer, "model/methods/ddit", choose, branches=2)
    frames = pipe("a red 7 moving left", callback_on_step_end=choose.after_step).frames
    print(sizes.used)

Shapes: B samples, T Y X latent grid, C latent channels, N patches.
"""

import inspect
import json
from pathlib import Path

import torch
from diffusers.models.embeddings import get_timestep_embedding
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F


class ThirdDifference:
    """Chooses the largest size whose patches' deviations have a ρ-quantile below τ, else p: by the third difference of
    the last four latents, of one sample.

    patch  (t, y, x) of the base size; `held` first latent frames are known, and have no say

    On a straight path, whose third difference is 0, latents of deviation 1 have by rounding alone a 0.4-quantile of
    2e-7 in fp32, 0.0009 in fp16 and 0.007 in bf16: a τ below that chooses p always. The transformer sees them in its
    own dtype. With `callback_on_step_end=choose.after_step` they are taken as the pipeline has them: in fp32 in Wan's,
    but for the noise, which the fourth step's choice knows as the transformer saw it (0.0016 in bf16). FluxPipeline
    itself keeps latents in the transformer's dtype.
    """

    def __init__(self, threshold: float = 0.001, quantile: float = 0.4, scales=(2, 4), patch=(1, 2, 2), held: int = 0):
        self.threshold, self.quantile, self.scales, self.patch, self.held = threshold, quantile, scales, patch, held
        self.last: list[torch.Tensor] = []
        self.handed: torch.Tensor | None = None
        self.t = -1.0

    def __call__(self, t: float, latents_BCTYX) -> int:
        assert len(latents_BCTYX) == 1, "each sample chooses for itself: run them one by one"
        if t > self.t:  # another run
            self.last, self.handed = [], None
        latents = latents_BCTYX if self.handed is None else self.handed
        if latents.ndim == 3:  # FLUX's pipeline has them packed
            latents = unpacked(latents, latents_BCTYX.shape[-2] // 2, latents_BCTYX.shape[-1] // 2, 2)
        self.t, self.handed, self.last = t, None, [*self.last[-3:], latents.float()]
        if len(self.last) < 4:
            return 1
        oldest, old, new, newest = self.last
        bend = (newest - 3 * new + 3 * old - oldest)[:, :, self.held :]
        below = [scale for scale in self.scales if self._value(bend, scale) < self.threshold]
        return max(below, default=1)

    def after_step(self, pipe, step: int, t, told: dict) -> dict:
        """diffusers' `callback_on_step_end`: the pipeline's latents, which the next choice is by."""
        self.handed = told["latents"]
        return {}

    def _value(self, x_BCTYX, scale: int) -> float:
        return float(torch.quantile(deviations(x_BCTYX, self.patch, scale), self.quantile))


def deviations(x_BCTYX, patch, scale: int):
    """Standard deviation over the cells and channels of every patch [B, N], cells beyond the lattice left out."""
    steps = (patch[0], patch[1] * scale, patch[2] * scale)

    def rows(x):
        x = F.pad(x, [end for size, step in zip(x.shape[:1:-1], steps[::-1], strict=True) for end in (0, -size % step)])
        t, y, x_ = (size // step for size, step in zip(x.shape[2:], steps, strict=True))
        x = x.reshape(len(x), -1, t, steps[0], y, steps[1], x_, steps[2]).permute(0, 2, 4, 6, 1, 3, 5, 7)
        return x.flatten(4).flatten(1, 3)

    values, real = rows(x_BCTYX), rows(torch.ones_like(x_BCTYX))
    mean = (values * real).sum(-1, keepdim=True) / real.sum(-1, keepdim=True)
    return (((values - mean).square() * real).sum(-1) / real.sum(-1)).sqrt()


class MergedRope(nn.Module):
    """Wan's rotation of tokens that stand at the centre of `scale` base patches along y and along x."""

    def __init__(self, base, scale: int):
        super().__init__()
        self.widths, self.patch, self.scale = (base.t_dim, base.h_dim, base.w_dim), base.patch_size, scale

    def forward(self, x_BCTYX):
        angles = []
        for axis, width in enumerate(self.widths):
            merged = self.scale if axis else 1
            count = x_BCTYX.shape[2 + axis] // (self.patch[axis] * merged)
            centres = torch.arange(count, dtype=torch.float64) * merged + (merged - 1) / 2
            frequencies = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
            shape = [1, 1, 1, width]
            shape[axis] = count
            angles.append(torch.outer(centres, frequencies).repeat_interleave(2, dim=1).reshape(shape))
        grid = torch.broadcast_shapes(*(angle.shape[:3] for angle in angles))
        whole = torch.cat([angle.expand(*grid, -1) for angle in angles], dim=-1).reshape(1, -1, 1, sum(self.widths))
        return whole.cos().float().to(x_BCTYX.device), whole.sin().float().to(x_BCTYX.device)


class PatchSizes:
    """Makes a transformer run at the size that `choose(t, latents [B, C, T, Y, X])` says: 1, or a scale that it has
    adapters for.

    folder    `methods/ddit`, or `methods/ddit/transformer_2` of a second expert
    branches  calls of the transformer a step, which share their size: 2 where it is called for a negative prompt too
    used      the size of every call so far
    """

    def __init__(self, transformer, folder, choose, branches: int = 1):
        self.scales = json.loads((Path(folder) / "config.json").read_text())["scales"]
        self.choose, self.branches, self.scale = choose, branches, 1
        self.used: list[int] = []
        self.wan, self.signature = hasattr(transformer, "blocks"), inspect.signature(transformer.forward)
        self.embedding = "patch_embedding" if self.wan else "x_embedder"
        self.layers = {1: {name: getattr(transformer, name) for name in (self.embedding, "proj_out")}}
        self.patch = tuple(transformer.config.patch_size) if self.wan else (1, 2, 2)
        if self.wan:
            self.layers[1]["rope"] = transformer.rope
        self.low_rank: dict[tuple[int, str], tuple] = {}
        self.residual: dict[int, dict] = {}
        tensors = load_file(Path(folder) / "weights.safetensors", device=str(transformer.device))
        for scale in self.scales:
            mark = f"{scale}p."
            self._add(transformer, scale, {key[len(mark) :]: w for key, w in tensors.items() if key.startswith(mark)})
        for name in sorted({name for _, name in self.low_rank}):
            transformer.get_submodule(name).register_forward_hook(self._adding(name))
        transformer.register_forward_pre_hook(self._before, with_kwargs=True)
        transformer.register_forward_hook(self._after)

    def _add(self, transformer, scale: int, tensors) -> None:
        base, dtype = self.layers[1], transformer.dtype
        weight = tensors[f"{self.embedding}.weight"]
        # The vector of a size is added to every token, as the embedding's bias is.
        bias = tensors[f"{self.embedding}.bias"] + tensors["size_embedding"]
        if self.wan:
            kernel = tuple(weight.shape[2:])
            embedding: nn.Module = nn.Conv3d(weight.shape[1], weight.shape[0], kernel, kernel)
        else:
            embedding = nn.Linear(*weight.shape[::-1])
        out = nn.Linear(*tensors["proj_out.weight"].shape[::-1])
        embedding.load_state_dict({"weight": weight, "bias": bias})
        out.load_state_dict({"weight": tensors["proj_out.weight"], "bias": tensors["proj_out.bias"]})
        self.layers[scale] = {
            name: layer.to(weight.device, dtype) for name, layer in ((self.embedding, embedding), ("proj_out", out))
        }
        if self.wan:
            self.layers[scale]["rope"] = MergedRope(base["rope"], scale)
        for key in tensors:
            if key.endswith(".lora_A.weight"):
                name = key.removesuffix(".lora_A.weight")
                self.low_rank[scale, name] = (tensors[key].to(dtype), tensors[f"{name}.lora_B.weight"].to(dtype))
        self.residual[scale] = {
            f"{layer}.{leaf}": tensors[f"residual.{layer}.{leaf}"].float()
            for layer in ("conv", "time", "out")
            for leaf in ("weight", "bias")
        }

    def _adding(self, name: str):
        def hook(module, args, y):
            if (self.scale, name) not in self.low_rank:
                return y
            down, up = self.low_rank[self.scale, name] = tuple(w.to(y.device) for w in self.low_rank[self.scale, name])
            # FLUX's single blocks have the attention's output in front of the MLP's hidden channels.
            return y + args[0][..., -down.shape[1] :] @ down.T @ up.T

        return hook

    def _before(self, transformer, args, kwargs):
        told = dict(self.signature.bind(*args, **kwargs).arguments)
        seen = told["hidden_states"]
        if not self.wan:
            rows, columns = (int(last) + 1 for last in told["img_ids"].reshape(-1, 3).amax(0)[1:])
            seen = unpacked(seen, rows, columns, 2)
        # A known first frame's timestep is 0, the others' is the step's.
        self.t_B = told["timestep"].float().reshape(len(seen), -1).amax(1) * (1 if self.wan else 1000)
        if len(self.used) % self.branches == 0:
            channels = transformer.config.out_channels if self.wan else None
            self._use(transformer, self.choose(float(self.t_B.max()), seen[:, :channels]), seen.device)
        self.used.append(self.scale)
        self.seen, scale = seen, self.scale
        if scale == 1:
            return None
        step = scale * self.patch[1]
        ends = [-seen.shape[-1] % step, -seen.shape[-2] % step]
        # A last patch that the latents do not fill is filled by repeating their last cells.
        whole = F.pad(seen, (0, ends[0], 0, ends[1], 0, 0), mode="replicate")
        if self.wan:
            told["hidden_states"] = whole
            if told["timestep"].ndim == 2:  # of each token
                grid = [size // base for size, base in zip(seen.shape[2:], self.patch, strict=True)]
                told["timestep"] = told["timestep"].reshape(-1, *grid)[:, :, ::scale, ::scale].flatten(1)
        else:
            told["hidden_states"] = packed(whole, step)
            places = [torch.arange(size // step) * scale + (scale - 1) / 2 for size in whole.shape[-2:]]
            y, x = torch.meshgrid(*places, indexing="ij")
            ids = torch.stack([torch.zeros_like(y), y, x], dim=-1).reshape(-1, 3)
            told["img_ids"], self.padded = ids.to(seen.device), whole.shape
        return (), told

    def _after(self, transformer, args, output):
        if self.scale == 1:
            return output
        velocity, (rows, columns) = output[0], self.seen.shape[-2:]
        if not self.wan:
            step = 2 * self.scale
            velocity = unpacked(velocity, self.padded[-2] // step, self.padded[-1] // step, step)
        frames = self.seen.float().transpose(1, 2).flatten(0, 1)
        of = self.residual[self.scale] = {key: w.to(frames.device) for key, w in self.residual[self.scale].items()}
        hidden = F.conv2d(frames, of["conv.weight"], of["conv.bias"], padding=1).unflatten(0, (len(velocity), -1))
        waves = get_timestep_embedding(
            self.t_B, of["time.weight"].shape[1], flip_sin_to_cos=True, downscale_freq_shift=0
        )
        told_B = F.linear(waves, of["time.weight"], of["time.bias"])
        by, shift = told_B[:, None, :, None, None].chunk(2, dim=2)
        hidden = F.silu(hidden * (1 + by) + shift).flatten(0, 1)
        added = F.conv2d(hidden, of["out.weight"], of["out.bias"]).unflatten(0, (len(velocity), -1)).transpose(1, 2)
        velocity = (velocity[..., :rows, :columns] + added).to(velocity.dtype)
        velocity = velocity if self.wan else packed(velocity, 2)
        if isinstance(output, tuple):
            return (velocity,)
        return type(output)(sample=velocity)

    def _use(self, transformer, scale: int, device) -> None:
        if scale == self.scale:
            return
        self.scale = scale
        for name, layer in self.layers[scale].items():
            # The transformer may have moved without the layers that it did not use. Empty ones are filled as they run.
            empty = any(weight.is_meta for weight in layer.parameters())
            setattr(transformer, name, layer if empty else layer.to(device))
        if self.wan:
            transformer.register_to_config(patch_size=(self.patch[0], scale * self.patch[1], scale * self.patch[2]))


def packed(x_BCTYX, step: int):
    """Latents of one frame as FLUX has them, a row a patch [B, N, C·step·step]."""
    return F.pixel_unshuffle(x_BCTYX[:, :, 0], step).flatten(2).transpose(1, 2)


def unpacked(x_BNP, rows: int, columns: int, step: int):
    """The counterpart of `packed`."""
    return F.pixel_shuffle(x_BNP.transpose(1, 2).unflatten(2, (rows, columns)), step)[:, :, None]
