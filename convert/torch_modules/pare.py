"""PARE in PyTorch (arXiv 2605.27336): pruned students in diffusers' classes, and a router that leaves blocks out.

    transformer = load_transformer("student/transformer")
    pipe = WanPipeline.from_pretrained("student", transformer=transformer)
    route(transformer, load_router("student/methods/router"))
    frames = pipe("a red 7 moving left").frames

Shapes: B samples, G blocks, E content features.
"""

import inspect
import json
import math
from pathlib import Path

import diffusers
import torch
from safetensors.torch import load_file
from torch import nn

LEAST, MOST = 0.5, 0.875  # of the blocks, at t = 0 and at pure noise


class NormCountingPruned(nn.RMSNorm):
    """Normalises the kept channels as if the pruned ones were there with zeros."""

    def __init__(self, kept: int, full: int, eps: float):
        super().__init__(kept, eps=eps)
        self.present = kept / full

    def forward(self, x):
        mean = x.float().square().mean(-1, keepdim=True) * self.present
        return (x.float() * torch.rsqrt(mean + self.eps) * self.weight.float()).type_as(x)


def load_transformer(folder, dtype=torch.float32):
    """diffusers' transformer from a folder whose config.json may say that heads and neurons were pruned."""
    folder = Path(folder)
    settings = json.loads((folder / "config.json").read_text())
    pruned = settings.pop("pruned", {})
    kind = getattr(diffusers, settings["_class_name"])
    with torch.device("meta"):
        model = kind.from_config(settings)
        for block in _blocks(model):
            _narrow(block, model.config, pruned)
    exact = kind._keep_in_fp32_modules or []
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        for key, tensor in load_file(file).items():
            tensors[key] = tensor.to(torch.float32 if any(name in key.split(".") for name in exact) else dtype)
    model.load_state_dict(tensors, assign=True)
    if hasattr(model, "rope"):  # its tables are no weights
        model.rope = type(model.rope)(
            model.config.attention_head_dim, model.config.patch_size, model.config.rope_max_seq_len
        )
    model.register_to_config(pruned=pruned)
    return model.eval()


def _blocks(model):
    """All blocks, in the order in which they run."""
    return (
        [*model.blocks] if hasattr(model, "blocks") else [*model.transformer_blocks, *model.single_transformer_blocks]
    )


def _narrow(block, config, pruned) -> None:
    """The block with fewer heads and neurons, where its model has fewer."""
    width, head = config.num_attention_heads * config.attention_head_dim, config.attention_head_dim
    heads = pruned.get("heads", config.num_attention_heads)
    if hasattr(block, "attn1"):  # Wan; its MLPs have the width in `ffn_dim`
        for name in ("attn1", "attn2"):
            old = getattr(block, name)
            new = type(old)(
                width,
                heads,
                head,
                old.norm_q.eps,
                0.0,
                old.added_kv_proj_dim,
                old.cross_attention_dim_head,
                old.processor,
            )
            for norm in ("norm_q", "norm_k", "norm_added_k"):
                if pruned.get("norm_counts_pruned") and hasattr(new, norm):
                    setattr(new, norm, NormCountingPruned(heads * head, width, old.norm_q.eps))
            setattr(block, name, new)
        return
    old, neurons = block.attn, pruned.get("mlp_width", 4 * width)
    block.attn = type(old)(
        width, heads, head, bias=True, added_kv_proj_dim=old.added_kv_proj_dim, eps=old.norm_q.eps,
        context_pre_only=old.context_pre_only, pre_only=old.pre_only, processor=old.processor,
    )  # fmt: skip
    if hasattr(block, "proj_mlp"):
        block.mlp_hidden_dim = neurons
        block.proj_mlp = nn.Linear(width, neurons)
        block.proj_out = nn.Linear(heads * head + neurons, width)
    else:
        for name in ("ff", "ff_context"):
            setattr(block, name, type(block.ff)(width, inner_dim=neurons, activation_fn="gelu-approximate"))


