"""CoReDiT's loss against PyTorch autograd and its equations in NumPy, and the ramp of its numbers of skipped tokens."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_twins import (
    Masked,
    as_jax,
    batch_of,
    counted_mean,
    relative,
    told_levels,
    twin,
    use_rounded_frequencies,
    velocity,
)

from dit_jax.methods.coredit import Coredit
from dit_jax.methods.coredit_ratios import allocate, most_skipped, next_block, ramped
from dit_jax.models.network import Attended, NetworkCall
from dit_jax.sampling.schedules import shifted
from train.coredit_loss import (
    Compared,
    ComparedAttention,
    CoreditSettings,
    compared_blocks,
    coredit,
    gathered,
    sorted_coherence,
)
from train.losses import FlowSettings, noised

# One of two samples is at a level of the last steps, and no two tokens tie where the skipped ones end.
KEY = jax.random.key(24)
SETTINGS = CoreditSettings()
SKIPPED = {"wan": [20, 0, 11, 5], "flux": [7, 0, 4, 8, 2]}


@pytest.fixture(autouse=True)
def _frequencies(monkeypatch):
    use_rounded_frequencies(monkeypatch)


@partial(jax.jit, static_argnames="settings")
def ours(trained, frozen, batch, key, settings=SETTINGS):
    return jax.value_and_grad(coredit, has_aux=True)(trained, frozen, batch, key, settings=settings)


def given(kind, skipped):
    student, teacher = ({"student": twin(kind, 1).model}, {"teacher": twin(kind, 0).model})
    return student, teacher, as_jax(batch_of(kind)) | {"skipped": jnp.asarray(skipped, jnp.int32)}


def of_samples(skipped, levels):
    """[G, B]: a quarter, to the nearest token, where a run of shift 3 has its last quarter of steps."""
    late = np.asarray(levels) < 3 * 0.25 / (1 + 2 * 0.25)
    assert late.any() and not late.all()
    return np.where(late, np.rint(np.multiply(skipped, 0.25)[:, None]), np.asarray(skipped)[:, None]).astype(int)


def torch_outputs(kind, skipped, flow=SETTINGS.flow):
    """(velocity of the student, of the teacher, the true one, attention outputs of both)."""
    batch = batch_of(kind)
    at = noised(jnp.asarray(batch["latents"]), jax.random.split(KEY)[0], flow)
    noisy, truth = torch.tensor(np.asarray(at.latents)), np.asarray(at.velocity)
    levels = told_levels(at, noisy.shape)
    _, frames, rows, columns, _ = (1, *noisy.shape[1:])
    masked = Masked(grid=(frames, rows // 2, columns // 2), cells=(3, 2), skipped=of_samples(skipped, at.levels))
    with torch.no_grad():
        target, of_teacher = velocity(twin(kind, 0), noisy, levels, batch)
    found, of_student = velocity(twin(kind, 1), noisy, levels, batch, masked=masked)
    return found, target, torch.tensor(truth), of_student.attention, of_teacher.attention


@partial(jax.jit, static_argnames="ratios")
def gathering(student, teacher, batch, key, ratios):
    return gathered(student, teacher, batch, key, settings=SETTINGS, ratios=ratios)


@pytest.mark.parametrize("kind", SKIPPED)
def test_what_is_sampled_is_what_was_trained(kind):
    """Gathered as masked, in several ratios; with none the distance to the teacher is that of the loss."""
    student, teacher, batch = given(kind, [0] * len(SKIPPED[kind]))
    models = student["student"], teacher["teacher"]
    none = gathering(*models, batch, KEY, ratios=(0.0,) * len(SKIPPED[kind]))
    dense = ours(student, teacher, batch, KEY)[0][1]["loss_teacher"]
    assert none["gathered_error"] == 0
    assert relative(none["gathered_loss_teacher"], dense) <= 1e-5
    some = gathering(*models, batch, KEY, ratios=tuple(np.resize((0.4, 0.0, 0.2), len(SKIPPED[kind])).tolist()))
    assert 0 < some["gathered_error"] <= 1e-5
    assert relative(some["gathered_loss_teacher"], dense) > 1e-3


@pytest.mark.parametrize("kind", SKIPPED)
def test_values_and_gradients_are_pytorchs(kind):
    (loss, metrics), gradients = ours(*given(kind, SKIPPED[kind]), KEY)
    found, target, truth, student, teacher = torch_outputs(kind, SKIPPED[kind])
    distances = torch.stack([(student[block] - teacher[block]).square().mean() for block in student])
    expected = (found - truth).square().mean() + 0.5 * (found - target).square().mean() + 0.5 * distances.mean()
    expected.backward()
    assert relative(loss, expected.detach()) <= 1e-4
    assert relative(gradients["student"], twin(kind, 1).gradients()) <= 1e-4

    v, w, u = (each.detach().numpy().astype(np.float64) for each in (found, target, truth))
    outputs = [[of[block].detach().numpy().astype(np.float64) for block in sorted(of)] for of in (student, teacher)]
    slow = {
        "loss_data": np.mean((v - u) ** 2),
        "loss_teacher": np.mean((v - w) ** 2),
        "loss_attention": np.mean([np.mean((s - t) ** 2) for s, t in zip(*outputs, strict=True)]),
        "skipped_share": np.mean(SKIPPED[kind]) / outputs[0][0].shape[1],
        "skipped_by_block": np.divide(SKIPPED[kind], outputs[0][0].shape[1]),
    }
    assert set(slow) == set(metrics)
    for name, value in slow.items():
        assert relative(metrics[name], value) <= 1e-4, name

    # Other numbers, another program never; nothing skipped is the plain student.
    programs = ours._cache_size()
    (dense, _), _ = ours(*given(kind, np.zeros(len(student))), KEY)
    assert abs(dense - loss) > 1e-3 * loss and ours._cache_size() == programs
    found, target, truth, student, teacher = torch_outputs(kind, np.zeros(len(student), int))
    distances = torch.stack([(student[block] - teacher[block]).square().mean() for block in student])
    expected = (found - truth).square().mean() + 0.5 * (found - target).square().mean() + 0.5 * distances.mean()
    assert relative(dense, expected.detach()) <= 1e-4


def test_of_first_frames_that_are_held_attention_alone_is_compared():
    settings = replace(SETTINGS, flow=FlowSettings(first_frame_conditioning=0.5))
    (loss, metrics), gradients = ours(*given("wan", SKIPPED["wan"]), KEY, settings)
    found, target, truth, student, teacher = torch_outputs("wan", SKIPPED["wan"], settings.flow)
    held = noised(jnp.asarray(batch_of("wan")["latents"]), jax.random.split(KEY)[0], settings.flow).held
    of_data, of_teacher = (counted_mean((found - other).square(), held) for other in (truth, target))
    distances = torch.stack([(student[block] - teacher[block]).square().mean() for block in student])
    expected = of_data + 0.5 * of_teacher + 0.5 * distances.mean()
    expected.backward()
    assert relative(loss, expected.detach()) <= 1e-4
    assert relative(metrics["loss_data"], of_data.detach()) <= 1e-4
    assert relative(gradients["student"], twin("wan", 1).gradients()) <= 1e-4


def test_a_runs_last_steps_are_as_they_are_sampled():
    """The levels from which training skips a quarter are those of the sampler's last quarter of steps."""
    plan = Coredit(ratios=(0.5,), buckets=1)
    lattice = SETTINGS.lattice((1, 1, 64, 64, 4), (1, 2, 2))
    sampled = plan.skipped(lattice, 3, 20)[0]
    levels = shifted(np.linspace(1, 0, 20, endpoint=False), SETTINGS.flow.shift)
    trained = SETTINGS.skipped(jnp.asarray(sampled[0], jnp.int32), jnp.asarray(levels - 1e-6))
    np.testing.assert_array_equal(np.asarray(trained).T, sampled)
    assert sampled.min() * 4 == sampled.max() == 512


