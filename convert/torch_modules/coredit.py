"""CoReDiT in PyTorch (arXiv 2605.14191): tokens that are like their neighbours leave self-attention, for diffusers' Wan
and FLUX.

    pipe.scheduler.set_timesteps(20)
    ratios = json.loads(Path("model/methods/coredit/config.json").read_text())
    add_coredit(pipe.transformer, ratios, pipe.scheduler.timesteps)
    frames = pipe("a red 7 moving left", num_inference_steps=20).frames

FluxPipeline has σ of its own, and a shift by the number of tokens (calculate_shift: diffusers.pipelines.flux):

    mu = calculate_shift((height // 16) * (width // 16))
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 20, 20), mu=mu)

Shapes: B samples, N tokens, M kept tokens, D width, G blocks.
"""

import functools
import inspect
import itertools
import math

import torch
from torch.nn import functional as F

CELLS, CELLS_SIDE = (16, 9), 64  # sides of the cells of coherence in even and odd blocks, on a lattice of this side
SUB_CELL = 3  # side of the cells that skipped tokens are rebuilt in
LEAST_WEIGHT = 1e-3  # of a kept token in a rebuilt one


def bucketed(ratios: list[float], buckets: int) -> list[float]:
    """At most so many different ratios: the widest group is cut at its largest gap; each becomes its group's mean."""
    groups = [sorted(ratios)]
    while len(groups) < buckets and (widest := max(groups, key=lambda group: group[-1] - group[0]))[0] < widest[-1]:
        gaps = [right - left for left, right in itertools.pairwise(widest)]
        cut = gaps.index(max(gaps)) + 1
        groups.remove(widest)
        groups += [widest[:cut], widest[cut:]]
    means = {
        ratio: group[0] if group[0] == group[-1] else sum(group) / len(group) for group in groups for ratio in group
    }
    return [means[ratio] for ratio in ratios]


def cells_of(grid, side: int):
    """Which cell of `side` tokens each token is in [N], frame by frame, and how many cells there are."""
    frames, rows, columns = grid
    across, down = -(-columns // side), -(-rows // side)
    frame = torch.arange(rows)[:, None] // side * across + torch.arange(columns) // side
    return (torch.arange(frames)[:, None] * across * down + frame.reshape(-1)).reshape(-1), frames * across * down


def cell_sides(grid) -> tuple[int, int]:
    """Sides of the cells of coherence in even and in odd blocks of this lattice."""
    scale = math.sqrt(grid[1] * grid[2]) / CELLS_SIDE
    small = max(round(min(CELLS) * scale), 2)
    return max(round(max(CELLS) * scale), small + 1), small


def coherence(x_BND, cells_N, count: int):
    """SC_i = <x_i/|x_i|, mean of x/|x| over i's cell> [B, N]."""
    directions = F.normalize(x_BND.float(), dim=-1, eps=1e-15)
    return (directions * _means(directions, torch.ones_like(directions[..., 0]), cells_N, count)).sum(-1)


def _means(y_BND, weights_BN, cells_N, count: int):
    """The weighted mean over each token's cell [B, N, D]."""
    total = y_BND.new_zeros(len(y_BND), count, y_BND.shape[-1]).index_add_(1, cells_N, y_BND * weights_BN[..., None])
    weight = y_BND.new_zeros(len(y_BND), count).index_add_(1, cells_N, weights_BN)
    return (total / weight[..., None])[:, cells_N]


@functools.lru_cache(maxsize=64)  # slow, and the same in every step
@torch.inference_mode(False)  # kept for calls with gradients too
def protected(grid, stride: int, phase: int):
    """Tokens that a block of this index, or of one more by a stride, never skips [N]: one of a stride, and the first of
    a sub-cell without any."""
    frames, rows, columns = grid
    keep = (torch.arange(rows)[:, None] + torch.arange(columns) - phase) % stride == 0
    keep, (cells, count) = keep.reshape(-1), cells_of((1, rows, columns), SUB_CELL)
    for cell in range(count):
        inside = torch.nonzero(cells == cell)[:, 0]
        keep[inside[0]] |= not keep[inside].any()
    return keep.repeat(frames)


class CoherentAttention:
    """The attention processor of a block: diffusers' own on the tokens that stay, and a mean for each of the others."""

    def __init__(self, dense, block: int, state: "add_coredit"):
        self.dense, self.block, self.state = dense, block, state

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rope=None):
        # FLUX's single blocks have the text in front of the tokens, its double blocks beside them.
        text = self.state.text if encoder_hidden_states is None else 0
        tokens = hidden_states[:, text:]
        skip = self.state.skipped(self.block)
        if skip == 0:
            return self.dense(attn, hidden_states, encoder_hidden_states, attention_mask, rope)
        grid, device = self.state.grid, tokens.device
        cells, count = cells_of(grid, cell_sides(grid)[self.block % 2])
        likeness = coherence(tokens, cells.to(device), count)
        never = protected(grid, self.state.stride, self.block % self.state.stride).to(device)
        order = torch.argsort(torch.where(never, math.inf, -likeness), dim=1, stable=True)
        stay = torch.ones_like(likeness, dtype=torch.bool).scatter_(1, order[:, :skip], False)
        # Each sample keeps tokens of its own, at places of their own.
        rows = [
            self._attended(attn, x, keep, encoder_hidden_states, rope, i)
            for i, (x, keep) in enumerate(zip(hidden_states, stay, strict=True))
        ]
        kept = torch.cat([row[0] for row in rows])
        outputs = kept.new_zeros(*tokens.shape[:2], kept.shape[-1])
        outputs[stay] = kept[:, text:].flatten(0, 1)
        sub_cells, count = cells_of(grid, SUB_CELL)
        weights = torch.where(stay, likeness.clamp(min=LEAST_WEIGHT), 0.0).to(outputs.dtype)
        rebuilt = _means(outputs, weights, sub_cells.to(device), count)
        y = torch.cat([kept[:, :text], torch.where(stay[..., None], outputs, rebuilt)], dim=1)
        return y if encoder_hidden_states is None else (y, torch.cat([row[1] for row in rows]))

    def _attended(self, attn, x_ND, stay_N, context, rope, row: int):
        """(outputs of a sample's text and kept tokens [1, M, D], and of the text beside them)."""
        beside = None if context is None else context[row : row + 1]
        text = x_ND.shape[0] - len(stay_N)
        places = torch.cat([torch.ones(text, dtype=torch.bool, device=stay_N.device), stay_N])
        if rope[0].ndim == 4:  # Wan: [1, N, 1, K]
            rope = tuple(table[:, places] for table in rope)
        else:  # FLUX: [text and tokens, K]
            missing = torch.ones(len(rope[0]) - len(places), dtype=torch.bool, device=places.device)
            rope = tuple(table[torch.cat([missing, places])] for table in rope)
        found = self.dense(attn, x_ND[None, places], beside, None, rope)
        return found if isinstance(found, tuple) else (found, None)


