"""DDiT: the base size against the plain model, larger sizes against merged weights and slow transcriptions, the
scheduler against its equation."""

from dataclasses import replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import CONFIGS, guided, noise, one_sample, random_model, relative_error, sampled

from dit_jax.config import UserError
from dit_jax.methods.ddit import (
    Ddit,
    PatchScheduler,
    Span,
    calibrated_threshold,
    deviations,
    difference,
    mean_tokens,
    third_difference,
    token_counts,
)
from dit_jax.methods.method import Run
from dit_jax.methods.patch_adapters import (
    AXES,
    AdapterSettings,
    abstract_adapters,
    adapted,
    adapters_from,
    bilinear,
    initial_adapters,
    part_of,
)
from dit_jax.methods.plan import parse_plan
from dit_jax.models.network import layout, unlayout
from dit_jax.ops.rope import merged_centres
from dit_jax.parameters import Precision, cast, leaf_name, named_leaves, with_leaves
from dit_jax.sampling.solvers import Step
from dit_jax.sharding import logical_axes

SETTINGS = AdapterSettings(rank=3, residual_channels=5)
STEP = Step(jnp.int32(3), jnp.float32(0.7), jnp.float32(0.6), jnp.float32(700))


@lru_cache
def untrained(backbone: str, settings: AdapterSettings = SETTINGS):
    model = random_model(CONFIGS[backbone])
    return initial_adapters(model.config, dict(named_leaves(model)), seed=4, settings=settings)


@lru_cache
def trained(backbone: str, settings: AdapterSettings = SETTINGS):
    """Adapters with every leaf of ordinary size."""
    rng = np.random.default_rng(7)

    def fill(leaf):
        fan_in = np.prod(leaf.shape[1:-1]) if leaf.ndim > 2 else leaf.shape[0] if leaf.ndim == 2 else 4
        return jnp.asarray(rng.standard_normal(leaf.shape) / fan_in**0.5, jnp.float32)

    return jax.tree.map(fill, abstract_adapters(CONFIGS[backbone], settings))


def applied(denoiser, latents, adapters, scale: int, settings: AdapterSettings = SETTINGS):
    run = Run(
        latents_shape=latents.shape, first=0, stop=6, steps=6, sigmas=None, variant=scale,
        parts={"ddit": part_of(adapters, settings)},
    )  # fmt: skip
    return Ddit().applied(denoiser, run)


@jax.jit
def velocity(denoiser, latents):
    return denoiser(latents, denoiser.init(latents), STEP)[0]


def enlarged(x: np.ndarray, scale: int, patch: int = 2) -> np.ndarray:
    """Every patch of [B, T, Y, X, C] enlarged by itself, in plain loops."""
    operator = bilinear(patch, patch * scale)
    batch, frames, rows, columns, channels = x.shape
    out = np.zeros((batch, frames, rows * scale, columns * scale, channels))
    for y in range(0, rows, patch):
        for x0 in range(0, columns, patch):
            cells = x[:, :, y : y + patch, x0 : x0 + patch]
            place = np.s_[:, :, y * scale : (y + patch) * scale, x0 * scale : (x0 + patch) * scale]
            out[place] = np.einsum("Yy,Xx,btyxc->btYXc", operator, operator, cells)
    return out


@pytest.mark.parametrize("backbone", CONFIGS)
def test_the_base_size_is_the_plain_model(backbone):
    plain, latents = guided(CONFIGS[backbone]), noise(CONFIGS[backbone])
    assert applied(plain, latents, trained(backbone), 1) is plain


@pytest.mark.parametrize("backbone", CONFIGS)
@pytest.mark.parametrize("scale", [2, 4])
def test_an_untrained_size_sees_enlarged_patches_as_the_base_sees_them(backbone, scale):
    config = CONFIGS[backbone]
    model, small = random_model(config), np.asarray(noise(config), np.float64)
    larger = adapted(model, untrained(backbone)[f"{scale}p"], scale)
    large = jnp.asarray(enlarged(small, scale), jnp.float32)
    tokens = larger.embed(layout(large, larger.config.patch).rows)
    base = layout(jnp.asarray(small, jnp.float32), config.patch)
    assert relative_error(tokens, model.embed(base.rows)) < 1e-5
    # The head's velocity is the base one's, enlarged.
    signal = model.signal(jnp.full(2, 700.0), guided(config, branches=1).conditioning)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, base.rows.shape[1], config.width)), jnp.float32)
    found = unlayout(larger.head(x, signal), large.shape, larger.config.patch)
    expected = enlarged(np.asarray(unlayout(model.head(x, signal), small.shape, config.patch)), scale)
    assert relative_error(found, expected) < 1e-5


