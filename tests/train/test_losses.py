"""The losses against their definitions written out."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from torch_twins import (
    as_jax,
    batch_of,
    counted_mean,
    relative,
    told_levels,
    twin,
    use_rounded_frequencies,
    velocity,
)

from dit_jax.lora import Adapter, merged
from dit_jax.models.flux import FluxConfig
from dit_jax.models.vae_wan import WanVAE, WanVAEConfig
from dit_jax.models.wan import Wan, WanConfig
from train import losses
from train.losses import (
    AutoencoderWeights,
    FlowSettings,
    Noised,
    autoencoding,
    decibels,
    finetune,
    flow_matching,
    held_samples,
    mean_square,
    noise_levels,
    noised,
    pixels,
    predicted,
)
from train.placement import training_mesh
from train.step import Plan, TrainStep, Update, place_of

TINY = WanConfig(blocks=2, width=24, heads=2, head_width=12, mlp_width=32, text_width=8, in_channels=4, out_channels=4)

PLAIN = FlowSettings()


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(4, 2, 4, 6, 4)).astype(np.float32)
    return {"latents": latents, "text": rng.normal(size=(4, 5, 8)).astype(np.float16)}


def test_flow_matching_is_the_error_of_noise_minus_data(batch, monkeypatch):
    seen = {}

    def oracle(model, call, tokens, t_B, conditioning, state=None, aux=None):
        seen.update(rows=tokens.rows, t=t_B)
        return jnp.zeros_like(tokens.rows), None

    monkeypatch.setattr(losses, "network", oracle)
    model = nnx.eval_shape(lambda: Wan(TINY, nnx.Rngs(0)))
    loss, _ = flow_matching(model, batch, jax.random.key(3), FlowSettings())
    level_key, noise_key = jax.random.split(jax.random.key(3))
    levels = noise_levels(level_key, 4, FlowSettings())
    noise = jax.random.normal(noise_key, batch["latents"].shape)
    np.testing.assert_allclose(loss, np.mean((noise - batch["latents"]) ** 2), rtol=1e-5)
    np.testing.assert_allclose(seen["t"], 1000 * levels, rtol=1e-6)
    blend = (1 - levels[:, None, None, None, None]) * batch["latents"] + levels[:, None, None, None, None] * noise
    np.testing.assert_allclose(np.sort(np.ravel(seen["rows"])), np.sort(np.ravel(blend)), rtol=1e-5, atol=1e-6)


def told_to_networks(monkeypatch, read):
    """Fills up with what `read` takes from the tokens and the conditioning of every call; the velocity is zero."""
    seen = []

    def oracle(model, call, tokens, t_B, conditioning, state=None, aux=None):
        seen.append(read(tokens, conditioning))
        return jnp.zeros_like(tokens.rows), None

    monkeypatch.setattr(losses, "network", oracle)
    return seen


def test_a_window_has_the_positions_of_its_place(batch, monkeypatch):
    seen = told_to_networks(monkeypatch, lambda tokens, conditioning: tokens.positions)
    model = nnx.eval_shape(lambda: Wan(TINY, nnx.Rngs(0)))
    origin = np.array([[0, 0, 0], [0, 3, 1], [0, 1, 2], [1, 0, 5]], np.int32)
    for told in (batch, batch | {"origin": origin}):
        flow_matching(model, told, jax.random.key(3), FlowSettings())
    np.testing.assert_array_equal(seen[1] - seen[0], np.broadcast_to(origin[:, None], seen[0].shape))
    assert len(np.unique(seen[0][0], axis=0)) == 2 * 2 * 3


def test_the_right_velocity_has_no_loss(batch, monkeypatch):
    _, noise_key = jax.random.split(jax.random.key(3))
    noise = jax.random.normal(noise_key, batch["latents"].shape)

    def oracle(model, call, tokens, t_B, conditioning, state=None, aux=None):
        return losses.layout(noise - batch["latents"], TINY.patch).rows, None

    monkeypatch.setattr(losses, "network", oracle)
    model = nnx.eval_shape(lambda: Wan(TINY, nnx.Rngs(0)))
    assert float(flow_matching(model, batch, jax.random.key(3), FlowSettings())[0]) < 1e-10


def test_a_guidance_distilled_model_is_told_what_the_batch_says_or_the_usual_scale(batch, monkeypatch):
    seen = told_to_networks(monkeypatch, lambda tokens, conditioning: conditioning.guidance)
    told, dev = batch | {"pooled": np.zeros((4, 3), np.float16)}, FluxConfig(in_channels=4, out_channels=4)
    at = Noised(jnp.asarray(batch["latents"][:, :1]), jnp.zeros(()), jnp.full(4, 0.5))
    for config, more in ((dev, {}), (dev, {"guidance": np.float32([1, 2, 3, 4])}), (replace(dev, guidance=False), {})):
        predicted(SimpleNamespace(config=config), at, told | more)
    assert [None if each is None else each.tolist() for each in seen] == [[3.5] * 4, [1, 2, 3, 4], None]


def test_flow_matching_learns_from_text_and_time(batch):
    model = Wan(TINY, nnx.Rngs(0))
    gradients = jax.grad(lambda model: flow_matching(model, batch, jax.random.key(0), FlowSettings())[0])(model)
    for leaf in (gradients.text.up.kernel, gradients.time.up.kernel, gradients.blocks.attn1.q.linear.kernel):
        assert float(jnp.abs(leaf[...]).max()) > 0


@partial(jax.jit, static_argnames="settings")
def finetuned(trained, frozen, batch, key, settings=PLAIN):
    return jax.value_and_grad(finetune, has_aux=True)(trained, frozen, batch, key, settings=settings)


@pytest.mark.parametrize(
    ("kind", "share"),
    [("wan", 0.0), ("wan", 0.5), ("flux", 0.0), pytest.param("wan-i2v", 0.0, marks=pytest.mark.long)],
)
def test_finetuning_is_pytorchs(kind, share, monkeypatch):
    use_rounded_frequencies(monkeypatch)
    student, batch, settings = twin(kind, 1), batch_of(kind), FlowSettings(first_frame_conditioning=share)
    (loss, metrics), gradients = finetuned({"student": student.model}, {}, as_jax(batch), jax.random.key(3), settings)
    at = noised(jnp.asarray(batch["latents"]), jax.random.key(3), settings)
    levels, truth = np.asarray(at.levels), np.asarray(at.velocity)
    assert (at.held is None) == (share == 0) and (at.held is None or sorted(at.held.tolist()) == [False, True])
    found = velocity(student, torch.tensor(np.asarray(at.latents)), told_levels(at, truth.shape), batch)[0]
    expected = counted_mean((found - torch.tensor(truth)).square(), at.held)
    expected.backward()
    assert relative(loss, expected.detach()) <= 1e-4
    assert relative(gradients["student"], student.gradients()) <= 1e-4
    squares = (found.detach().numpy().astype(np.float64) - truth) ** 2
    held = [False, False] if at.held is None else at.held.tolist()
    errors = np.array(
        [square[1:].mean() if first else square.mean() for square, first in zip(squares, held, strict=True)]
    )
    for name, of in (("loss_low_noise", levels < 0.5), ("loss_high_noise", levels >= 0.5)):
        np.testing.assert_allclose(metrics[name].value(), errors[of].mean() if of.any() else np.nan, rtol=1e-4)


@pytest.mark.parametrize("microbatches", [1, 2, 8])
def test_the_errors_below_and_above_half_noise_are_means_over_the_rows_of_all_microbatches(microbatches, monkeypatch):
    def silent(model, call, tokens, t_B, conditioning, state=None, aux=None):
        return jnp.zeros_like(tokens.rows), None

    monkeypatch.setattr(losses, "network", silent)
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(8, 1, 2, 2, 4)).astype(np.float32) * np.arange(1, 9)[:, None, None, None, None]
    batch = {"latents": latents, "text": rng.normal(size=(8, 5, 8)).astype(np.float32)}
    settings = FlowSettings(shift=1.0)
    trained = {"student": Wan(TINY, nnx.Rngs(0))}
    update = Update(loss=partial(finetune, settings=settings), optimizer=optax.sgd(0.1), microbatches=microbatches)
    step = TrainStep(trained, Plan(updates=(update,)), training_mesh())
    _, metrics = step(step.init(trained), batch, jax.random.key(1))
    own_key = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), 0), place_of(0, 0))
    keys = [own_key] if microbatches == 1 else [jax.random.fold_in(own_key, each) for each in range(microbatches)]
    drawn = [noised(rows, key, settings) for rows, key in zip(np.split(latents, microbatches), keys, strict=True)]
    low = np.concatenate([at.levels for at in drawn]) < 0.5
    errors = np.concatenate([np.mean(np.square(at.velocity), axis=(1, 2, 3, 4)) for at in drawn])
    assert low.any() and not low.all()
    found = [metrics[name] for name in ("loss", "loss_low_noise", "loss_high_noise")]
    np.testing.assert_allclose(found, [errors.mean(), errors[low].mean(), errors[~low].mean()], rtol=1e-5)


def test_a_row_that_is_no_number_is_told_on_its_side_alone(batch, monkeypatch):
    level_key, _ = jax.random.split(jax.random.key(3))
    low = np.asarray(noise_levels(level_key, 4, FlowSettings(shift=1.0))) < 0.5

    def broken(model, call, tokens, t_B, conditioning, state=None, aux=None):
        return jnp.where(low[:, None, None], jnp.nan, jnp.zeros_like(tokens.rows)), None

    monkeypatch.setattr(losses, "network", broken)
    model = nnx.eval_shape(lambda: Wan(TINY, nnx.Rngs(0)))
    loss, told = flow_matching(model, batch, jax.random.key(3), FlowSettings(shift=1.0))
    assert np.isnan(loss) and np.isnan(told["loss_low_noise"].value())
    assert np.isfinite(told["loss_high_noise"].value())


def test_finetuning_a_lora_leaves_the_weights(batch):
    model, rng = Wan(TINY, nnx.Rngs(0)), np.random.default_rng(0)
    down, up = (jnp.asarray(rng.standard_normal(shape), jnp.float32) / 5 for shape in ((2, 24, 3), (2, 3, 2, 12)))
    lora = {"blocks.attn1.v.kernel": Adapter(stacked=True, down=down, up=up, alpha=jnp.ones(2), rank=jnp.full(2, 3.0))}
    (loss, _), gradients = finetuned({"lora": lora}, {"student": model}, batch, jax.random.key(3))
    students = {"student": model}, {"student": merged(model, [(lora, 1.0)])}
    plain, merged_in = (finetuned(student, {}, batch, jax.random.key(3)) for student in students)
    assert relative(loss, merged_in[0][0]) <= 1e-5 and abs(loss - plain[0][0]) > 1e-4
    # By the chain rule from the gradient of the weights, which is PyTorch's.
    whole, found = merged_in[1]["student"].blocks.attn1.v.kernel[...], gradients["lora"]["blocks.attn1.v.kernel"]
    assert relative(found.down, jnp.einsum("gdhk,grhk->gdr", whole, up) / 3) <= 1e-4
    assert relative(found.up, jnp.einsum("gdhk,gdr->grhk", whole, down) / 3) <= 1e-4


def test_a_held_first_frame_is_clean_and_nothing_else_changes(batch):
    key, latents = jax.random.key(3), jnp.asarray(batch["latents"], jnp.float16)
    half, none = (noised(latents, key, FlowSettings(first_frame_conditioning=share)) for share in (0.5, 0.0))
    assert none.held is None and half.held.sum() == 2
    # Without a share: what was drawn before there was one, bit for bit.
    level_key, noise_key = jax.random.split(key)
    levels, noise = noise_levels(level_key, 4, FlowSettings()), jax.random.normal(noise_key, latents.shape)
    clean, weight = latents.astype(jnp.float32), levels[:, None, None, None, None]
    np.testing.assert_array_equal(none.latents, (1 - weight) * clean + weight * noise)
    np.testing.assert_array_equal(none.velocity, noise - clean)
    expected = np.array(none.latents)
    expected[np.asarray(half.held), 0] = np.asarray(clean)[np.asarray(half.held), 0]
    np.testing.assert_array_equal(half.latents, expected)
    np.testing.assert_array_equal(half.velocity, none.velocity)
    np.testing.assert_array_equal(half.levels, levels)


def test_what_is_predicted_of_a_held_frame_is_no_error(batch, monkeypatch):
    settings = FlowSettings(first_frame_conditioning=1.0)
    at = noised(jnp.asarray(batch["latents"]), jax.random.key(3), settings)

    def oracle(model, call, tokens, t, conditioning, state=None, aux=None):
        np.testing.assert_array_equal(t.which, (np.arange(12) < 6) * np.ones((4, 1)))
        np.testing.assert_allclose(t.values, np.stack([1000 * at.levels, np.zeros(4)], axis=1), rtol=1e-6)
        return losses.layout(at.velocity.at[:, 0].add(7.0).at[:, 1].add(2.0), TINY.patch).rows, None

    monkeypatch.setattr(losses, "network", oracle)
    model = nnx.eval_shape(lambda: Wan(TINY, nnx.Rngs(0)))
    loss, told = flow_matching(model, batch, jax.random.key(3), settings)
    np.testing.assert_allclose([loss, told["loss_high_noise"].value()], 4.0, rtol=1e-5)


def test_so_many_samples_are_held_as_the_share_says_whatever_their_levels_are():
    def drawn(share, shape=(8, 3, 2, 2, 1)):
        settings = FlowSettings(first_frame_conditioning=share)
        return np.stack([held_samples(jax.random.key(seed), shape, settings) for seed in range(200)])

    assert (drawn(0.5).sum(axis=1) == 4).all() and drawn(1.0).all()
    counts = drawn(0.3).sum(axis=1)
    assert set(counts) == {2, 3} and counts.mean() == pytest.approx(2.4, abs=0.1)
    # Levels rise with a sample's place in the batch.
    np.testing.assert_allclose(drawn(0.5).mean(axis=0), 0.5, atol=0.12)
    assert held_samples(jax.random.key(0), (8, 1, 2, 2, 1), FlowSettings(first_frame_conditioning=0.5)) is None


def test_errors_of_held_frames_are_not_counted():
    rng = np.random.default_rng(0)
    error, held = rng.normal(size=(3, 4, 2, 3, 2)).astype(np.float32), np.array([True, False, True])
    expected = np.mean([np.mean(error[0, 1:] ** 2), np.mean(error[1] ** 2), np.mean(error[2, 1:] ** 2)])
    np.testing.assert_allclose(mean_square(jnp.asarray(error), jnp.asarray(held)), expected, rtol=1e-6)
    np.testing.assert_allclose(mean_square(jnp.asarray(error)), np.mean(error**2), rtol=1e-6)
    one = np.mean(error[1, :1] ** 2) / 3  # of one frame that is held nothing is left
    np.testing.assert_allclose(mean_square(jnp.asarray(error[:, :1]), jnp.asarray(held)), one, rtol=1e-6)


def test_noise_levels_are_logit_normal_shifted_and_spread():
    plain = FlowSettings(shift=1.0)
    levels = np.sort(np.concatenate([noise_levels(jax.random.key(i), 64, plain) for i in range(50)]))
    # The median of a logit-normal is 1/2, its quartiles sigmoid(±0.6745).
    np.testing.assert_allclose(np.quantile(levels, (0.25, 0.5, 0.75)), (0.3375, 0.5, 0.6625), atol=0.01)
    shifted = np.concatenate([noise_levels(jax.random.key(i), 64, FlowSettings(shift=3.0)) for i in range(50)])
    np.testing.assert_allclose(np.median(shifted), 0.75, atol=0.01)
    assert shifted.min() > 0 and shifted.max() < 1
    # One level in each equal quantile of a batch.
    one = np.sort(noise_levels(jax.random.key(0), 4, plain))
    assert np.all(np.diff(one) > 0) and one[0] < 0.34 and one[3] > 0.66


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_an_expert_sees_the_noise_levels_of_its_side_as_often_as_before(shift):
    draws, cut = range(200), 0.875
    of_all = np.concatenate([noise_levels(jax.random.key(i), 64, FlowSettings(shift=shift)) for i in draws])
    for sides, beyond in (({"lowest": cut}, of_all >= cut), ({"highest": cut}, of_all < cut)):
        settings = FlowSettings(shift=shift, **sides)
        levels = np.concatenate([noise_levels(jax.random.key(i), 64, settings) for i in draws])
        assert levels.min() > sides.get("lowest", 0) - 1e-6 and levels.max() < sides.get("highest", 1) + 1e-6
        expected = np.quantile(of_all[beyond], (0.1, 0.5, 0.9))
        np.testing.assert_allclose(np.quantile(levels, (0.1, 0.5, 0.9)), expected, atol=0.01)


def test_autoencoding_adds_its_parts():
    config = WanVAEConfig(
        base_dim=4, num_res_blocks=1, z_dim=4, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4, dim_mult=(1, 1, 1, 1)
    )
    vae = WanVAE(config, rngs=nnx.Rngs(0))
    batch = {"video": np.random.default_rng(0).integers(0, 256, (1, 5, 16, 16, 3), dtype=np.uint8)}
    key = jax.random.key(1)
    mean, log_variance = vae.encode(pixels(batch["video"]))
    latents = mean + jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape)
    error = np.asarray(vae.decode(latents, clip=False) - pixels(batch["video"]))
    divergence = 0.5 * np.mean(mean**2 + np.exp(log_variance) - 1 - log_variance)
    edges = np.abs(np.diff(error, axis=2)).mean() + np.abs(np.diff(error, axis=3)).mean()
    expected = 2 * np.abs(error).mean() + 3 * (error**2).mean() + 5 * edges + 7 * divergence
    weights = AutoencoderWeights(absolute=2.0, squared=3.0, edges=5.0, divergence=7.0)
    loss, metrics = autoencoding(vae, batch, key, weights)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["psnr"], 10 * np.log10(4 / np.mean(error**2)), rtol=1e-4)


def test_pixels_and_decibels():
    np.testing.assert_allclose(pixels(np.array([0, 255], np.uint8)), [-1, 1])
    np.testing.assert_allclose(decibels(jnp.asarray(0.04)), 20.0, rtol=1e-6)
