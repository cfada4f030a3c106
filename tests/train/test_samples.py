"""What samples on the way are drawn with."""

import jax
import jax.numpy as jnp
import numpy as np

from convert.wan import HIGH_NOISE
from dit_jax.parameters import named_leaves
from infer import load_pipeline
from train.models import Source
from train.placement import training_mesh
from train.recipes import finetune, step_distill
from train.samples import Samples, SampleSettings
from train.step import TrainStep, of_modules


def test_a_lora_is_in_the_weights_that_samples_are_drawn_with(tmp_path):
    mesh = training_mesh()
    training = finetune.training(finetune.Config(lora=2, dtype="float32"), Source("demo-wan", mesh))
    step = TrainStep(training.trained, training.plan, mesh, training.frozen)
    state, pipe = step.init(training.trained), load_pipeline("demo-wan", mesh=mesh, dtype=jnp.float32)
    samples = Samples(out=tmp_path, settings=SampleSettings(), step=step, pipe=pipe, result=training.result)
    own = {name: np.asarray(leaf) for name, leaf in named_leaves(pipe.transformer)}
    # Two looks: the second starts from the checkpoint's weights again.
    for seed in (0, 1):
        keys = dict(zip(state.ema, jax.random.split(jax.random.key(seed), len(state.ema)), strict=True))
        mean = {name: 0.1 * jax.random.normal(keys[name], leaf.shape) for name, leaf in state.ema.items()}
        mean = {name: jax.device_put(leaf, state.ema[name].sharding) for name, leaf in mean.items()}
        assert samples(state._replace(ema=mean), 1) == {}
        exported = training.result(pipe.checkpoint, of_modules(mean)).leaves(HIGH_NOISE)
        different = set()
        for name, leaf in named_leaves(pipe.transformer):
            np.testing.assert_array_equal(leaf, exported[name].rectangle(None).astype(np.float32))
            different |= {name} if np.any(leaf != own[name]) else set()
        assert different == {name.removeprefix("lora.").rpartition(".")[0] for name in state.ema}


def test_a_student_is_sampled_as_its_checkpoint_will_be(tmp_path):
    mesh = training_mesh()
    training = step_distill.training(step_distill.Config(dtype="float32"), Source("demo-wan", mesh))
    step = TrainStep(training.trained, training.plan, mesh, training.frozen)
    state, pipe = step.init(training.trained), load_pipeline("demo-wan", mesh=mesh, dtype=jnp.float32)
    assert (pipe.defaults.steps, pipe.defaults.solver, pipe.shift.constant) == (30, "unipc", 3.0)
    seen = []

    def result(checkpoint, modules):
        seen.extend(modules)
        return training.result(checkpoint, modules)

    assert Samples(out=tmp_path, settings=SampleSettings(), step=step, pipe=pipe, result=result)(state, 1) == {}
    defaults = pipe.defaults
    assert (defaults.steps, defaults.guidance, defaults.solver, pipe.shift.constant) == (4, 1.0, "renoise", 5.0)
    assert seen == ["student"], "the fake score, as large as the model, is for nothing here"
