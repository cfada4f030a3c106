"""CoReDiT against the plain sampler, its masked form and a slow transcription of its equations."""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import CONFIGS, guided, noise, random_model, relative_error

from dit_jax.config import UserError
from dit_jax.methods import coredit as coredit_file
from dit_jax.methods.coherence import Lattice, cell_sizes, coherence, protected, sub_cells
from dit_jax.methods.coredit import Buckets, Coherent, Coredit, MaskedCoherent
from dit_jax.methods.coredit_ratios import Recording, allocate, bucketed, ramped, ramped_alike, ratios_file
from dit_jax.methods.method import Part, Run
from dit_jax.methods.plan import Plan, parse_plan
from dit_jax.models.network import Dense, NetworkCall, Place
from dit_jax.ops.rope import rope_table
from dit_jax.sampling.solvers import Step

RAGGED = Lattice(grid=(2, 7, 10), cells=(4, 3))
SKIPPED = 70  # half of its tokens
STEPS = 8
BLOCKS = dict(zip(CONFIGS.values(), (3, 5), strict=True))
MIXED = (0.5, 0.0, 0.3)


def applied(coredit: Coredit, denoiser, latents):
    run = Run(latents_shape=latents.shape, first=0, stop=STEPS, steps=STEPS, sigmas=None)
    return coredit.applied(denoiser, run)


def mixed(config) -> Coredit:
    """Blocks of three ratios, and none in the last steps."""
    return Coredit(ratios=tuple(np.resize(MIXED, BLOCKS[config]).tolist()), late=0)


@jax.jit
def velocity(denoiser, latents, index):
    step = Step(index, jnp.float32(0.7), jnp.float32(0.6), jnp.float32(700))
    return denoiser(latents, denoiser.init(latents), step)[0]


@pytest.mark.parametrize("backbone", CONFIGS)
def test_ratio_0_is_the_plain_model(backbone):
    config = CONFIGS[backbone]
    plain, latents = guided(config), noise(config)
    expected = velocity(plain, latents, 0)
    zero = applied(Coredit(ratios=(0.0,)), plain, latents)
    assert zero.call.attention.skipped == (0,)
    np.testing.assert_array_equal(velocity(zero, latents, 0), expected)
    several = applied(mixed(config), plain, latents)
    assert len(several.call.attention.skipped) == 3
    np.testing.assert_array_equal(velocity(several, latents, STEPS - 1), expected)


@pytest.mark.parametrize("backbone", CONFIGS)
def test_gathered_equals_masked_and_nothing_compiles_again(backbone):
    config = CONFIGS[backbone]
    plain, latents = guided(config), noise(config)
    gathered = applied(mixed(config), plain, latents)
    found = velocity(gathered, latents, 0)
    lattice = gathered.call.attention.lattice
    skipped = mixed(config).skipped(lattice, BLOCKS[config], STEPS)[0]
    masked = replace(
        plain, call=NetworkCall(attention=MaskedCoherent(lattice)), steering=(Buckets(jnp.array(skipped)),)
    )
    assert relative_error(found, velocity(masked, latents, 0)) < 1e-5
    assert relative_error(found, velocity(gathered, latents, STEPS - 1)) > 1e-3
    programs = velocity._cache_size()
    other = applied(mixed(config), guided(config, seed=5), latents)
    assert relative_error(velocity(other, noise(config, seed=9), 3), found) > 0.1
    assert velocity._cache_size() == programs


def attention_of(lattice: Lattice, rows: int, padding: int = 0, seed: int = 0):
    """A block's attention, modulated tokens like their neighbours, and their place."""
    rng = np.random.default_rng(seed)
    config = CONFIGS["wan"]
    attention = jax.tree.map(lambda leaf: leaf[0], random_model(config).blocks).attn1
    _, y, x = lattice.grid
    smooth = np.add.outer(np.sin(np.arange(y) / 2), np.cos(np.arange(x) / 3)).reshape(-1)
    features = np.tile(smooth, lattice.grid[0])[None, :, None] * rng.standard_normal((rows, 1, config.width))
    features = features + rng.standard_normal((rows, lattice.tokens, config.width))
    features = np.concatenate([features, rng.standard_normal((rows, padding, config.width))], axis=1)
    positions = np.stack(np.meshgrid(*map(np.arange, lattice.grid), indexing="ij"), -1).reshape(-1, 3)
    positions = np.broadcast_to(np.pad(positions, ((0, padding), (0, 0))), (rows, lattice.tokens + padding, 3))
    valid = (
        None if not padding else jnp.broadcast_to(np.arange(features.shape[1]) < lattice.tokens, positions.shape[:2])
    )
    place = Place(jnp.asarray(positions), rope_table(jnp.asarray(positions), config.rope_widths), valid)
    return attention, jnp.asarray(features, jnp.float32), place


