"""What previews are made of: the clean latents that a run seems to come to."""

from types import SimpleNamespace

import numpy as np

from dit_jax.sampling.solvers import UniPCState
from infer.engine_batch import Seen, _clean


def test_latents_on_a_straight_line_show_its_end():
    rng = np.random.default_rng(0)
    clean, noise = rng.standard_normal((2, 3, 2, 4, 6, 5)).astype(np.float32)
    before, after = ((1 - sigma) * clean + sigma * noise for sigma in (0.9, 0.4))
    run = SimpleNamespace(sigma=0.4, carry=SimpleNamespace(solver=(), latents=after))
    np.testing.assert_allclose(_clean(run, Seen(before, 0.9)), clean, atol=1e-5)


def test_unipc_shows_its_own_prediction():
    clean = np.ones((1, 1, 2, 2, 3), np.float32)
    state = UniPCState(sample=0 * clean, clean=clean, clean_before=2 * clean)
    run = SimpleNamespace(sigma=0.4, carry=SimpleNamespace(solver=state, latents=3 * clean))
    np.testing.assert_array_equal(_clean(run, Seen(4 * clean, 0.9)), clean)