def test_bilinear_resizing_is_that_of_jax():
    rows = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    for larger in (6, 12):
        expected = jax.image.resize(rows, (5, larger), "bilinear")
        np.testing.assert_allclose(rows @ bilinear(3, larger).T, expected, atol=1e-6)


@pytest.mark.parametrize("backbone", CONFIGS)
@pytest.mark.parametrize("scale", [2, 4])
def test_a_larger_size_is_a_plain_model_with_merged_weights(backbone, scale):
    """Weights merged in NumPy, latents padded, velocity cropped and residual block added outside of the model."""
    config, adapter = CONFIGS[backbone], trained(backbone)[f"{scale}p"]
    plain, latents = guided(config), noise(config)
    found = velocity(applied(plain, latents, trained(backbone), scale), latents)

    merged = jax.tree.map(lambda leaf: leaf, plain.model)
    merged.config = replace(config, patch=(1, 2 * scale, 2 * scale), merged=scale)
    merged.patch.kernel = nnx.Param(adapter.patch.kernel[...])
    merged.patch.bias = nnx.Param(adapter.patch.bias[...] + adapter.patch.size[...])
    merged.out.kernel, merged.out.bias = nnx.Param(adapter.out.kernel[...]), nnx.Param(adapter.out.bias[...])
    deltas = {
        f"{path}.kernel": np.einsum("gir,gro->gio", np.asarray(low.down[...]), np.asarray(low.up[...]))
        for path, low in adapter.lora.items()
    }
    assert set(deltas) <= {name for name, _ in named_leaves(merged)}
    merged = jax.tree_util.tree_map_with_path(lambda path, leaf: leaf + deltas.get(leaf_name(path), 0), merged)
    rows, columns = latents.shape[2:4]
    wide = np.asarray(latents)
    wide = wide[:, :, np.minimum(np.arange(-(-rows // (2 * scale)) * 2 * scale), rows - 1)]
    wide = wide[:, :, :, np.minimum(np.arange(-(-columns // (2 * scale)) * 2 * scale), columns - 1)]
    assert wide.shape != latents.shape, "a size that divides the lattice is no test of padding"
    expected = np.asarray(velocity(replace(plain, model=merged), jnp.asarray(wide)))[:, :, :rows, :columns]
    assert relative_error(found, expected + slow_residual(np.asarray(latents), adapter.residual, float(STEP.t))) < 1e-5
    assert relative_error(found, expected) > 1e-2


def slow_residual(x: np.ndarray, block, t: float) -> np.ndarray:
    kernel, rows, columns = np.asarray(block.conv[...], np.float64), x.shape[2], x.shape[3]
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
    hidden = np.asarray(block.conv_bias[...], np.float64)
    for dy in range(3):
        for dx in range(3):
            hidden = hidden + padded[:, :, dy : dy + rows, dx : dx + columns] @ kernel[dy, dx]
    angles = t * 10_000.0 ** (-np.arange(128) / 128)
    waves = np.concatenate([np.cos(angles), np.sin(angles)])
    told = waves @ np.asarray(block.time.kernel[...], np.float64) + np.asarray(block.time.bias[...], np.float64)
    scale, shift = np.split(told, 2)
    hidden = hidden * (1 + scale) + shift
    hidden = hidden / (1 + np.exp(-hidden))
    return hidden @ np.asarray(block.out.kernel[...], np.float64) + np.asarray(block.out.bias[...], np.float64)


def test_positions_are_centres_in_base_units():
    positions = jnp.asarray([[[2.0, 0, 0], [5, 1, 3]]])
    np.testing.assert_array_equal(merged_centres(positions, 4)[0], [[2, 1.5, 1.5], [5, 5.5, 13.5]])
    assert merged_centres(positions, 1) is positions


def test_a_sample_is_itself_in_any_batch_at_a_larger_size():
    config = CONFIGS["wan"]
    plain, latents = guided(config), noise(config)
    together = sampled(applied(plain, latents, trained("wan"), 2), latents, 4)
    for index in range(2):
        alone = latents[index : index + 1]
        found = sampled(applied(one_sample(plain, index), alone, trained("wan"), 2), alone, 4)
        assert relative_error(found[0], together[index]) < 1e-5


@pytest.mark.parametrize("backbone", CONFIGS)
def test_adapters_in_fp32_leave_a_bf16_model_in_bf16(backbone):
    plain, latents = guided(CONFIGS[backbone]), noise(CONFIGS[backbone])
    plain = replace(plain, model=cast(plain.model, Precision(weights=jnp.bfloat16)))
    larger = applied(plain, latents, trained(backbone), 2)
    assert larger.model.patch.size.dtype == larger.model.out.kernel.dtype == jnp.bfloat16
    tokens = jax.eval_shape(lambda model: model.embed(layout(latents, model.config.patch).rows), larger.model)
    assert tokens.dtype == jnp.bfloat16
    assert jax.eval_shape(lambda: larger(latents, larger.init(latents), STEP))[0].shape == latents.shape


@pytest.mark.parametrize("backbone", CONFIGS)
def test_adapters_of_rank_0_are_those_whose_low_rank_maps_add_nothing(backbone):
    none, config = replace(SETTINGS, rank=0), CONFIGS[backbone]
    bare, some = trained(backbone, none), trained(backbone)
    assert all(not adapter.lora for adapter in bare.values())
    assert {name for name, _ in named_leaves(some)} - {name for name, _ in named_leaves(bare)} == {
        name for name, _ in named_leaves(some) if ".lora." in name
    }
    silent = with_leaves(
        some,
        dict(named_leaves(bare)) | {name: 0 * leaf for name, leaf in named_leaves(some) if ".lora." in name},
    )
    plain, latents = guided(config), noise(config)
    found = velocity(applied(plain, latents, bare, 2, none), latents)
    assert relative_error(found, velocity(applied(plain, latents, silent, 2), latents)) < 1e-6
    assert relative_error(found, velocity(applied(plain, latents, some, 2), latents)) > 1e-2
    assert untrained(backbone, none)["4p"].patch.kernel.shape == bare["4p"].patch.kernel.shape


@pytest.mark.parametrize("backbone", CONFIGS)
def test_adapters_are_saved_and_read_by_path(backbone):
    part, config = part_of(trained(backbone), SETTINGS), CONFIGS[backbone]
    saved = dict(part.leaves)
    again = adapters_from(config, part._replace(settings={**part.settings, "scales": [2, 4]}))
    for (name, leaf), (known, expected) in zip(named_leaves(again), named_leaves(trained(backbone)), strict=True):
        assert name == known and leaf is expected
        assert len(logical_axes(name, AXES)) == leaf.ndim
    gone = saved.pop("4p.patch.size")
    with pytest.raises(UserError, match=r"lack 4p.patch.size.*dit-adapt"):
        adapters_from(config, part._replace(leaves=saved))
    with pytest.raises(UserError, match="wrong shape"):
        adapters_from(config, part._replace(leaves=saved | {"4p.patch.size": gone[1:]}))


def slow_choice(history: np.ndarray, threshold: float, quantile: float, held: int = 0):
    """(index, quantiles) of one sample's last four latents [4, T, Y, X, C], patch by patch."""
    z4, z3, z2, z1 = history[:, held:].astype(np.float64)
    difference, values = z1 - 3 * z2 + 3 * z3 - z4, []
    for size in (4, 8):
        of_patches = [
            np.std(difference[t, y : y + size, x : x + size])
            for t in range(difference.shape[0])
            for y in range(0, difference.shape[1], size)
            for x in range(0, difference.shape[2], size)
        ]
        values.append(np.quantile(of_patches, quantile))
    below = [index + 1 for index, value in enumerate(values) if value < threshold]
    return max(below, default=0), values


@pytest.mark.parametrize(("held", "quantile"), [(0, 0.4), (1, 0.73)])
def test_the_scheduler_is_the_papers_on_ragged_lattices(held, quantile):
    rng = np.random.default_rng(3)
    latents = rng.standard_normal((7, 3, 3, 10, 14, 4)).astype(np.float32).cumsum(axis=0)
    latents[:, 1:] *= np.float32([0.01, 100])[:, None, None, None, None]  # samples that change little, and much
    if held:
        latents[:, :, :held] = 0
    threshold = float(np.mean(slow_choice(latents[3:7, 0], 1, quantile, held)[1]))  # between the sizes' values
    scheduler = PatchScheduler(
        threshold=jnp.float32(threshold), quantile=jnp.float32(quantile), patch=(1, 2, 2), scales=(2, 4), held=held
    )
    history, call = scheduler.init(latents[0]), jax.jit(PatchScheduler.__call__)
    indexes = []
    for step in range(7):
        history, index, found = call(scheduler, history, latents[step])
        if step < 3:
            assert not index.any() and np.isinf(found).all()
            continue
        for sample in range(3):
            expected, values = slow_choice(latents[step - 3 : step + 1, sample], threshold, quantile, held)
            np.testing.assert_allclose(found[sample], values, rtol=1e-4)
            assert index[sample] == expected
            indexes.append(expected)
    assert len(set(indexes)) > 1, "choices that are all the same prove little"


def test_where_no_frame_moves_the_size_is_the_base_one():
    scheduler = PatchScheduler(
        threshold=jnp.float32(1e9), quantile=jnp.float32(0.4), patch=(1, 2, 2), scales=(2, 4), held=1
    )
    latents = np.random.default_rng(0).standard_normal((6, 2, 1, 8, 8, 4)).astype(np.float32)
    history = scheduler.init(latents[0])
    for of_step in latents:
        history, index, values = scheduler(history, jnp.asarray(of_step))
        assert not index.any() and values.shape == (2, 2) and np.isinf(values).all()


def test_cells_beyond_the_lattice_are_no_part_of_a_deviation():
    x = np.full((1, 1, 3, 5, 2), 100.0, np.float32)
    np.testing.assert_array_equal(deviations(jnp.asarray(x), (1, 4, 4)), np.zeros((1, 2)))
    assert third_difference(jnp.asarray(np.arange(4.0)[None, :, None, None, None, None] ** 3)) == 6


def test_a_threshold_is_calibrated_to_a_mean_token_count():
    rng = np.random.default_rng(5)
    values = np.sort(rng.gamma(2, 1e-3, (3, 20, 2)), axis=-1)
    values[:, :3] = np.inf
    tokens = token_counts((1, 3, 10, 14, 4), (1, 2, 2))
    assert list(tokens) == [105, 36, 12]
    for wanted in (100.0, 60.0, 45.5):
        found = mean_tokens(values, tokens, calibrated_threshold(values, tokens, wanted))
        means = [mean_tokens(values, tokens, t) for t in np.linspace(0, values[np.isfinite(values)].max() * 2, 20000)]
        assert abs(found - wanted) <= min(abs(mean - wanted) for mean in means) + 1e-9
    with pytest.raises(UserError, match="10 tokens is out of reach: expected 26 to 105"):
        calibrated_threshold(values, tokens, 10)
    with pytest.raises(UserError, match="at least four steps"):
        calibrated_threshold(values[:, :3], tokens, 50)


def test_words_are_understood():
    assert parse_plan("ddit").methods == (Ddit(),)
    assert parse_plan("ddit:tau=0.02:rho=0.5").methods == (Ddit(threshold=0.02, quantile=0.5),)
    [small] = parse_plan("ddit:tau=0.02:sizes=2p").methods
    assert small == Ddit(threshold=0.02, sizes=(2,)) and small.variants == (1, 2)
    assert parse_plan("ddit:sizes=2p/4p").methods == (Ddit(),)
    [fixed] = parse_plan("ddit:4p@20-29/2p@0-18").methods
    assert fixed == Ddit(spans=(Span(2, 0, 18), Span(4, 20, 29)))
    assert fixed.breaks(30) == (0, 19, 20) and fixed.breaks(40) == (0, 19, 20, 30)
    assert [fixed.scheduled(step) for step in (0, 18, 19, 20, 29, 30)] == [2, 2, 1, 4, 4, 1]
    assert parse_plan("ddit+coredit:0.3").pointless(8) == ["ddit"] and not parse_plan("ddit").pointless(9)
    assert fixed.variants == (1, 2, 4) and Ddit(spans=(Span(4, 0, 1),)).variants == (1, 4)
    with pytest.raises(UserError, match="4p is to run until step 29, the last of 20 steps is 19"):
        fixed.breaks(20)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("ddit:3p@0-4", r"expected sizes \(2p or 4p\)"),
        ("ddit:2p@9-4", "first and last step"),
        ("ddit:2p@0-4/4p@4-9", "step 4 has two sizes"),
        ("ddit:2p", "write 2p@0-19"),
        ("ddit:2p@0-4:tau=1", "which ddit does not know"),
        ("ddit:rho=1.5", "rho from 0 to 1"),
        ("ddit:sizes=3p", "sizes to be one of 2p/4p, 2p, 4p, found '3p'"),
        ("ddit:tau=-1", "tau from 0"),
        ("ddit+hsa:50", "ddit and hsa cannot share a plan: keys and values"),
    ],
)
def test_words_that_are_none_are_refused(text, told):
    with pytest.raises(UserError, match=told):
        parse_plan(text)


def test_a_calibrated_threshold_is_read(tmp_path):
    file = tmp_path / "ddit.json"
    file.write_text('{"tau": 0.02, "rho": 0.5, "steps": 30}')
    plan = parse_plan(f"ddit:{file}")
    assert plan.methods == (Ddit(threshold=0.02, quantile=0.5, calibrated_for=30),)
    assert plan.steps == 30 and plan.solver is None and plan.methods[0].by_latents
    file.write_text('{"tau": 0.02, "rho": 0.5, "steps": 30, "solver": "euler", "order": 2}')
    plan = parse_plan(f"ddit:{file}")
    assert plan.solver == "euler" and plan.methods[0].order == 2
    file.write_text('{"tau": 0.02, "rho": 0.5, "steps": 30, "sizes": "4p"}')
    assert parse_plan(f"ddit:{file}").methods[0].variants == (1, 4)
    with pytest.raises(UserError, match="'tau', which ddit does not know"):
        parse_plan(f"ddit:{file}:tau=1")
    with pytest.raises(UserError, match=r"gone\.json: expected a file with DDiT's threshold, found No such file"):
        parse_plan(f"ddit:{tmp_path}/gone.json")


@pytest.mark.parametrize(
    "held",
    [
        "no JSON",
        "[1]",
        '{"rho": 0.4, "steps": 30}',
        '{"tau": -1, "rho": 0.4, "steps": 30}',
        '{"tau": 1, "rho": 2, "steps": 30}',
        '{"tau": NaN, "rho": 0.4, "steps": 30}',
        '{"tau": 1, "rho": 0.4, "steps": 0}',
        '{"tau": 1, "rho": 0.4, "steps": 30, "solver": "heun"}',
        '{"tau": 1, "rho": 0.4, "steps": 30, "order": 4}',
        '{"tau": 1, "rho": 0.4, "steps": 30, "sizes": ["2p"]}',
    ],
)
def test_files_that_hold_no_threshold_are_refused(held, tmp_path):
    (tmp_path / "ddit.json").write_text(held)
    with pytest.raises(UserError, match=r"ddit\.json: expected .* `dit-calibrate ddit`"):
        parse_plan(f"ddit:{tmp_path}/ddit.json")


def test_a_model_without_adapters_is_refused():
    plan = parse_plan("ddit:2p@0-3")
    with pytest.raises(UserError, match=r"adapters for patches of 2p, which this model has not.*dit-adapt"):
        plan.check((3,), {})
    only_2p = part_of({}, AdapterSettings(scales=(2,)))
    plan.check((3,), {"ddit": only_2p})
    with pytest.raises(UserError, match="patches of 4p, which"):
        parse_plan("ddit:4p@0-1").check((3,), {"ddit": only_2p})
    with pytest.raises(
        UserError, match="patches of 2p/4p, and this model has adapters for 2p alone: say ddit:sizes=2p"
    ):
        parse_plan("ddit").check((3,), {"ddit": only_2p})
    parse_plan("ddit:sizes=2p").check((3,), {"ddit": only_2p})


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_order_of_the_difference_is_a_word(order):
    """Binomial weights of the newest latents; a size may be chosen once so many have been seen."""
    latents = np.random.default_rng(order).standard_normal((4, 2, 1, 8, 8, 3)).astype(np.float32)
    weights = {1: (0, 0, -1, 1), 2: (0, 1, -2, 1), 3: (-1, 3, -3, 1)}[order]
    expected = sum(weight * each for weight, each in zip(weights, latents, strict=True))
    found = difference(jnp.asarray(latents).swapaxes(0, 1), order)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    [ddit] = parse_plan(f"ddit:tau=0.02:order={order}").methods
    assert ddit == Ddit(threshold=0.02, order=order)
    scheduler = ddit.scheduler(guided(CONFIGS["flux"]))
    history = scheduler.init(jnp.asarray(latents[0]))
    for step in range(4):
        history, _, values = scheduler(history, jnp.asarray(latents[step]))
        assert np.isfinite(values).all() == (step >= order)
    slow = [np.quantile(np.asarray(deviations(found, (1, 2 * scale, 2 * scale))), 0.4, axis=1) for scale in (2, 4)]
    np.testing.assert_allclose(values, np.stack(slow, axis=1), rtol=1e-5)


def test_an_order_that_is_none_is_refused():
    with pytest.raises(UserError, match="expected order to be one of 1, 2, 3, found '4'"):
        parse_plan("ddit:order=4")
