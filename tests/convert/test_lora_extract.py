"""Students as the LoRA nearest to what they learnt, against exact singular values."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from convert.cache import Cache, with_cached_weights
from convert.checkpoint import checkpoint_hash, load_model, open_checkpoint
from convert.cli import main
from convert.leaves import Leaf
from convert.lora import read_lora
from convert.lora_keys import Target
from convert.transfer import convert
from dit_jax.lora import merged
from dit_jax.parameters import named_leaves

LAYOUTS = {"diffusers": "to-torch", "native": "to-jax"}
LORA = "transformer_lora.safetensors"


def with_weights(checkpoint, change):
    """A pipeline with other weights in its transformer, in fp32."""

    def changed(name, leaf):
        whole = change(name, leaf.rectangle(None).astype(np.float32))
        return Leaf(leaf.shape, whole.dtype, leaf.stacked, lambda block: whole if block is None else whole[block])

    leaves = checkpoint.leaves("transformer")
    return replace(checkpoint, edited={"transformer": {name: changed(name, leaf) for name, leaf in leaves.items()}})


@pytest.fixture(params=["wan", "flux"])
def base(request, tmp_path):
    """A pipeline in fp32, of either backbone."""
    source = "demo-flux" if request.param == "flux" else request.getfixturevalue("text_pipeline")
    convert(with_weights(open_checkpoint(source), lambda _, array: array), tmp_path / "base", "diffusers")
    return tmp_path / "base"


def matrices(checkpoint):
    return {row.ours: row for row in checkpoint.component("transformer").rows if row.is_matrix("diffusers")}


def learnt(base, folder, rank, noise=0.0):
    """A student all of whose matrices have learnt something of low rank, each direction half of the one before, and
    every leaf some noise."""
    source, rng = open_checkpoint(base), np.random.default_rng(0)
    rows = matrices(source)

    def change(name, array):
        array = array + noise * rng.standard_normal(array.shape, np.float32)
        if name not in rows:
            return array
        blocks = array if source.leaves("transformer")[name].stacked else array[None]
        inputs = 1 + rows[name].inputs()
        down = rng.standard_normal((len(blocks), int(np.prod(blocks.shape[1:inputs])), rank), np.float32)
        up = rng.standard_normal((len(blocks), rank, int(np.prod(blocks.shape[inputs:]))), np.float32)
        up *= 0.5 ** np.arange(rank, dtype=np.float32)[:, None]
        return array + 0.1 * (down @ up).reshape(array.shape)

    convert(with_weights(source, change), folder, "diffusers")
    return folder


def arrays(folder, name="transformer"):
    return {key: np.asarray(leaf) for key, leaf in named_leaves(load_model(folder, name))}


def squared(left, right):
    return sum(float(((left[name].astype(np.float64) - right[name]) ** 2).sum()) for name in right)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_of_low_rank_is_kept_whole(base, tmp_path, capsys, layout):
    tuned, out = learnt(base, tmp_path / "tuned", rank=3), tmp_path / "out"
    named = str(base)
    if layout == "native":
        convert(open_checkpoint(base), tmp_path / "native", "native")
        named = str(tmp_path / "native")
    assert main([LAYOUTS[layout], str(tuned), str(out), "--base", named, "--lora-rank", "3"]) == 0
    assert "a LoRA of rank 3, 100.0% of the squared difference" in capsys.readouterr().out
    assert not (out / "transformer").exists() and not (out / "vae").exists()
    told = json.loads((out / "model_index.json").read_text())["transformer"][2]
    assert told == {"pretrained_model_name_or_path": named, "subfolder": "transformer", "lora": LORA}
    expected, before = arrays(tuned), arrays(base)
    assert squared(arrays(out), expected) <= 1e-9 * squared(before, expected)
    model = load_model(base, "transformer")
    target = Target.of(open_checkpoint(base).component("transformer"))
    lora = read_lora(out / LORA, {"transformer": target})[1]["transformer"]
    given = {name: np.asarray(leaf) for name, leaf in named_leaves(merged(model, [(lora, 1.0)]))}
    assert squared(arrays(out), given) <= 1e-12 * squared(before, given)


def test_no_lora_of_that_rank_is_nearer(base, tmp_path, capsys):
    tuned, out = learnt(base, tmp_path / "tuned", rank=6, noise=0.02), tmp_path / "out"
    assert main(["to-torch", str(tuned), str(out), "--base", str(base), "--lora-rank", "2"]) == 0
    expected, before, kept = arrays(tuned), arrays(base), 0.0
    leaves = open_checkpoint(base).leaves("transformer")
    for name, row in matrices(open_checkpoint(base)).items():
        difference = expected[name] - before[name]
        for block in difference if leaves[name].stacked else difference[None]:
            matrix = block.reshape(int(np.prod(block.shape[: row.inputs()])), -1)
            kept += float((np.linalg.svd(matrix, compute_uv=False)[:2] ** 2).sum())
    whole = squared(before, expected)
    told = float(re.search(r"([\d.]+)% of the squared difference", capsys.readouterr().out)[1]) / 100
    assert told == pytest.approx(kept / whole, abs=1e-3)
    assert squared(arrays(out), expected) / whole == pytest.approx(1 - kept / whole, rel=1e-3)
    assert 0.5 < kept / whole < 0.95


def test_a_copy_and_the_cache_hold_it_merged(base, tmp_path):
    out = tmp_path / "out"
    words = ["to-torch", str(learnt(base, tmp_path / "tuned", rank=1)), str(out), "--base", str(base)]
    assert main([*words, "--lora-rank", "1"]) == 0
    assert main(["inspect", str(out)]) == 0
    assert main(["to-torch", str(out), str(tmp_path / "copy")]) == 0
    index = json.loads((tmp_path / "copy" / "model_index.json").read_text())
    assert all(len(entry) == 2 for entry in index.values() if isinstance(entry, list))
    assert not (tmp_path / "copy" / LORA).exists()
    expected = arrays(out)
    assert squared(arrays(tmp_path / "copy"), expected) == 0
    cached = with_cached_weights(open_checkpoint(out), Cache(folder=tmp_path / "cache"))
    assert set(cached.converted) >= {"transformer"} and squared(arrays(cached), expected) == 0


def test_hash_and_cache_change_with_the_lora(base, tmp_path):
    made = []
    for rank in (1, 2):
        out = tmp_path / f"out{rank}"
        tuned = learnt(base, tmp_path / f"tuned{rank}", rank=2)
        assert main(["to-torch", str(tuned), str(out), "--base", str(base), "--lora-rank", str(rank)]) == 0
        cached = with_cached_weights(open_checkpoint(out), Cache(folder=tmp_path / "cache"))
        made.append((checkpoint_hash(out), cached.converted["transformer"], cached.converted["vae"]))
    (one, first, vae), (two, second, same) = made
    assert one != two and first != second and vae == same


def test_bad_input_is_one_sentence_and_writes_nothing(base, tmp_path, capsys):
    tuned = str(learnt(base, tmp_path / "tuned", rank=1))
    assert main(["to-torch", tuned, str(tmp_path / "small"), "--base", str(base), "--lora-rank", "1"]) == 0
    for source, words, sentence in [
        (str(base), ("--base", str(base), "--lora-rank", "1"), "no matrix of"),
        (tuned, ("--base", "demo-wan", "--lora-rank", "1"), "demo-wan has no transformer of the sizes of that of"),
        (tuned, ("--base", str(base), "--lora-rank", "0"), "the rank of a LoRA is 0"),
        (tuned, ("--lora-rank", "1"), "--lora-rank goes with --base"),
        (str(base), ("--base", str(tmp_path / "small"), "--lora-rank", "1"), "small names another's transformer"),
    ]:
        assert main(["to-torch", source, str(tmp_path / "out"), *words]) == 2
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dit-convert: ")]
        assert len(error) == 1 and sentence in error[0]
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("named", ["gone.safetensors", "../base/model_index.json"])
def test_a_lora_that_is_not_in_the_folder(base, tmp_path, capsys, named):
    out = tmp_path / "out"
    words = ["to-torch", str(learnt(base, tmp_path / "tuned", rank=1)), str(out), "--base", str(base)]
    assert main([*words, "--lora-rank", "1"]) == 0
    index = out / "model_index.json"
    index.write_text(index.read_text().replace(LORA, named))
    capsys.readouterr()
    assert main(["inspect", str(out)]) == 2
    told = capsys.readouterr().err
    assert f"lacks the file {named}, which model_index.json names" in told and told.count("\n") == 1
