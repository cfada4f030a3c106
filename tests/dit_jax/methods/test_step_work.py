"""What each method leaves of a step's work, against its schedule: what `dit_jax/flops.py` makes costs of."""

from types import SimpleNamespace

import numpy as np
import pytest
from small_models import CONFIGS

from dit_jax.flops import BlockWork, Shape, StepAt, dense_work
from dit_jax.methods.coredit import Coredit
from dit_jax.methods.ddit import Ddit, Span
from dit_jax.methods.hsa import Hsa
from dit_jax.methods.magcache import MagCache
from dit_jax.methods.method import RunRecord
from dit_jax.methods.routing import Routing
from dit_jax.methods.taylorseer import TaylorSeer
from dit_jax.methods.teacache import TeaCache

DENSE = dense_work(CONFIGS["wan"], Shape(tokens=40, text=7))  # of three blocks
BLOCK = BlockWork(40, 40, 40)


def left(method, step, steps=12, first=0, work=DENSE, **told):
    return method.step_work(work, StepAt(step, steps, first, told.pop("measured", {}), **told))


def test_the_plain_model_works_on_all_tokens_in_all_blocks():
    assert DENSE == (40, 1, (BLOCK,) * 3)


def test_routing_runs_the_budgets_share_of_every_block():
    for t, blocks in ((0.0, 2), (400.0, 2), (600.0, 3), (1000.0, 3)):
        work = left(Routing(least=2, most=3), 0, t=t)
        assert work == DENSE._replace(blocks=(BLOCK._replace(share=pytest.approx(blocks / 3)),) * 3)
    half = DENSE.in_blocks(lambda block: block._replace(share=0.5))
    assert left(Routing(least=2, most=2), 0, work=half).blocks[0].share == pytest.approx(1 / 3)


def test_coredit_projects_and_attends_what_it_keeps_and_a_quarter_less_late():
    coredit = Coredit(ratios=(0.4, 0.0, 0.2), experts=(("transformer_2", (0.5,)),))
    for step, kept in ((8, (24, 40, 32)), (9, (36, 40, 38)), (11, (36, 40, 38))):
        expected = [BLOCK._replace(projected=pytest.approx(count), keys=pytest.approx(count)) for count in kept]
        assert left(coredit, step) == DENSE._replace(blocks=tuple(expected))
    other = left(coredit, 0, component="transformer_2").blocks
    assert {(block.tokens, block.projected, block.keys, block.share) for block in other} == {(40, 20, 20, 1)}


def test_hsa_works_on_what_is_due_and_attends_all_and_on_all_at_the_first_step_of_a_stage():
    hsa = Hsa(shares=(0.25, 0.75), budgets=(12, 3), window=0.5)
    due = DENSE._replace(tokens=10, blocks=(BlockWork(10, 10, 40),) * 3)
    assert [left(hsa, step) for step in (0, 2, 3, 4, 5, 8, 9)] == [DENSE, DENSE, due, DENSE, due, DENSE, DENSE]
    assert left(hsa, 5, first=5) == DENSE and left(hsa, 6, first=5) == due


@pytest.mark.parametrize("by_latents", [True, False])
def test_ddit_works_on_fewer_tokens_of_more_cells(by_latents):
    ddit = Ddit() if by_latents else Ddit(spans=(Span(2, 1, 2), Span(4, 3, 3)))
    scales = [1, 2, 2, 4]
    shares = ddit.measured(RunRecord(steps=4, states=[], variants=scales if by_latents else []))
    assert shares == [1, 1 / 4, 1 / 4, 1 / 16]
    for step, scale in enumerate(scales):
        work = left(ddit, step, 4, measured={"ddit": shares[step]})
        tokens = 40 / scale**2
        assert work == DENSE._replace(tokens=tokens, cells=scale**2, blocks=(BlockWork(tokens, tokens, tokens),) * 3)
    unmeasured = left(ddit, 1, 4)
    assert unmeasured == (DENSE if by_latents else left(ddit, 2, 4))


def test_caches_run_no_block_in_the_steps_that_reuse():
    ratios = (1.0, 0.7, 0.99, 1.01, 0.98, 0.97, 0.99, 1.02, 1.01, 0.9, 0.95, 0.6)
    magcache, taylorseer, teacache = (
        MagCache(threshold=0.12, ratios=ratios),
        TaylorSeer(interval=4),
        TeaCache(threshold=1),
    )
    for first in (0, 6):
        steps = range(first, 12)
        runs = [left(magcache, step, first=first).blocks[0].share for step in steps]
        np.testing.assert_array_equal(runs, ~magcache.reuses(first)[first:])
        runs = [left(taylorseer, step, first=first).blocks[0].share for step in steps]
        np.testing.assert_array_equal(runs, taylorseer.timeline(12, first).full[first:])
    of_runs = [SimpleNamespace(cache=SimpleNamespace(residual=SimpleNamespace(runs=count))) for count in (4, 2)]
    shares = teacache.measured(RunRecord(steps=12, states=of_runs, variants=[]))
    assert shares == [0.5] * 12
    assert left(teacache, 3) == DENSE
    half = DENSE.in_blocks(lambda block: block._replace(share=0.5))
    assert left(teacache, 3, work=half, measured={"teacache": 0.5}).blocks == (BLOCK._replace(share=0.25),) * 3
