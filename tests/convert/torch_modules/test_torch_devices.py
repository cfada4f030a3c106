"""What methods add to a transformer follows it to another device: here to `meta`, which every machine has."""

import accelerate
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch_models import BLOCKS, inputs

from convert.torch_modules.ddit import PatchSizes
from convert.torch_modules.pare import load_router, load_transformer, route

KINDS = pytest.mark.parametrize("written", ["text-to-video", "flux"], indirect=True)
CPU, META = torch.device("cpu"), torch.device("meta")


class OneDevice(TorchDispatchMode):
    """As on a GPU: an operation's tensors are on one device, but for copies and numbers."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if "copy" not in operation.name():
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.ndim]
            assert len({tensor.device for tensor in tensors}) <= 1, operation.name()
        return operation(*args, **(kwargs or {}))


@pytest.fixture
def moved(monkeypatch):
    """Runs a transformer on a device. What is read from `meta` says t = 500, 4x4 tokens, all gates open."""

    def real(name, instead):
        plain = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda x: instead(x) if x.is_meta else plain(x))

    real("__float__", lambda x: 500.0)
    real("__int__", lambda x: 3)
    real("cpu", lambda x: torch.ones(x.shape, dtype=x.dtype))

    def run(kind, model, device):
        told = {name: value.to(device) for name, value in inputs(kind, 4, 4, dtype=model.dtype).items()}
        with torch.no_grad(), OneDevice():
            (found,) = model(**told, return_dict=False)
        assert (found.shape, found.device) == (told["hidden_states"].shape, device)
        return found

    return run


def by_hand(model):
    model.to(META)


def by_accelerate(model):
    """As `enable_model_cpu_offload` does: the transformer moves when it is called, after all hooks."""
    accelerate.cpu_offload_with_hook(model, META)


MOVES = pytest.mark.parametrize("move", [by_hand, by_accelerate])


@KINDS
@MOVES
def test_a_router_follows_the_inputs(written, moved, move):
    model = load_transformer(written.folder / "transformer")
    routing = route(model, load_router(written.folder / "methods/router"), 2, 4)
    moved(written.kind, model, CPU)
    assert routing.gates.sum() < BLOCKS
    move(model)
    moved(written.kind, model, META)
    assert routing.router.up.weight.is_meta and routing.router.up.weight.dtype == torch.float32


@KINDS
@MOVES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_follow_the_inputs(written, moved, move, dtype):
    model = load_transformer(written.folder / "transformer", dtype)
    scales = [4, 2, 1, 4, 1]
    sizes = PatchSizes(model, written.folder / "methods/ddit", lambda *_: scales[len(sizes.used)])
    moved(written.kind, model, CPU)
    move(model)
    for _ in scales[1:]:
        moved(written.kind, model, META)
    assert sizes.used == scales
    assert {w.dtype for pair in sizes.low_rank.values() for w in pair} == {dtype}
    assert {w.dtype for of in sizes.residual.values() for w in of.values()} == {torch.float32}


@KINDS
def test_sizes_run_where_layers_are_loaded_one_by_one(written, moved):
    """As `enable_sequential_cpu_offload` does: the base's layers are empty but while they run."""
    scales = [2, 1, 2]

    def run(offload):
        model = load_transformer(written.folder / "transformer")
        sizes = PatchSizes(model, written.folder / "methods/ddit", lambda *_: scales[len(sizes.used)])
        if offload:
            accelerate.cpu_offload(model, CPU, offload_buffers=True)
        return [moved(written.kind, model, CPU) for _ in scales]

    for found, expected in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
