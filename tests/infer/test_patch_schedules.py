"""Plans with DDiT in whole pipelines: which size runs when, what compiles, and what does not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beside_diffusers import FRAMES, PROMPT, relative, starting_noise
from tiny_flux import pipeline as flux_pipeline

from dit_jax.config import UserError
from dit_jax.methods.patch_adapters import AdapterSettings, abstract_adapters, part_of
from infer.adapt import main as adapt
from infer.loading import load_pipeline
from infer.request import Request

SIZE, STEPS = (48, 32), 7
SETTINGS = AdapterSettings(rank=3, residual_channels=5)
SHORT = dict(size=SIZE, frames=FRAMES, steps=STEPS, guidance=3.0)


def random_part(config):
    rng = np.random.default_rng(7)

    def fill(leaf):
        fan_in = np.prod(leaf.shape[1:-1]) if leaf.ndim > 2 else leaf.shape[0] if leaf.ndim == 2 else 4
        return jnp.asarray(rng.standard_normal(leaf.shape) / fan_in**0.5, jnp.float32)

    return part_of(jax.tree.map(fill, abstract_adapters(config, SETTINGS)), SETTINGS)


@pytest.fixture(scope="module")
def pipe(text_to_video):
    loaded = load_pipeline(text_to_video[0])
    loaded.parts["transformer"]["ddit"] = random_part(loaded.transformer_config)
    return loaded


def denoised(pipe, prompt=PROMPT, **options):
    """(final latents, sizes by step, what they were chosen by)."""
    told = []
    job = pipe.prepare(Request(prompt=prompt, **SHORT | options))
    latents = pipe.denoise(job, chosen=lambda *choice: told.append(choice))
    steps, sizes, values = zip(*told, strict=True) if told else ((), (), ())
    assert not told or len(steps) % len(set(steps)) == 0
    return latents, list(sizes), values


@pytest.fixture
def compiled():
    """Names of what has been compiled since."""
    events = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: events.append(event) if event.endswith("backend_compile_duration") else None
    )
    return events


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_the_base_size_throughout_is_the_dense_run(pipe, solver):
    dense, none, _ = denoised(pipe, seed=1, solver=solver)
    latents, sizes, values = denoised(pipe, seed=1, solver=solver, plan="ddit:tau=0")
    np.testing.assert_array_equal(latents, dense)
    assert none == [] and sizes == [1] * STEPS
    assert all(np.isinf(values[step]).all() == (step < 3) for step in range(STEPS))


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_choices_that_are_repeated_as_a_fixed_schedule_give_the_same(pipe, solver):
    latents, sizes, values = denoised(pipe, seed=1, solver=solver, plan="ddit:tau=1e9")
    assert sizes == [1, 1, 1, 4, 4, 4, 4]
    fixed, again, _ = denoised(pipe, seed=1, solver=solver, plan="ddit:4p@3-6")
    assert again == [1, 4]  # asked where it may change
    np.testing.assert_allclose(fixed, latents, atol=1e-6)
    assert relative(latents, denoised(pipe, seed=1, solver=solver)[0]) > 1e-2
    # A threshold between the values of the two sizes, seen at the first step that is chosen for.
    small, large = values[3]
    between = denoised(pipe, seed=1, solver=solver, plan=f"ddit:tau={(small + large) / 2}")[1][3]
    assert between == (2 if small < large else 4)


def test_nothing_compiles_after_the_first_request(pipe, compiled):
    denoised(pipe, plan="ddit:tau=0")
    known = len(pipe.programs)
    compiled.clear()
    sizes = set()
    for seed, tau in enumerate(("1e9", "0.05", "0.5", "0")):
        sizes |= set(denoised(pipe, "the dog sleeps", seed=seed, plan=f"ddit:tau={tau}:rho=0.{seed + 1}")[1])
    assert {1, 4} <= sizes
    assert len(pipe.programs) == known
    assert compiled == []
    denoised(pipe, size=(32, 32))
    assert compiled, "a new shape must be seen to compile, or the count means nothing"


def test_a_batch_is_split_where_latents_choose(pipe):
    prompts, noise = [PROMPT, "the dog sleeps"], np.concatenate([starting_noise(), 5 * starting_noise()])
    progress = []
    job = pipe.prepare(Request(prompt=prompts, latents=noise, plan="ddit:tau=1e9", **SHORT))
    together = pipe.denoise(job, progress=lambda *done: progress.append(done))
    for index in range(2):
        alone = denoised(pipe, prompts[index], latents=noise[index : index + 1], plan="ddit:tau=1e9")[0]
        np.testing.assert_array_equal(together[index : index + 1], alone)
    steps = [done for _, done, total in progress if total == 2 * STEPS]
    assert steps == sorted(steps) and steps[-1] == 2 * STEPS
    # Sizes known beforehand need no split.
    fixed = denoised(pipe, prompts, latents=noise, plan="ddit:4p@3-6")
    np.testing.assert_allclose(fixed[0], together, atol=1e-4)


def test_seeds_of_a_split_batch_are_those_of_its_samples(pipe):
    together = denoised(pipe, [PROMPT, PROMPT], seed=5, plan="ddit:tau=1e9")[0]
    np.testing.assert_array_equal(together[1:], denoised(pipe, seed=6, plan="ddit:tau=1e9")[0])


def test_the_difference_begins_anew_with_an_expert(text_experts):
    pipe = load_pipeline(text_experts[0])
    for parts in pipe.parts.values():
        parts["ddit"] = random_part(pipe.transformer_config)
    steps = 10
    crossing = int(
        np.count_nonzero(
            pipe.schedule(pipe.prepare(Request(prompt=PROMPT, **SHORT | {"steps": steps}))).timesteps >= 875
        )
    )
    assert 3 < crossing < steps - 3
    sizes = denoised(pipe, steps=steps, plan="ddit:tau=1e9")[1]
    expected = [1, 1, 1] + [4] * (crossing - 3) + [1, 1, 1] + [4] * (steps - crossing - 3)
    assert sizes == expected


@pytest.mark.parametrize("backbone", ["wan", "flux"])
def test_adapters_that_are_attached_run_with_and_without_a_router(backbone, text_to_video, tmp_path):
    source = text_to_video[0]
    if backbone == "flux":
        source = tmp_path / "tiny-flux"
        flux_pipeline(dev=True).save_pretrained(source)
    added = ["--add", "ddit", "--add", "router"]
    assert adapt(["--model", str(source), *added, "--out", str(tmp_path / "adapted")]) == 0
    pipe = load_pipeline(tmp_path / "adapted")
    short = SHORT | dict(frames=FRAMES if backbone == "wan" else 1, steps=2)
    latents, sizes, _ = denoised(pipe, plan="ddit:4p@0-1", **short)
    assert sizes == [4] and np.isfinite(latents).all()
    routed = denoised(pipe, plan="ddit:4p@0-1+routing:min=2:max=2", **short)[0]
    assert np.isfinite(routed).all() and relative(routed, latents) > 1e-3


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        ("ddit", "adapters for patches of 2p and 4p, which this model has not"),
        ("ddit:4p@0-6", "patches of 4p, which this model has not: attach untrained ones with `dit-adapt --add ddit`"),
    ],
)
def test_a_model_without_adapters_is_refused_before_anything_compiles(text_to_video, plan, told):
    pipe = load_pipeline(text_to_video[0])
    with pytest.raises(UserError, match=told):
        pipe(PROMPT, **SHORT, plan=plan)
    assert len(pipe.programs) == 0


def test_a_schedule_beyond_the_last_step_is_refused(pipe):
    with pytest.raises(UserError, match="4p is to run until step 9, the last of 7 steps is 6"):
        denoised(pipe, plan="ddit:4p@3-9")