@partial(jax.jit, static_argnums=0)
def attended(strategy, attention, x, place, block, aux=None):
    return strategy(attention, x, place, block, None, aux)[0].tokens


def slow_coherence(x, lattice, block) -> np.ndarray:
    """Of one sample, cell by cell."""
    cell = lattice.cells[block % 2]
    _, rows, columns = lattice.grid
    unit = (x / np.linalg.norm(x, axis=-1, keepdims=True)).reshape(*lattice.grid, -1)
    found = np.zeros(lattice.grid)
    for frame in range(len(unit)):
        for top in range(0, rows, cell):
            for left in range(0, columns, cell):
                at = (frame, slice(top, top + cell), slice(left, left + cell))
                found[at] = unit[at] @ unit[at].reshape(-1, x.shape[-1]).mean(axis=0)
    return found.reshape(-1)


def slow_protected(lattice, block) -> np.ndarray:
    _, rows, columns = lattice.grid
    found = np.zeros(lattice.grid, bool)
    for frame in found:
        for row in range(rows):
            for column in range(columns):
                frame[row, column] = (row + column - block) % lattice.stride == 0
        for top in range(0, rows, lattice.sub_cell):
            for left in range(0, columns, lattice.sub_cell):
                if not frame[top : top + lattice.sub_cell, left : left + lattice.sub_cell].any():
                    frame[top, left] = True
    return found.reshape(-1)


def slow(attention, x, place, lattice, block, skipped) -> np.ndarray:
    """One sample: attention of the kept tokens alone, then every skipped output from its sub-cell."""
    similar = slow_coherence(np.asarray(x, np.float64), lattice, block)
    protects = slow_protected(lattice, block)
    order = [token for token in np.argsort(-similar) if not protects[token]]
    stay = np.setdiff1d(np.arange(lattice.tokens), order[:skipped])
    taken = jax.tree.map(lambda of_all: of_all[None, stay], (x, place))
    y = np.zeros(x.shape)
    y[stay] = attended(Dense(), attention, *taken, block)[0]
    for token in order[:skipped]:
        frame, row, column = np.unravel_index(token, lattice.grid)
        top, left = (place - place % lattice.sub_cell for place in (row, column))
        weights = {
            other: max(similar[other], lattice.least_weight)
            for other in range(lattice.tokens)
            for f, r, c in [np.unravel_index(other, lattice.grid)]
            if f == frame and r // lattice.sub_cell * lattice.sub_cell == top
            and c // lattice.sub_cell * lattice.sub_cell == left and other in stay
        }  # fmt: skip
        y[token] = sum(weight * y[other] for other, weight in weights.items()) / sum(weights.values())
    return y


@pytest.mark.parametrize("block", [0, 1, 5])
def test_attention_is_the_papers(block):
    attention, x, place = attention_of(RAGGED, rows=2)
    found = attended(Coherent(RAGGED, (SKIPPED,)), attention, x, place, block)
    for row in range(2):
        of_row = jax.tree.map(lambda leaf, row=row: leaf[row], (x, place))
        assert relative_error(found[row], slow(attention, *of_row, RAGGED, block, SKIPPED)) < 1e-5
    assert relative_error(found, attended(Dense(), attention, x, place, block)) > 1e-2


def test_a_row_decides_by_itself_in_any_batch():
    attention, x, place = attention_of(RAGGED, rows=2)
    together = attended(Coherent(RAGGED, (SKIPPED,)), attention, x, place, 1)
    for row in range(2):
        alone = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], (x, place))
        assert relative_error(together[row], attended(Coherent(RAGGED, (SKIPPED,)), attention, *alone, 1)[0]) < 1e-5


