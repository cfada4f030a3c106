"""PARE's losses against PyTorch autograd and against their equations in NumPy."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_twins import (
    as_jax,
    batch_of,
    counted_mean,
    gradients_of,
    relative,
    router_gates,
    router_of,
    told_levels,
    torch_leaves,
    twin,
    use_rounded_frequencies,
    velocity,
)

from dit_jax.methods.routing import Routing, budget, straight_through_gates, top_gates
from dit_jax.models.network import NetworkCall
from train.losses import FlowSettings, noised
from train.pare_loss import IMAGE_TO_VIDEO, TEXT_TO_VIDEO, PareSettings, drawn_blocks, feature_distance, pare

KEY = jax.random.key(3)
SETTINGS = PareSettings(sampled_blocks=2, outliers=1.0, routing=Routing(least=2, most=4))


@pytest.fixture(autouse=True)
def _frequencies(monkeypatch):
    use_rounded_frequencies(monkeypatch)


@partial(jax.jit, static_argnames="settings")
def ours(trained, frozen, batch, key, settings):
    return jax.value_and_grad(pare, has_aux=True)(trained, frozen, batch, key, settings=settings)


def torch_terms(kind, student, teacher, batch, leaves=None, flow=SETTINGS.flow):
    """The terms in torch, the velocities and gates that they are of, and the samples whose first frame is held."""
    at = noised(jnp.asarray(batch["latents"]), jax.random.split(KEY)[0], flow)
    taps = np.asarray(drawn_blocks(jax.random.split(KEY)[1], len(student.blocks), SETTINGS.sampled_blocks))
    noisy, levels, truth = (np.asarray(each) for each in (at.latents, at.levels, at.velocity))
    gates = None if leaves is None else router_gates(leaves, kind, noisy, levels, batch, (2, 4))
    told = told_levels(at, noisy.shape)
    with torch.no_grad():
        target, of_teacher = velocity(teacher, torch.tensor(noisy), told, batch)
    found, of_student = velocity(student, torch.tensor(noisy), told, batch, gates)
    of_blocks, runs = [], []
    for tap in taps.tolist():
        theirs = of_teacher.outputs[tap]
        norm = theirs.norm(dim=-1)
        usual = norm <= norm.mean(1, keepdim=True) + SETTINGS.outliers * norm.std(1, keepdim=True, correction=0)
        assert 0 < (~usual).sum() < usual.numel()
        error = (of_student.outputs[tap] - theirs).square().mean(-1)
        of_blocks.append((error * usual).sum(1) / usual.sum(1))
        runs.append(torch.ones(len(noisy)) if gates is None else gates[:, tap].detach())
    of_blocks, runs = torch.stack(of_blocks), torch.stack(runs)
    terms = {
        "loss_features": (of_blocks * runs).sum() / runs.sum().clamp(min=1),
        "loss_teacher": counted_mean((found - target).square(), at.held),
        "loss_data": counted_mean((found - torch.tensor(truth)).square(), at.held),
    }
    if kind != "flux":
        terms["loss_motion"] = counted_mean((found.diff(dim=1) - target.diff(dim=1)).square(), at.held)
    return terms, found, target, truth, gates, at.held


def slow_terms(found, target, truth, held):
    """Terms of the velocities, in NumPy."""
    found, target = found.detach().numpy().astype(np.float64), target.numpy().astype(np.float64)
    errors = {"loss_teacher": (found - target) ** 2, "loss_data": (found - truth) ** 2}
    if found.shape[1] > 1:
        errors["loss_motion"] = ((found[:, 1:] - found[:, :-1]) - (target[:, 1:] - target[:, :-1])) ** 2
    return {name: counted_mean(error, held) for name, error in errors.items()}


WEIGHTS = {"loss_features": 10, "loss_teacher": 6, "loss_data": 1}


@pytest.mark.parametrize(
    ("kind", "routed", "share"),
    [("wan", False, 0), ("wan", True, 0), ("wan", True, 0.5), ("flux", True, 0),
     *(pytest.param(*case, marks=pytest.mark.long)
       for case in (("flux", False, 0), ("wan-i2v", False, 0), ("wan-i2v", True, 0)))],
)  # fmt: skip
def test_values_and_gradients_are_pytorchs(kind, routed, share):
    student, teacher, batch = twin(kind, 1, narrower=5), twin(kind, 0), batch_of(kind)
    weights = IMAGE_TO_VIDEO if kind == "wan-i2v" else TEXT_TO_VIDEO
    trained = {"student": student.model} | ({"router": router_of(kind)} if routed else {})
    settings = replace(SETTINGS, weights=weights, flow=FlowSettings(first_frame_conditioning=share))
    (loss, metrics), gradients = ours(trained, {"teacher": teacher.model}, as_jax(batch), KEY, settings)

    leaves = torch_leaves(router_of(kind)) if routed else None
    terms, found, target, truth, gates, held = torch_terms(kind, student, teacher, batch, leaves, settings.flow)
    assert (held is not None) == (share > 0)
    scales = WEIGHTS | {"loss_motion": 4 if kind == "wan-i2v" else 8}
    expected = sum(scales[name] * term for name, term in terms.items())
    expected.backward()
    assert relative(loss, expected.detach()) <= 1e-4
    for name, value in slow_terms(found, target, truth, held).items():
        assert relative(metrics[name], value) <= 1e-4, name
    assert relative(metrics["loss_features"], terms["loss_features"].detach()) <= 1e-4
    assert set(metrics) == set(terms) | ({"active_blocks", "active_by_block"} if routed else set())
    assert relative(gradients["student"], student.gradients()) <= 1e-4
    if routed:
        assert relative(gradients["router"], gradients_of(leaves)) <= 1e-4
        assert relative(metrics["active_blocks"], gates.detach().sum(1).mean()) <= 1e-6
        assert relative(metrics["active_by_block"], gates.detach().mean(0)) <= 1e-6
        assert gates.detach().min() == 0, "all blocks run: no test of gates"


@pytest.mark.parametrize("active", [None, "some", "none"])
def test_features_are_of_usual_tokens_of_active_blocks(active):
    rng = np.random.default_rng(0)
    student, teacher = rng.standard_normal((2, 3, 2, 9, 5)).astype(np.float32)
    teacher[1, 0, 4] *= 30
    teacher[:, :, 7:] = 1e4  # padding
    runs = {None: np.ones((3, 2)), "some": np.array([[1, 0], [0, 1], [0, 0]]), "none": np.zeros((3, 2))}[active]
    total, outliers = 0.0, 0
    for block, sample in np.argwhere(runs):
        t, s = teacher[block, sample, :7].astype(np.float64), student[block, sample, :7]
        norms = np.linalg.norm(t, axis=-1)
        usual = norms <= norms.mean() + 2 * norms.std()
        outliers += (~usual).sum()
        total += np.mean((t[usual] - s[usual]) ** 2)
    given = None if active is None else jnp.asarray(runs, jnp.float32)
    found = jax.jit(partial(feature_distance, tokens=7, outliers=2.0))(student, teacher, runs_PB=given)
    np.testing.assert_allclose(found, total / max(runs.sum(), 1), rtol=1e-5)
    assert (outliers > 0) == (active is None), "the token of the large norm lies in a block that is not always active"


def test_features_in_bf16_are_compared_in_fp32():
    rng = np.random.default_rng(1)
    outputs = (
        rng.standard_normal((2, 9, 5)) + np.array([0, 0.01])[:, None, None, None, None] + rng.normal(size=(3, 2, 9, 5))
    )
    student, teacher = (jnp.asarray(each, jnp.bfloat16) for each in outputs)
    exact, target = (np.asarray(each, np.float64) for each in (student, teacher))
    found = feature_distance(student, teacher, tokens=9, outliers=99.0)
    np.testing.assert_allclose(found, np.mean((exact - target) ** 2), rtol=1e-5)


def test_a_router_with_all_blocks_on_is_stage_1():
    student, teacher, batch = twin("wan", 1, narrower=5).model, twin("wan", 0).model, as_jax(batch_of("wan"))
    plain, gradients = ours({"student": student}, {"teacher": teacher}, batch, KEY, SETTINGS)
    on = replace(SETTINGS, routing=Routing(least=4, most=4))
    trained = {"student": student, "router": router_of("wan")}
    routed, with_router = ours(trained, {"teacher": teacher}, batch, KEY, on)
    assert relative(routed[0], plain[0]) <= 1e-6
    assert relative(with_router["student"], gradients["student"]) <= 1e-6
    # Another key draws other blocks, levels and noise, and compiles nothing.
    programs = ours._cache_size()
    other, _ = ours({"student": student}, {"teacher": teacher}, batch, jax.random.key(9), SETTINGS)
    assert relative(other[0], plain[0]) > 1e-3 and ours._cache_size() == programs
    # The teacher itself as student: nothing is left but the data's term, and no gradient but its.
    (loss, metrics), _ = ours({"student": teacher}, {"teacher": teacher}, batch, KEY, SETTINGS)
    assert all(metrics[name] < 1e-12 for name in ("loss_features", "loss_teacher", "loss_motion"))
    assert relative(loss, metrics["loss_data"]) <= 1e-6


def test_recomputing_blocks_changes_nothing():
    trained, frozen = {"student": twin("wan", 1, narrower=5).model}, {"teacher": twin("wan", 0).model}
    batch = as_jax(batch_of("wan"))
    plain, gradients = ours(trained, frozen, batch, KEY, SETTINGS)
    remat = replace(SETTINGS, flow=FlowSettings(call=NetworkCall(remat="blocks")))
    again, recomputed = ours(trained, frozen, batch, KEY, remat)
    assert relative(again[0], plain[0]) <= 1e-6 and relative(recomputed, gradients) <= 1e-5


def test_gates_have_the_hard_values_and_the_sigmoids_slope():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((64, 9)), jnp.float32) * 3
    count = budget(jnp.linspace(0, 1000, 64), 3, 8)[:, None]
    gates = straight_through_gates(logits, count)
    np.testing.assert_array_equal(gates, top_gates(logits, count))
    np.testing.assert_array_equal(gates.sum(1), count[:, 0])
    slope = jax.grad(lambda r: jnp.sum(straight_through_gates(r, count) * jnp.arange(9)))(logits)
    soft = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    np.testing.assert_allclose(slope[:, 1:-1], (soft * (1 - soft) * np.arange(9))[:, 1:-1], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(slope[:, [0, -1]], 0)