class add_coredit:  # noqa: N801 - used as a function
    """From now on the transformer's self-attention skips tokens.

    ratios      contents of `methods/coredit/config.json`, or {"ratios": [one for all blocks]}
    timesteps   of the whole run, from 1000 to 0, as the pipeline will have them: in the last `late_share` of its steps
                ratios are multiplied by `late`
    component   "transformer_2" for Wan 2.2's low-noise expert
    buckets     how many different ratios blocks may have
    """

    def __init__(
        self, transformer, ratios: dict, timesteps, component="transformer", late=0.25, late_share=0.25, buckets=4
    ):
        wan = hasattr(transformer, "blocks")
        blocks = (
            [*transformer.blocks] if wan else [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        )
        every = {"transformer": ratios["ratios"], **ratios.get("experts", {})}
        every = {name: list(of) * (len(blocks) if len(of) == 1 else 1) for name, of in every.items()}
        rounded = bucketed([ratio for of in every.values() for ratio in of], buckets)
        first = len(blocks) * list(every).index(component if component in every else "transformer")
        self.ratios, self.stride, self.late = rounded[first : first + len(blocks)], ratios.get("stride", 3), late
        early = len(timesteps) - int(late_share * len(timesteps))
        ends = [math.inf, *map(float, timesteps), -math.inf]
        self.late_below = (ends[early] + ends[early + 1]) / 2
        self.wan, self.signature = wan, inspect.signature(transformer.forward)
        transformer.register_forward_pre_hook(self._look, with_kwargs=True)
        for index, block in enumerate(blocks):
            attention = block.attn1 if wan else block.attn
            attention.set_processor(CoherentAttention(attention.processor, index, self))

    def _look(self, transformer, args, kwargs) -> None:
        """The lattice of tokens, and whether the step is a late one."""
        told = self.signature.bind(*args, **kwargs).arguments
        t = float(told["timestep"].max())
        if self.wan:
            self.text, sizes = 0, told["hidden_states"].shape[2:]
            self.grid = tuple(size // step for size, step in zip(sizes, transformer.config.patch_size, strict=True))
        else:
            self.text, t = told["encoder_hidden_states"].shape[1], 1000 * t
            self.grid = (1, *(int(last) + 1 for last in told["img_ids"].reshape(-1, 3).amax(0)[1:]))
        self.is_late = t < self.late_below

    def skipped(self, block: int) -> int:
        """Tokens that the block skips; so much of a small lattice may be protected that less is left than is asked."""
        tokens = math.prod(self.grid)
        wanted = round(self.ratios[block] * (self.late if self.is_late else 1) * tokens)
        free = [tokens - int(protected(self.grid, self.stride, phase).sum()) for phase in range(self.stride)]
        return min(wanted, *free)
