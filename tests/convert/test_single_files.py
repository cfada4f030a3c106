"""The authors' single files, alone, with ComfyUI's prefixes or in a folder: known by keys, told by shapes."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import (
    FLUX_PIPELINE,
    SETTINGS,
    WAN_PIPELINE,
    component,
    model_folder,
    pipeline_folder,
    single_file,
    tensors,
)

from convert.checkpoint import checkpoint_hash, load_model, open_checkpoint
from convert.components import class_name
from convert.transfer import convert
from dit_jax.config import UserError
from dit_jax.parameters import named_leaves

STEMS = {
    "wan": "diffusion_pytorch_model",
    "wan-image": "diffusion_pytorch_model",
    "flux-dev": "flux1-dev",
    "flux-schnell": "flux1-schnell",
    "wan-vae": "Wan2.1_VAE",
    "flux-vae": "ae",
    "umt5": "models_t5_umt5-xxl-enc-bf16",
    "clip-vision": "models_clip_open-clip-xlm-roberta-large-vit-huge-14",
    "t5": "t5xxl",
    "clip-text": "clip_l",
}
TRANSFORMERS = ("wan", "flux-dev")
PREFIXES = ("model.diffusion_model.", "diffusion_model.")
COMFYUI = {
    "flux": {
        "flux-dev": "model.diffusion_model.", "flux-vae": "vae.", "clip-text": "text_encoders.clip_l.transformer.",
        "t5": "text_encoders.t5xxl.transformer.",
    },
    "wan": {"wan": "model.diffusion_model.", "wan-vae": "vae.", "umt5-comfyui": "text_encoders.umt5xxl.transformer."},
}  # fmt: skip


def run(source: Path, destination: Path, layout: str) -> Path:
    convert(open_checkpoint(source), destination, layout)
    return destination


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        assert (found[key].dtype, found[key].shape) == (array.dtype, array.shape), key
        assert found[key].tobytes() == array.tobytes(), key


@pytest.mark.parametrize("name", SETTINGS)
def test_a_file_of_any_name_is_told_by_its_keys_and_shapes(name, tmp_path):
    opened = open_checkpoint(single_file(tmp_path / "renamed.safetensors", name))
    assert (opened.layout, opened.is_pipeline, list(opened.settings)) == ("original", False, [""])
    assert class_name(opened.settings[""]) == class_name(SETTINGS[name])
    assert opened.component("").config == component(name).config


@pytest.mark.parametrize("name", SETTINGS)
def test_a_file_goes_to_every_layout_and_comes_back_bit_for_bit(name, tmp_path):
    file = single_file(tmp_path / "renamed.safetensors", name)
    native = run(file, tmp_path / "native", "native")
    original = run(native, tmp_path / "original", "original")
    assert_same(load_file(original / f"{STEMS[name]}.safetensors"), tensors(name))
    diffusers = run(original / f"{STEMS[name]}.safetensors", tmp_path / "diffusers", "diffusers")
    assert_same(load_file(diffusers / f"{component(name).stem}.safetensors"), tensors(name, "diffusers"))
    again = run(diffusers, tmp_path / "again", "original")
    assert_same(load_file(again / f"{STEMS[name]}.safetensors"), tensors(name))


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_prefixes_of_comfyui_make_no_difference(name, prefix, tmp_path):
    plain = load_model(single_file(tmp_path / "plain.safetensors", name))
    prefixed = load_model(single_file(tmp_path / "prefixed.safetensors", name, prefix=prefix))
    for (path, one), (_, other) in zip(named_leaves(plain), named_leaves(prefixed), strict=True):
        np.testing.assert_array_equal(one, other, err_msg=path)


def test_one_file_may_hold_a_whole_pipeline(tmp_path):
    whole = {prefix + key: array for name, prefix in COMFYUI["flux"].items() for key, array in tensors(name).items()}
    save_file(whole, tmp_path / "whole.safetensors")
    opened = open_checkpoint(tmp_path / "whole.safetensors")
    assert {place: opened.component(place).config for place in opened.settings} == {
        place: component(name).config for place, name in FLUX_PIPELINE.items()
    }
    diffusers = run(tmp_path / "whole.safetensors", tmp_path / "out", "diffusers")
    for place, name in FLUX_PIPELINE.items():
        file = diffusers / place / f"{component(name).stem}.safetensors"
        assert_same(load_file(file), tensors(name, "diffusers"))
    assert json.loads((diffusers / "model_index.json").read_text())["_class_name"] == "FluxPipeline"
    assert set(open_checkpoint(diffusers).settings) == set(FLUX_PIPELINE)


@pytest.mark.parametrize("model", COMFYUI)
def test_what_comfyui_saves_beside_its_text_encoders_is_left_out(model, tmp_path):
    whole = {prefix + key: array for name, prefix in COMFYUI[model].items() for key, array in at_comfyui(name).items()}
    plain = run(saved(tmp_path / "plain.safetensors", whole), tmp_path / "plain", "diffusers")
    beside = {
        key.split("transformer.")[0] + "logit_scale": np.array(4.6, np.float32)
        for key in whole
        if key.startswith("text_encoders.")
    } | {"text_encoders.spiece_model": np.frombuffer(b"tokenizer", np.uint8)}
    found = run(saved(tmp_path / "whole.safetensors", whole | beside), tmp_path / "whole", "diffusers")
    for file in plain.rglob("*.*"):
        assert (found / file.relative_to(plain)).read_bytes() == file.read_bytes(), file
    stray = saved(tmp_path / "stray.safetensors", whole | beside | {"text_encoders.clip_g.stray": np.ones(3)})
    with pytest.raises(UserError, match=r"unexpected tensor text_encoders\.clip_g\.stray"):
        open_checkpoint(stray)


def at_comfyui(name: str) -> dict:
    """ComfyUI keeps UMT5 under the keys of transformers."""
    return tensors("umt5", "diffusers") if name == "umt5-comfyui" else tensors(name)


@pytest.mark.parametrize("name", ["t5", "clip-text", "umt5-comfyui"])
def test_what_comfyui_saves_in_the_file_of_one_text_encoder_is_left_out(name, tmp_path):
    plain = run(saved(tmp_path / "plain.safetensors", at_comfyui(name)), tmp_path / "plain", "diffusers")
    whole = at_comfyui(name) | {"logit_scale": np.array(4.6, np.float32)}
    found = run(saved(tmp_path / "whole.safetensors", whole), tmp_path / "whole", "diffusers")
    assert (found / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()


@pytest.mark.parametrize("parts", [WAN_PIPELINE, FLUX_PIPELINE], ids=["wan", "flux"])
def test_a_folder_of_files_is_a_pipeline_whatever_they_are_called(parts, tmp_path):
    for number, name in enumerate(parts.values()):
        single_file(tmp_path / "flat" / f"file{number}.safetensors", name)
    (tmp_path / "flat" / "tokenizer").mkdir()
    (tmp_path / "flat" / "tokenizer" / "tokenizer.json").write_text("{}")
    opened = open_checkpoint(tmp_path / "flat")
    assert {place: opened.component(place).config for place in opened.settings} == {
        place: component(name).config for place, name in parts.items()
    }
    index = json.loads(opened.files["model_index.json"])
    assert index["_class_name"] == ("FluxPipeline" if parts is FLUX_PIPELINE else "WanPipeline")
    assert set(parts) | {"tokenizer", "scheduler"} < set(index) and "tokenizer_2" not in index


@pytest.mark.parametrize("parts", [WAN_PIPELINE, FLUX_PIPELINE], ids=["wan", "flux"])
def test_a_pipeline_goes_through_the_original_layout_bit_for_bit(parts, tmp_path):
    source = pipeline_folder(tmp_path / "source", parts)
    original = run(source, tmp_path / "original", "original")
    assert {f"{STEMS[name]}.safetensors" for name in parts.values()} == {f.name for f in original.glob("*.safetensors")}
    again = run(run(original, tmp_path / "native", "native"), tmp_path / "again", "diffusers")
    files = {file.relative_to(source) for file in source.rglob("*") if file.is_file()}
    assert {file.relative_to(again) for file in again.rglob("*") if file.is_file()} == files
    for file in files:
        if file.suffix == ".safetensors":
            assert_same(load_file(again / file), load_file(source / file))
        else:
            assert json.loads((again / file).read_text()) == json.loads((source / file).read_text())


def test_the_config_that_lies_beside_a_file_is_believed(tmp_path):
    source = pipeline_folder(tmp_path / "source", WAN_PIPELINE)
    for place, change in (("transformer", {"eps": 1e-5}), ("text_encoder", {"layer_norm_epsilon": 1e-5})):
        config = source / place / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
    original = run(source, tmp_path / "original", "original")
    for stem in ("diffusion_pytorch_model", "models_t5_umt5-xxl-enc-bf16"):
        assert open_checkpoint(original / f"{stem}.safetensors").component("").config.epsilon == 1e-5
    folder = model_folder(tmp_path / "t5", "t5")
    (folder / "config.json").write_text(json.dumps(SETTINGS["t5"] | {"layer_norm_epsilon": 1e-5}))
    assert open_checkpoint(folder / "model.safetensors").component("").config.epsilon == 1e-5


def test_heads_of_another_width_need_a_config(tmp_path):
    arrays = tensors("wan") | {"patch_embedding.weight": np.ones((100, 16, 1, 2, 2), np.float32)}
    save_file(arrays, tmp_path / "narrow.safetensors")
    with pytest.raises(UserError, match=r"patch_embedding\.weight has width 100, expected a multiple of 128.*config"):
        open_checkpoint(tmp_path / "narrow.safetensors")
    norms = {key: np.ones(64, np.float32) for key in tensors("flux-dev") if key.endswith("_norm.scale")}
    save_file(tensors("flux-dev") | norms, tmp_path / "flux.safetensors")
    with pytest.raises(UserError, match=r"query_norm\.scale has 64 values, expected 128 as in FLUX\.1"):
        open_checkpoint(tmp_path / "flux.safetensors")


def test_a_vae_of_other_latents_needs_a_config(tmp_path):
    arrays = tensors("flux-vae") | {"decoder.conv_in.weight": np.ones((64, 4, 3, 3), np.float32)}
    save_file(arrays, tmp_path / "vae.safetensors")
    with pytest.raises(UserError, match="takes latents of 4 channels, expected 16"):
        open_checkpoint(tmp_path / "vae.safetensors")


def test_two_files_for_one_component_are_refused(tmp_path):
    single_file(tmp_path / "flux1-dev.safetensors", "flux-dev")
    single_file(tmp_path / "flux1-schnell.safetensors", "flux-schnell")
    with pytest.raises(UserError, match=r"two files for the transformer, flux1-dev.safetensors and flux1-schnell"):
        open_checkpoint(tmp_path)
    assert open_checkpoint(tmp_path / "flux1-schnell.safetensors").component("").config.guidance is False


def test_encoders_without_a_transformer_are_no_pipeline(tmp_path):
    single_file(tmp_path / "ae.safetensors", "flux-vae")
    assert not open_checkpoint(tmp_path).is_pipeline
    single_file(tmp_path / "t5.safetensors", "t5")
    with pytest.raises(UserError, match="lacks a transformer beside vae, text_encoder_2"):
        open_checkpoint(tmp_path)


def saved(file: Path, arrays: dict) -> Path:
    save_file(arrays, file)
    return file


ONE = np.ones(3, np.float32)
REFUSED = {
    "no model": (lambda: {"latents": ONE}, "is no file of weights that we know by its keys"),
    "diffusers' keys": (lambda: tensors("wan", "diffusers"), "give the folder"),
    "a LoRA": (lambda: {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": ONE}, "holds a LoRA"),
    "a key without the prefix": (
        lambda: {f"diffusion_model.{key}": array for key, array in tensors("wan").items()} | {"stray": ONE},
        r"unexpected tensor stray of shape \(3,\)",
    ),
    "a key too many": (lambda: tensors("flux-dev") | {"img_in.extra": ONE}, r"unexpected tensor img_in\.extra"),
    "a key too few": (
        lambda: {key: array for key, array in tensors("flux-dev").items() if key != "vector_in.out_layer.bias"},
        r"renamed\.safetensors lacks vector_in\.out_layer\.bias; expected shape \(256,\)",
    ),
    "an integer": (lambda: tensors("t5") | {"shared.weight": np.ones((13, 12), np.int32)}, "shared.weight is int32"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_file_of_a_model(kind, tmp_path):
    make, message = REFUSED[kind]
    file = saved(tmp_path / "renamed.safetensors", make())
    with pytest.raises(UserError, match=message) as caught:
        convert(open_checkpoint(file), tmp_path / "out", "native")
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_file_in_shards_is_given_by_its_index(tmp_path):
    source = single_file(tmp_path / "ae.safetensors", "flux-vae")
    convert(open_checkpoint(source), tmp_path / "sharded", "original", max_shard_bytes=100_000)
    index = tmp_path / "sharded" / "ae.safetensors.index.json"
    assert len(list(index.parent.glob("ae-*.safetensors"))) > 1
    for place in (index, index.parent):
        again = run(place, tmp_path / f"again-{place.name}", "original")
        assert_same(load_file(again / "ae.safetensors"), tensors("flux-vae"))


def test_the_hash_of_a_file_is_of_its_contents(tmp_path):
    file = single_file(tmp_path / "ae.safetensors", "flux-vae")
    before = checkpoint_hash(file)
    (tmp_path / "other.safetensors").write_bytes(b"")
    assert checkpoint_hash(file) == before
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert checkpoint_hash(file) != before


def test_the_destination_may_lie_beside_the_file_but_not_hold_it(tmp_path):
    file = single_file(tmp_path / "in" / "ae.safetensors", "flux-vae")
    run(file, file.parent / "out", "native")
    with pytest.raises(UserError, match="lie in one another"):
        convert(open_checkpoint(file), tmp_path / "in", "native", overwrite=True)