def test_a_student_that_is_its_teacher_and_skips_nothing_has_the_datas_loss_alone():
    _, frozen, batch = given("wan", np.zeros(4))
    (loss, metrics), _ = ours({"student": frozen["teacher"]}, frozen, batch, KEY)
    assert metrics["loss_teacher"] < 1e-10 and metrics["loss_attention"] < 1e-10
    assert relative(loss, metrics["loss_data"]) <= 1e-6


def test_recomputed_and_of_sampled_blocks():
    """All blocks but for rounding with remat; of two blocks, the mean over these."""
    trained, frozen, batch = given("wan", SKIPPED["wan"])
    remat = replace(SETTINGS, flow=FlowSettings(call=NetworkCall(remat="blocks")), sampled_blocks=2)
    (loss, metrics), gradients = ours(trained, frozen, batch, KEY, remat)
    places, count = compared_blocks(jax.random.split(KEY)[1], 4, 2)
    chosen = np.flatnonzero(np.asarray(places) < count)
    assert count == 2 and sorted(np.asarray(places)[chosen]) == [0, 1] and (np.sort(places)[2:] == 2).all()
    found, target, truth, student, teacher = torch_outputs("wan", SKIPPED["wan"])
    distances = torch.stack([(student[block] - teacher[block]).square().mean() for block in chosen.tolist()])
    expected = (found - truth).square().mean() + 0.5 * (found - target).square().mean() + 0.5 * distances.mean()
    expected.backward()
    assert relative(loss, expected.detach()) <= 1e-4
    assert relative(metrics["loss_attention"], distances.mean().detach()) <= 1e-4
    assert relative(gradients["student"], twin("wan", 1).gradients()) <= 1e-4