@pytest.mark.parametrize(("grid", "cell"), [((2, 7, 10), 4), ((1, 64, 64), 9), ((1, 5, 5), 16), ((3, 4, 6), 2)])
def test_coherence_of_any_lattice(grid, cell):
    lattice = Lattice(grid=grid, cells=(cell, cell))
    x = np.random.default_rng(0).standard_normal((2, lattice.tokens, 24)) + 0.5
    found = jax.jit(lambda x: coherence(x, grid, cell))(jnp.asarray(x, jnp.float32))
    for row in range(2):
        np.testing.assert_allclose(found[row], slow_coherence(x[row], lattice, 0), atol=1e-6)


@pytest.mark.parametrize("grid", [(1, 64, 64), (2, 7, 10), (1, 4, 4), (1, 1, 5), (3, 30, 52)])
def test_every_sub_cell_has_a_protected_token_of_its_own(grid):
    lattice = Lattice(grid=grid, cells=cell_sizes(grid))
    members, where = sub_cells(lattice)
    for phase, mask in enumerate(protected(lattice)):
        assert set(where[mask]) == set(range(len(members)))
        if lattice.tokens < 1000:
            np.testing.assert_array_equal(mask, slow_protected(lattice, phase))
    assert sorted(members[members < lattice.tokens]) == list(range(lattice.tokens))


def test_cells_scale_with_the_lattice():
    assert cell_sizes((1, 64, 64)) == (16, 9) and cell_sizes((5, 32, 32)) == (8, 4)
    assert cell_sizes((1, 8, 8)) == (3, 2) and cell_sizes((1, 128, 128)) == (32, 18)


