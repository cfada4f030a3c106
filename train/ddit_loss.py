"""The loss of DDiT's adapters: a larger patch size is to predict the velocity of the base one (arXiv 2602.16968)."""

from __future__ import annotations

import jax

from dit_jax.methods.patch_adapters import adapted, size_name
from dit_jax.sampling.schedules import TRAIN_STEPS
from train.losses import Batch, FlowSettings, Metrics, Models, mean_square, noised, predicted, with_extra


def ddit(
    trained: Models, frozen: Models, batch: Batch, key: jax.Array, *, scale: int, settings: FlowSettings
) -> tuple[jax.Array, Metrics]:
    """L = |v(z, t; p_new) − v_base(z, t; p)|², the mean over elements.

    trained["adapters"] are `Adapters`, of which that of `scale` (2 for 2p; static, a program each) is used;
    frozen["teacher"] is the base model, whose blocks the larger size shares.
    """
    base, adapter = jax.lax.stop_gradient(frozen["teacher"]), trained["adapters"][size_name(scale)]
    at = noised(batch["latents"], key, settings)
    target, _ = jax.lax.stop_gradient(predicted(base, at, batch, settings.call))
    found, _ = predicted(adapted(base, adapter, scale), at, batch, settings.call)
    found = found + adapter.residual(with_extra(at.latents, batch), at.levels * TRAIN_STEPS)
    loss = mean_square(found - target, at.held)
    return loss, {"loss_teacher": loss}