def test_attention_outputs_in_bf16_are_compared_in_fp32_and_without_padding():
    rng = np.random.default_rng(0)
    outputs, teacher = (jnp.asarray(rng.standard_normal((2, 3, 9, 5)), jnp.bfloat16) for _ in range(2))

    def given(attention, x, place, block, cache, aux):
        return Attended(outputs[block]), cache

    compared = ComparedAttention(given, tokens=7, count=2)
    aux = Compared(None, jnp.array([1, 2, 0]), jnp.concatenate([teacher, 100 * teacher[:1]]))
    total = jnp.float32(0)
    for block, of_teacher in ((0, 1), (1, None), (0, 1)):
        _, after = compared(None, None, None, block, total, aux)
        error = np.asarray(outputs[block], np.float64) - np.asarray(teacher[of_teacher or 0], np.float64)
        expected = 0 if of_teacher is None else np.mean(error[:, :7] ** 2)
        np.testing.assert_allclose(after - total, expected, rtol=1e-5)
        total = after


def test_the_ramp_goes_by_the_coherence_of_the_batch():
    trained, _, batch = given("wan", SKIPPED["wan"])
    found = np.asarray(jax.jit(partial(sorted_coherence, settings=SETTINGS))(trained["student"], batch, KEY))
    told = batch_of("wan")
    at = noised(batch["latents"], jax.random.split(KEY)[0], SETTINGS.flow)
    recorded = []

    class Recording(Masked):
        def begin(self, x, block):
            kept = super().begin(x, block)
            free = ~self._protected(block)
            falling = np.sort(self.coherence.detach().numpy()[:, free], axis=1)[:, ::-1].mean(axis=0)
            recorded.append(np.pad(falling, (0, (~free).sum())))
            return kept

    masked = Recording(grid=(3, 3, 5), cells=(3, 2), skipped=of_samples(SKIPPED["wan"], at.levels))
    with torch.no_grad():
        velocity(twin("wan", 1), torch.tensor(np.asarray(at.latents)), np.asarray(at.levels), told, masked=masked)
    np.testing.assert_allclose(found, recorded, atol=1e-5)


def test_a_turn_of_the_ramp():
    rng = np.random.default_rng(0)
    coherence = -np.sort(-rng.uniform(0, 1, (3, 640)), axis=1) * np.array([[1], [1.2], [0.5]])
    skipped = np.array([100, 300, 0])
    gains = [coherence[block, skip : skip + 64].sum() for block, skip in enumerate(skipped)]
    turned = ramped(coherence, skipped, 0.45, 384, more=64)
    assert turned.sum() == skipped.sum() + 64 and turned[np.argmax(gains)] == skipped[np.argmax(gains)] + 64
    assert skipped.tolist() == [100, 300, 0], "what is given stays as it was"
    while (again := ramped(coherence, skipped, 0.45, 384, more=64)).sum() > skipped.sum():
        assert next_block(coherence, skipped, int((again - skipped).sum()), 384) == np.argmax(again - skipped)
        skipped = again
    assert skipped.sum() == round(0.45 * 640 * 3) and skipped.max() <= 384
    np.testing.assert_array_equal(ramped(coherence, skipped, 0.3, 384), skipped)
    assert allocate(coherence, 0.3, 384).sum() == 576 and allocate(coherence, 0.6, 380).tolist() == [380] * 3
    lattice = SETTINGS.lattice((1, 1, 128, 128, 4), (1, 2, 2))
    assert most_skipped(lattice) == int(0.6 * 4096)
