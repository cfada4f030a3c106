"""What is not said is as in the papers: the numbers that methods, pruning and calibration take by themselves."""

from fractions import Fraction

from dit_jax.methods import head_statistics, pruning
from dit_jax.methods.coherence import Lattice
from dit_jax.methods.coredit import Coredit
from dit_jax.methods.coredit_ratios import CAP, STEPS_TO_ALL
from dit_jax.methods.ddit import Ddit
from dit_jax.methods.patch_adapters import AdapterSettings
from dit_jax.methods.routing import RouterConfig, Routing


def test_pare_protects_temporal_heads_and_leaves_out_neurons_that_are_alike():
    assert (pruning.SPATIAL, pruning.TEMPORAL, pruning.PROTECTION) == (0.7, 0.3, 1.5)
    assert (Fraction(8, 40), 0.9, 0.02) == (pruning.FLOOR, pruning.SIMILAR, pruning.RELAXED)
    assert head_statistics.QUERIES == 256


def test_pares_router_runs_20_to_35_of_40_blocks():
    router = RouterConfig(content="none", features=0, blocks=40)
    assert (router.hidden, Routing().limits(40)) == (256, (20, 35))


def test_coredit_protects_one_token_in_three_and_skips_a_quarter_in_the_last_quarter():
    coredit, lattice = Coredit(), Lattice(grid=(1, 64, 64), cells=(16, 9))
    assert (coredit.late, coredit.late_share, coredit.stride, coredit.sub_cell) == (0.25, 0.25, 3, 3)
    assert (lattice.stride, lattice.sub_cell, lattice.least_weight) == (3, 3, 1e-3)
    assert (CAP, 4096 // STEPS_TO_ALL) == (0.6, 64)


def test_ddit_takes_the_third_difference_and_maps_of_rank_32():
    ddit, adapters = Ddit(), AdapterSettings()
    assert (ddit.order, ddit.threshold, ddit.quantile, ddit.sizes) == (3, 0.001, 0.4, (2, 4))
    assert (adapters.scales, adapters.rank) == ((2, 4), 32)