class Router(nn.Module):
    """r = W3·silu(W2·silu(W1·[sinusoidal(t); content] + b1) + b2) + b3: one logit a block.

    content  what it is told besides the timestep: statistics of the noisy "latents", the "pooled" text, the class
             feature of the "image", or "none"
    least, most  blocks that run at t = 0 and at t = 1000, as it was trained; None: 50 and 87.5 % of all
    """

    def __init__(
        self, content: str, features: int, blocks: int, hidden: int = 256, time_frequencies: int = 256,
        least: int | None = None, most: int | None = None,
    ):  # fmt: skip
        super().__init__()
        self.content, self.blocks, self.time_frequencies = content, blocks, time_frequencies
        self.least = max(round(LEAST * blocks), 2) if least is None else least
        self.most = max(round(MOST * blocks), 2) if most is None else most
        self.up = nn.Linear(time_frequencies + features, hidden)
        self.middle = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, blocks)

    def forward(self, t_B, content_BE):
        half = self.time_frequencies // 2
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float64) / half)
        angles = t_B.float()[:, None] * frequencies.float().to(t_B.device)
        told = torch.cat([angles.cos(), angles.sin(), content_BE.float()], dim=-1)
        silu = nn.functional.silu
        return self.out(silu(self.middle(silu(self.up(told)))))


def load_router(folder) -> Router:
    """The router in `methods/router`, or `methods/router/transformer_2` of a second expert."""
    router = Router(**json.loads((Path(folder) / "config.json").read_text()))
    router.load_state_dict(load_file(Path(folder) / "weights.safetensors"))
    return router.eval()


class route:  # noqa: N801 - used as a function
    """From now on a call of the transformer runs K(t) = least + (most - least)·t/1000 of its blocks for each sample.

    The first and the last block always run, and count. A block that no sample of the batch chose does not run at all.
    Where gradients are checkpointed, blocks run again as the last call chose: go backward before the next one.

    branches  calls of the transformer a step, which share their blocks: 2 where FLUX is called for a negative prompt
              too, the prompt first (Wan's calls choose alike by themselves)
    gates     which blocks ran for each sample in the last call [B, G]
    """

    def __init__(
        self, transformer, router: Router, least: int | None = None, most: int | None = None, branches: int = 1
    ):
        blocks = _blocks(transformer)
        self.router, self.branches, self.calls = router, branches, 0
        self.least = router.least if least is None else least
        self.most = router.most if most is None else most
        self.signature = inspect.signature(transformer.forward)
        transformer.register_forward_pre_hook(self._choose, with_kwargs=True)
        for index, block in enumerate(blocks):
            block.forward = self._gated(block.forward, index, joint=not hasattr(transformer, "blocks"))

    @torch.no_grad()
    def _choose(self, transformer, args, kwargs):
        self.calls += 1
        if (self.calls - 1) % self.branches:
            return
        told = self.signature.bind(*args, **kwargs).arguments
        x, t = told["hidden_states"], told["timestep"]
        t_B = t.float().reshape(len(t), -1).amax(1).expand(len(x))  # frames that are known have timestep 0
        if x.ndim == 3:  # FLUX's packed latents, and its timesteps from 0 to 1
            x, t_B = x.unflatten(-1, (-1, 1, 1, 4)).permute(0, 2, 3, 1, 4, 5).flatten(3, 4), t_B * 1000
        else:
            x = x[:, : transformer.config.out_channels]  # behind them lie the frames that are given
        logits = self.router.to(x.device)(t_B, self._content(x.float(), told))
        logits[:, [0, -1]] = math.inf
        count = torch.round(self.least + (self.most - self.least) * t_B / 1000)
        rank = torch.argsort(torch.argsort(-logits, dim=1, stable=True), dim=1)
        self.gates = (rank < count[:, None]).cpu()

    def _content(self, x_BCTYX, told):
        kind, batch = self.router.content, len(x_BCTYX)
        if kind == "pooled":
            return told["pooled_projections"]
        if kind == "image":
            states = told["encoder_hidden_states_image"]
            return states[:: len(states) // batch, 0]
        if kind == "none":
            return x_BCTYX.new_zeros(batch, 0)
        space = (2, 3, 4)
        change = x_BCTYX.diff(dim=2).abs().mean((1, *space)) if x_BCTYX.shape[2] > 1 else x_BCTYX.new_zeros(batch)
        return torch.cat([x_BCTYX.mean(space), x_BCTYX.std(space, correction=0), change[:, None]], dim=1)

    def _gated(self, run, index: int, joint: bool):
        """The block with a gate; where it is `joint`, as FLUX's are, it changes the text too."""

        def forward(hidden_states, encoder_hidden_states, *args, **kwargs):
            gate = self.gates[:, index].to(hidden_states.device)
            before = (encoder_hidden_states, hidden_states)
            if not self.gates[:, index].any():
                return before if joint else hidden_states
            after = run(hidden_states, encoder_hidden_states, *args, **kwargs)
            if not joint:
                return torch.where(gate[:, None, None], after, hidden_states)
            return tuple(torch.where(gate[:, None, None], new, old) for new, old in zip(after, before, strict=True))

        return forward
