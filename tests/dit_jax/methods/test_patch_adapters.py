"""Adapters of larger patches before they are trained: they add nothing, and what they begin with can learn."""

import numpy as np
import pytest
from small_models import CONFIGS, random_model

from dit_jax.methods.patch_adapters import AdapterSettings, initial_adapters
from dit_jax.parameters import named_leaves


@pytest.mark.parametrize("backbone", CONFIGS)
def test_of_two_maps_the_first_begins_at_random_and_the_last_at_zero(backbone):
    """Both at zero would never learn; a last one at random would change the velocity."""
    config = CONFIGS[backbone]
    settings = AdapterSettings(rank=3, residual_channels=5)
    leaves = dict(named_leaves(initial_adapters(config, dict(named_leaves(random_model(config))), 4, settings)))
    last = ("patch.size", "residual.out.kernel", "residual.out.bias", ".up.up", ".down.up")
    maps = {"wan": 1, "flux": 3}[backbone]
    assert sum(name.endswith(last) for name in leaves) == 2 * (3 + 2 * maps)
    assert all(not np.any(leaf) for name, leaf in leaves.items() if name.endswith(last))
    first = {name: np.asarray(leaf) for name, leaf in leaves.items() if name.endswith((".up.down", ".down.down"))}
    first |= {name: np.asarray(leaves[name])[None] for name in ("2p.residual.conv", "4p.residual.conv")}
    assert len(first) == 2 * (2 * maps + 1)
    for kernel in first.values():
        inputs = np.prod(kernel.shape[1:-1])
        np.testing.assert_allclose(kernel.std() * inputs**0.5, 1, rtol=0.2)
    assert len({kernel.flat[0] for kernel in first.values()}) == len(first)
