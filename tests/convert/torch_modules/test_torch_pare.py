"""Pruned students and routers in PyTorch against this project's own runs."""

import json

import numpy as np
import pytest
import torch
from torch_models import BLOCKS, KEPT, inputs, relative, transformer

from convert.torch_modules.pare import Router, load_router, load_transformer, route
from dit_jax.methods.routing import RecordedRouting


class Gates:
    """Keeps the gates of every step [S, B, G]."""

    def around(self, denoiser, run):
        return RecordedRouting(denoiser=denoiser, steps=run.steps)

    def finished(self, component, state):
        self.gates = np.asarray(state.gates) > 0


@pytest.mark.parametrize("steps", [1, 4])
def test_a_pruned_student_is_the_same_in_diffusers(written, steps):
    theirs = written.by_diffusers(written.theirs(), steps)
    assert relative(written.by_ours("dense", steps), theirs) <= 1e-4


def test_a_pruned_student_is_saved_and_loaded_by_torch_alone(written, tmp_path):
    model = load_transformer(written.folder / "transformer")
    model.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    assert json.loads((tmp_path / "saved/config.json").read_text())["pruned"]["heads"] == KEPT
    again = load_transformer(tmp_path / "saved")
    assert all(torch.equal(again.state_dict()[key], weight) for key, weight in model.state_dict().items())


def test_weights_are_cast_but_for_those_that_diffusers_keeps(written):
    model = load_transformer(written.folder / "transformer", torch.bfloat16)
    dtypes = {key: weight.dtype for key, weight in model.state_dict().items()}
    exact = [key for key, dtype in dtypes.items() if dtype == torch.float32]
    assert bool(exact) == (written.kind != "flux") and all(
        "time_embedder" in k or "norm" in k or "table" in k for k in exact
    )


@pytest.mark.parametrize(("steps", "guided"), [(1, False), (4, True)])
def test_samples_run_the_blocks_that_they_choose_and_no_others(written, steps, guided):
    pipeline, count, calls = written.theirs(), 2, 2 if guided else 1
    model = pipeline.transformer
    index, block = (3, model.single_transformer_blocks[1]) if written.kind == "flux" else (1, model.blocks[1])
    ran = []
    (block.attn if written.kind == "flux" else block.attn1).register_forward_hook(lambda *_: ran.append(index))
    routing = route(model, load_router(written.folder / "methods/router"), 2, 4, branches=calls)
    found = []
    model.register_forward_hook(lambda *_: found.append(routing.gates.numpy()))
    watch = Gates()
    ours = written.by_ours("routing:min=2:max=4", steps, count, guided, watch=watch)
    assert relative(ours, written.by_diffusers(pipeline, steps, count, guided)) <= 1e-4
    for branch in range(calls):
        np.testing.assert_array_equal(np.stack(found)[branch::calls], watch.gates)
    assert watch.gates.sum(-1).max() < BLOCKS
    assert len(ran) == calls * watch.gates[:, :, index].any(axis=1).sum()
    if steps > 1 and not written.has_image:  # there both have one image
        assert (watch.gates[:, 0] != watch.gates[:, 1]).any()


def test_all_blocks_are_the_plain_model(written):
    pipeline = written.theirs()
    plain = written.by_diffusers(pipeline, 1)
    route(pipeline.transformer, load_router(written.folder / "methods/router"), BLOCKS, BLOCKS)
    np.testing.assert_array_equal(written.by_diffusers(pipeline, 1), plain)


@pytest.mark.parametrize("kind", ["text-to-video", "flux"])
def test_blocks_that_are_checkpointed_are_routed_alike(kind):
    def trained(checkpointing):
        model = transformer(kind).train()
        torch.manual_seed(3)
        routing = route(model, Router("none", 0, BLOCKS), 3, 3)
        if checkpointing:
            model.enable_gradient_checkpointing()
        told = inputs(kind, 3, 4, count=2)
        # One block runs for one sample alone, and another for none.
        routing.router.forward = lambda *_: torch.tensor([[0.0, 1, 3, 2, 0], [0, 1, 2, 3, 0]])
        (velocity,) = model(**told, return_dict=False)
        velocity.square().mean().backward()
        ran = [parameter.grad is not None for parameter in model.parameters()]
        assert any(ran) and not all(ran)
        return velocity.detach(), {name: w.grad for name, w in model.named_parameters() if w.grad is not None}

    torch.testing.assert_close(trained(True), trained(False), rtol=1e-6, atol=1e-7)