def test_padding_is_neither_kept_nor_attended(monkeypatch):
    attention, x, place = attention_of(RAGGED, rows=2)
    padded = attention_of(RAGGED, rows=2, padding=4)[1:]
    expected = attended(Coherent(RAGGED, (SKIPPED,)), attention, x, place, 1)
    found = attended(Coherent(RAGGED, (SKIPPED,)), attention, *padded, 1)
    assert relative_error(found[:, : RAGGED.tokens], expected) < 1e-5 and np.isfinite(found).all()
    masked = attended(MaskedCoherent(RAGGED), attention, *padded, 1, jnp.full(2, SKIPPED))
    assert relative_error(masked[:, : RAGGED.tokens], expected) < 1e-5
    monkeypatch.setattr(coredit_file, "padded_length", lambda tokens: -(-tokens // 32) * 32)
    rounded = jax.jit(Coherent(RAGGED, (SKIPPED,)))(attention, x, place, 1, None, None)[0].tokens
    assert relative_error(rounded, expected) < 1e-5


def test_gradients_flow_through_the_masked_form():
    attention, x, place = attention_of(RAGGED, rows=1)

    @jax.jit
    @jax.grad
    def gradient(x):
        attended, _ = MaskedCoherent(RAGGED)(attention, x, place, jnp.int32(0), None, jnp.full(1, 60))
        return jnp.sum(jnp.square(attended.tokens))

    found = gradient(x)
    assert np.isfinite(found).all() and np.abs(found).min(axis=-1).max() > 0


def test_the_last_quarter_skips_a_quarter():
    table = Coredit(ratios=(0.4, 0.2, 0.0)).skipped(Lattice(grid=(1, 25, 40), cells=(9, 5)), 3, 20)[0]
    assert table[14].tolist() == [400, 200, 0] and table[15].tolist() == [100, 50, 0]
    small = Lattice(grid=(1, 1, 4), cells=(3, 2))
    assert Coredit(ratios=(0.6,)).skipped(small, 1, 1).tolist() == [[[2]]], "the others are protected"
    assert (table[:15] == table[0]).all() and (table[15:] == table[15]).all()


def test_ratios_are_rounded_to_few_with_the_same_mean():
    assert bucketed((0.3, 0.45, 0.3, 0.0), 4) == (0.3, 0.45, 0.3, 0.0)
    many = tuple(np.random.default_rng(0).uniform(0, 0.6, 40).tolist())
    few = bucketed(many, 4)
    assert len(set(few)) == 4 and np.mean(few) == pytest.approx(np.mean(many))
    assert max(abs(a - b) for a, b in zip(few, many, strict=True)) < 0.2
    assert bucketed((0.0, 0.0, 0.5, 0.6), 2) == (0.0, 0.0, pytest.approx(0.55), pytest.approx(0.55))


def test_allocation_gives_the_most_coherent_tokens():
    rng = np.random.default_rng(0)
    falling = -np.sort(-rng.uniform(0, 1, (4, 32)) * np.array([[1.0], [0.9], [0.5], [0.1]]), axis=1)
    skipped = allocate(falling, 0.25, most=19)
    # One token at a time, the greedy rule takes the largest of all that are left, up to the cap.
    capped = np.where(np.arange(32) < 19, falling, 0)
    largest = np.sort(capped.ravel())[-32]
    np.testing.assert_array_equal(skipped, (capped >= largest).sum(axis=1))
    assert skipped.sum() == 32 and skipped[0] > skipped[3]
    assert allocate(falling, 1.0, most=19).tolist() == [19] * 4


def test_a_ramp_that_tells_no_blocks_apart_skips_as_many_and_evenly():
    rng = np.random.default_rng(0)
    falling = -np.sort(-rng.uniform(0, 1, (5, 333)), axis=1)  # a turn is of 5 tokens
    adaptive, alike, turns = np.zeros(5, int), np.zeros(5, int), 0
    while True:
        after = ramped(falling, adaptive, 0.31, most=199)
        even = ramped_alike(alike, 333, 0.31, most=199)
        assert even.sum() == after.sum() and np.ptp(even) <= 1 and (even >= alike).all()
        if (even == alike).all():
            break
        adaptive, alike, turns = after, even, turns + 1
    assert alike.tolist() == [104, 103, 103, 103, 103] and np.ptp(adaptive) > 1 and turns == 104
    assert ramped_alike(np.array([9, 0, 3, 3, 8]), 333, 0.31, 199).tolist() == [9, 4, 4, 3, 8]
    assert ramped_alike(np.array([60, 58]), 100, 1.0, most=60, more=7).tolist() == [60, 60]
    assert ramped_alike(np.array([60, 60]), 100, 0.3, most=60).tolist() == [60, 60], "more than the ratio stays"


def test_recording_runs_dense_and_adds_up_sorted_coherence():
    config = CONFIGS["wan"]
    plain, latents = guided(config), noise(config)
    lattice = Coredit(ratios=(0.0,)).lattice(latents.shape, config.patch)
    recording = Recording(guided=plain, lattice=lattice)
    step = Step(jnp.int32(0), jnp.float32(0.7), jnp.float32(0.6), jnp.float32(700))
    run = jax.jit(type(recording).__call__)
    found, once = run(recording, latents, recording.init(latents), step)
    assert relative_error(found, velocity(plain, latents, 0)) < 1e-6
    np.testing.assert_allclose(run(recording, latents, once, step)[1], 2 * once, rtol=1e-5)
    once = np.asarray(once)
    assert once.shape == (config.blocks, 4, lattice.tokens)
    for block in range(len(once)):
        free = int((~slow_protected(lattice, block)).sum())
        assert (np.diff(once[block, :, :free], axis=1) <= 0).all() and (once[block, :, free:] == 0).all()


def test_a_file_of_ratios_is_a_plan(tmp_path):
    file = tmp_path / "ratios.json"
    file.write_text(json.dumps({"ratios": [0.5, 0.1, 0.6], "stride": 4}))
    [coredit] = parse_plan(f"coredit:{file}:late=0.5").methods
    assert coredit == Coredit(ratios=(0.5, 0.1, 0.6), stride=4, late=0.5)
    assert hash(coredit) == hash(replace(coredit))
    file.write_text(json.dumps(ratios_file({"transformer": [0.5, 0.1], "transformer_2": [0.2, 0.3]}, stride=3)))
    [coredit] = parse_plan(f"coredit:{file}").methods
    assert coredit == Coredit(ratios=(0.5, 0.1), experts=(("transformer_2", (0.2, 0.3)),))


def test_experts_have_ratios_of_their_own_and_share_a_program():
    config = CONFIGS["wan"]
    plain, latents = guided(config), noise(config)
    coredit = Coredit(ratios=(0.6, 0.2, 0.2), experts=(("transformer_2", (0.4,)),), late=0.5)
    run = Run(latents_shape=latents.shape, first=0, stop=4, steps=4, sigmas=None)
    high, low = (coredit.applied(plain, replace(run, component=name)) for name in ("transformer", "transformer_2"))
    assert high.call == low.call
    skipped = np.asarray(high.call.attention.skipped)
    assert skipped[high.steering[0].table].tolist() == [[27, 9, 9]] * 3 + [[14, 4, 4]]
    assert skipped[low.steering[0].table].tolist() == [[18, 18, 18]] * 3 + [[9, 9, 9]]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("coredit:0.7", "ratios from 0 to 0.6, found '0.7'"),
        ("coredit:nan", "ratios from 0 to 0.6"),
        ("coredit:nowhere.json", "cannot read the ratios in 'nowhere.json'"),
        ("coredit:0.4:late=2", "late from 0 to 1"),
        ("coredit:0.4:colour=red", "which coredit does not know"),
        ("coredit:0.4+hsa:50", "coredit and hsa cannot share a plan"),
    ],
)
def test_words_that_are_none_are_refused(text, told):
    with pytest.raises(UserError, match=told):
        parse_plan(text)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("ratios", "is no JSON"),
        ("[0.4]", "has no ratios"),
        ('{"ratios": []}', "has no ratios"),
        ('{"ratios": [0.1, "0.2"]}', "has no ratios"),
        ('{"ratios": [0.1, 0.61]}', "found 0.61"),
        ('{"ratios": [0.1], "experts": [0.1]}', "has no ratios"),
        ('{"ratios": [0.1], "experts": {"transformer_2": [0.7]}}', "found 0.7"),
        ('{"ratios": [0.1], "stride": 1}', "stride 1"),
    ],
)
def test_files_that_hold_no_ratios_are_refused(tmp_path, content, told):
    file = tmp_path / "ratios.json"
    file.write_text(content)
    with pytest.raises(UserError, match=told):
        parse_plan(f"coredit:{file}")


