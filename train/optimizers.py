"""How gradients become updates: optimisers and their schedules."""

from __future__ import annotations

from collections.abc import Mapping

import optax

from train.step import Params

ADAM_BETAS = (0.9, 0.99)
MUON_STEPS = 5


def schedule(peak: float, steps: int, warmup: int, decay: int) -> optax.Schedule:
    """Linear warm-up, a plateau at `peak`, then a linear decay to a fiftieth over the last `decay` of `steps` steps."""
    plateau = max(0, steps - warmup - decay)
    parts = [
        optax.linear_schedule(peak / max(1, warmup), peak, warmup),
        optax.constant_schedule(peak),
        optax.linear_schedule(peak, peak / 50, decay),
    ]
    return optax.join_schedules(parts, [warmup, warmup + plateau])


def muon(learning_rate: optax.ScalarOrSchedule, adam_learning_rate: optax.ScalarOrSchedule, clip: float = 1.0):
    """Muon (Jordan et al., 2024) for the matrices inside the blocks, Adam for all else, after clipping by global norm.

    With the update scale of Liu et al. (arXiv 2502.16982, section 2.2): both take learning rates of Adam's size.
    """
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.contrib.muon(
            learning_rate,
            ns_steps=MUON_STEPS,
            adam_b1=ADAM_BETAS[0],
            adam_b2=ADAM_BETAS[1],
            adam_learning_rate=adam_learning_rate,
            muon_weight_dimension_numbers=matrix_axes,
            consistent_rms=0.2,
        ),
    )


def adam(learning_rate: optax.ScalarOrSchedule, clip: float = 1.0):
    """Adam after clipping to a global norm."""
    return optax.chain(optax.clip_by_global_norm(clip), optax.adam(learning_rate, *ADAM_BETAS))


def cosine(peak: float, steps: int, warmup: int) -> optax.Schedule:
    """Linear warm-up to `peak` (0: it begins there), then half a cosine down to 0 at the last step."""
    warmup = min(warmup, steps // 2)
    if not warmup:
        return optax.cosine_decay_schedule(peak, steps)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps)


def constant(peak: float, warmup: int) -> optax.Schedule:
    """Linear warm-up to `peak` (0: it begins there), which stays."""
    return optax.warmup_constant_schedule(0.0, peak, warmup) if warmup else optax.constant_schedule(peak)


def clipped(norm: float) -> optax.GradientTransformation:
    """Clips gradients to a global norm; 0 leaves them as they are."""
    return optax.clip_by_global_norm(norm) if norm else optax.identity()


def adamw(
    rate: optax.ScalarOrSchedule,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    clip: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) behind `clipped`."""
    return optax.chain(clipped(clip), optax.adamw(rate, *betas, weight_decay=weight_decay))


def prodigy(rate: optax.Schedule, *, weight_decay: float = 0.0, clip: float = 1.0) -> optax.GradientTransformation:
    """Prodigy (Mishchenko and Defazio, arXiv 2306.06101) behind `clipped`; a `rate` with a peak of about 1 multiplies
    what it finds itself, for which the warm-up does not count."""
    return optax.chain(clipped(clip), optax.contrib.prodigy(rate, weight_decay=weight_decay, safeguard_warmup=True))


def by_module(optimizers: Mapping[str, optax.GradientTransformation]) -> optax.GradientTransformation:
    """An optimiser for each module, by the name that its weights' paths begin with."""

    def labels(params: Params) -> dict[str, str]:
        return {name: name.partition(".")[0] for name in params}

    return optax.partition(dict(optimizers), labels)


def matrix_axes(params: Params):
    """Which axes of a leaf are a matrix's inputs and outputs, for Muon; None for what is no matrix inside a block.

    Stacked kernels [G, in, out], to heads [G, D, H, K] and from heads [G, H, K, D];
    convolutions [y, x, in, out] or [t, y, x, in, out].
    """
    numbers = optax.contrib.MuonDimensionNumbers

    def axes(name: str, leaf):
        # optax also calls this with masked leaves, which have no axes.
        if not name.endswith("kernel") or getattr(leaf, "ndim", 0) < 3:
            return None
        if "conv" in name or "shortcut" in name:
            return numbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1)
        if leaf.ndim == 4:
            return numbers((1, 2), 3) if name.endswith("o.kernel") else numbers(1, (2, 3))
        return numbers(1, 2)

    return {name: axes(name, leaf) for name, leaf in params.items()}
