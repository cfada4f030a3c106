"""Models cut to fewer heads and neurons: against the full ones in which what is gone is zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoints import model_folder

from convert.checkpoint import load_model, open_checkpoint
from convert.transfer import convert
from convert.widths import with_widths
from dit_jax.methods.pruning import Widths, attentions, mlps
from dit_jax.models.network import Conditioning, NetworkCall, layout, network
from dit_jax.parameters import leaf_name, named_leaves
from dit_jax.sharding import logical_axes

NAMES = ("wan", "wan-image", "flux-dev")


def some_widths(config, heads, neurons):
    """Another choice in every block."""
    rng = np.random.default_rng(0)

    def choice(blocks, size, count):
        return np.stack([np.sort(rng.permutation(size)[:count]) for _ in range(blocks)])

    kept = {}
    for modules, blocks in attentions(config).items():
        kept |= dict.fromkeys(modules, choice(blocks, config.heads, heads))
    stack = {"blocks": getattr(config, "blocks", 0), "double": getattr(config, "double_blocks", 0)}
    stack["single"] = getattr(config, "single_blocks", 0)
    chosen = {module: choice(stack[module.split(".")[0]], config.mlp_width, neurons) for module in mlps(config)}
    return Widths(heads=kept, neurons=chosen)


def zeroed(model, axes, widths):
    """The full model with zeros where the narrow one has nothing."""
    groups = {"heads": widths.heads, "mlp": widths.neurons}

    def masked(path, leaf):
        name = leaf_name(path)
        logical = logical_axes(name, axes)
        for axis, of_modules in groups.items():
            for module, kept in of_modules.items():
                if name.startswith(module + ".") and axis in logical:
                    place = logical.index(axis)
                    mask = np.zeros((leaf.shape[0], leaf.shape[place]), np.float32)
                    np.put_along_axis(mask, kept, 1, axis=1)
                    shape = [size if i in (0, place) else 1 for i, size in enumerate(leaf.shape)]
                    return leaf * mask.reshape(shape)
        return leaf

    return jax.tree_util.tree_map_with_path(masked, model)


@jax.jit
def velocity(model, latents, t, told):
    return network(model, NetworkCall(), layout(latents, model.config.patch), t, told)[0]


def output(model):
    config, rng = model.config, np.random.default_rng(1)
    frames = 1 if hasattr(config, "guidance") else 2
    latents = rng.standard_normal((2, frames, 6, 4, config.in_channels)).astype(np.float32)
    text = rng.standard_normal((2, 5, config.text_width)).astype(np.float32)
    image = getattr(config, "image_width", None)
    told = Conditioning(
        jnp.asarray(text),
        image=jnp.asarray(rng.standard_normal((2, 3, image)), jnp.float32) if image else None,
        pooled=jnp.asarray(rng.standard_normal((2, getattr(config, "pooled_width", 1))), jnp.float32),
        guidance=jnp.asarray([1.0, 3.5]),
    )
    return np.asarray(velocity(model, jnp.asarray(latents), jnp.asarray([999.0, 271.0]), told))


@pytest.mark.parametrize("name", NAMES)
def test_a_narrow_model_equals_the_full_one_with_zeros(name, tmp_path):
    source = open_checkpoint(model_folder(tmp_path / "full", name))
    component = source.component("")
    widths = some_widths(component.config, 1, 13)
    narrow = with_widths(source, {"": widths}, norm_counts_pruned=True)
    convert(narrow, tmp_path / "narrow", "diffusers")
    found = load_model(tmp_path / "narrow")
    assert (found.config.heads, found.config.mlp_width) == (1, 13)
    expected = output(zeroed(load_model(source), component.axes, widths))
    assert np.linalg.norm(output(found) - expected) <= 1e-5 * np.linalg.norm(expected)
    # Without being written, and as a native checkpoint: the same weights.
    convert(narrow, tmp_path / "native", "native")
    for place in (narrow, tmp_path / "native"):
        again = dict(named_leaves(load_model(place)))
        assert all(np.array_equal(leaf, again[leaf_path]) for leaf_path, leaf in named_leaves(found))


@pytest.mark.parametrize("name", NAMES)
def test_all_widths_are_the_same_model(name, tmp_path):
    source = open_checkpoint(model_folder(tmp_path / "full", name))
    config = source.component("").config
    everything = some_widths(config, config.heads, config.mlp_width)
    convert(with_widths(source, {"": everything}, norm_counts_pruned=True), tmp_path / "same", "diffusers")
    full = dict(named_leaves(load_model(source)))
    for path, leaf in named_leaves(load_model(tmp_path / "same")):
        np.testing.assert_array_equal(leaf, full[path])
    assert open_checkpoint(tmp_path / "same").component("").config == config


def test_a_model_that_was_pruned_is_pruned_again(tmp_path):
    source = open_checkpoint(model_folder(tmp_path / "full", "wan"))
    config = source.component("").config
    first = with_widths(source, {"": some_widths(config, 1, config.mlp_width)}, norm_counts_pruned=False)
    second = with_widths(first, {"": some_widths(first.component("").config, 1, 7)}, norm_counts_pruned=True)
    assert not second.component("").config.norm_counts_pruned
    convert(second, tmp_path / "narrow", "diffusers")
    found = load_model(tmp_path / "narrow").config
    assert (found.heads, found.mlp_width) == (1, 7)