def test_late_steps_are_counted_exactly():
    assert Coredit(ratios=(0.4,), late_share=0.29).late_steps(100) == 29  # in floats, 28
    [skipped] = Coredit(ratios=(0.4,), late_share=0.29).skipped(RAGGED, 1, 100)
    assert np.flatnonzero(np.diff(skipped[:, 0])) == [70]


def test_ratios_may_be_the_checkpoints_own():
    config = CONFIGS["wan"]
    plain, latents = guided(config), noise(config)
    told = ratios_file({"transformer": [0.5, 0.1, 0.3], "transformer_2": [0.2, 0.3, 0.4]}, stride=4)
    parts = {"coredit": Part(told | {"model": "any"}, {})}
    plan = parse_plan("coredit:late=0.5+routing")
    coredit = Coredit(ratios=(0.5, 0.1, 0.3), experts=(("transformer_2", (0.2, 0.3, 0.4)),), stride=4, late=0.5)
    assert plan.told(parts).methods == (plan.methods[0], coredit)
    run = Run(latents_shape=latents.shape, first=0, stop=4, steps=4, sigmas=None, component="transformer_2")
    own, given = (
        alone.applied(plain, replace(run, parts=held))
        for alone, held in ((parse_plan("coredit:late=0.5"), parts), (Plan((coredit,), "coredit"), {}))
    )
    assert own.call == given.call and own.steering[0].table.tolist() == given.steering[0].table.tolist()


@pytest.mark.parametrize(
    ("held", "told"),
    [
        ({}, "coredit needs ratios, which the model lacks"),
        ({"coredit": Part({"ratios": [0.1, 0.9]}, {})}, r"methods/coredit/config.json: expected ratios .* found 0.9"),
        ({"coredit": Part({"ratios": [0.1, 0.2]}, {})}, "ratios of 2 blocks: expected 3"),
    ],
)
def test_a_checkpoint_without_ratios_that_fit_is_refused_before_it_runs(held, told):
    with pytest.raises(UserError, match=told):
        parse_plan("coredit").check((3,), held)


def test_ratios_of_another_model_are_refused_before_it_runs():
    parse_plan("coredit:0.6").check((2, 3), {})
    with pytest.raises(UserError, match="ratios of 2 blocks: expected 5"):
        Coredit(ratios=(0.1, 0.2)).check((2, 3), {})
