"""A folder as Wan's authors publish it: `.pth` files, one config, everything else implied by shapes and constants."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import shapes
from convert.checkpoint import open_checkpoint
from convert.implied import pipeline_configs
from convert.shapes import SIDECAR
from convert.transfer import convert
from dit_jax.config import UserError

torch = pytest.importorskip("torch")
STEMS = {
    "transformer": "diffusion_pytorch_model",
    "vae": "Wan2.1_VAE",
    "text_encoder": "models_t5_umt5-xxl-enc-bf16",
    "image_encoder": "models_clip_open-clip-xlm-roberta-large-vit-huge-14",
}
PTH = [stem for name, stem in STEMS.items() if name != "transformer"]


def to_torch(array: np.ndarray):
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def as_published(source: Path, folder: Path) -> Path:
    """Our original layout made into theirs: pickled weights, no configs of ours, the text tower in CLIP's file."""
    convert(open_checkpoint(source), folder, "original")
    for stem in PTH:
        file = folder / f"{stem}.safetensors"
        if file.is_file():
            state = {key: to_torch(array) for key, array in load_file(file).items()}
            if "clip" in stem:
                state |= {"log_scale": torch.ones(()), "textual.model.embeddings.weight": torch.ones(3, 2)}
            torch.save(state, folder / f"{stem}.pth")
            file.unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["text_dim"]  # theirs leaves it out
    (folder / "config.json").write_text(json.dumps(config))
    (folder / SIDECAR).unlink()
    return folder


@pytest.fixture
def small_constants(monkeypatch):
    """The constants that no shape tells, at the size of the fixtures."""
    monkeypatch.setattr(shapes, "ORIGINAL_CLIP", replace(shapes.ORIGINAL_CLIP, width=80, heads=1))


def stored(folder: Path, stem: str) -> dict[str, np.ndarray]:
    return load_file(folder / f"{stem}.safetensors")


@pytest.mark.usefixtures("small_constants")
def test_a_release_converts_and_comes_back(projecting_pipeline, tmp_path):
    published = as_published(projecting_pipeline, tmp_path / "published")
    convert(open_checkpoint(published), tmp_path / "native", "native")
    convert(open_checkpoint(tmp_path / "native"), tmp_path / "again", "original")
    for stem in PTH:
        state = torch.load(published / f"{stem}.pth", weights_only=True)
        found = stored(tmp_path / "again", stem)
        assert found.keys() == {key for key in state if not key.startswith(("textual.", "log_scale"))}
        for key, array in found.items():
            assert torch.equal(to_torch(array), state[key]) and to_torch(array).dtype == state[key].dtype
    transformer = STEMS["transformer"]
    expected, found = stored(published, transformer), stored(tmp_path / "again", transformer)
    assert expected.keys() == found.keys()
    assert all(found[key].tobytes() == array.tobytes() for key, array in expected.items())


@pytest.mark.usefixtures("small_constants")
def test_the_implied_configs_describe_the_same_models(projecting_pipeline, tmp_path):
    published = open_checkpoint(as_published(projecting_pipeline, tmp_path / "published"))
    source = open_checkpoint(projecting_pipeline)
    assert published.settings.keys() == source.settings.keys()
    for name in source.settings:
        assert published.component(name).config == source.component(name).config, name


@pytest.mark.usefixtures("small_constants")
def test_diffusers_opens_a_converted_release(text_pipeline, tmp_path):
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
    from transformers import UMT5EncoderModel

    convert(open_checkpoint(as_published(text_pipeline, tmp_path / "published")), tmp_path / "out", "diffusers")
    kinds = {"transformer": WanTransformer3DModel, "vae": AutoencoderKLWan, "text_encoder": UMT5EncoderModel}
    for name, kind in kinds.items():
        expected = kind.from_pretrained(text_pipeline / name).state_dict()
        found = kind.from_pretrained(tmp_path / "out" / name).state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    scheduler = UniPCMultistepScheduler.from_pretrained(tmp_path / "out" / "scheduler")
    assert scheduler.config.use_flow_sigmas and scheduler.config.flow_shift == 3.0
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == "WanPipeline" and set(index) > {"vae", "transformer", "tokenizer", "scheduler"}


def test_a_model_that_draws_between_two_pictures_has_the_authors_shift():
    transformer = {"_class_name": "WanTransformer3DModel", "in_channels": 36, "out_channels": 16}
    for positions, shift in ((None, 3.0), (514, 16.0)):
        settings = {"transformer": transformer | {"pos_embed_seq_len": positions}}
        assert pipeline_configs(settings, ())["scheduler/scheduler_config.json"]["flow_shift"] == shift


def test_published_sizes_are_the_constants():
    config = {"model_type": "t2v", "dim": 1536, "ffn_dim": 8960, "freq_dim": 256, "in_dim": 16, "num_heads": 12}
    config |= {"num_layers": 30, "out_dim": 16, "eps": 1e-6, "text_len": 512, "_class_name": "WanModel"}
    from convert.wan import wan_config
    from dit_jax.models.wan import PRESETS

    assert wan_config(config) == PRESETS["wan2.1-t2v-1.3b"]


def test_a_model_that_draws_between_two_pictures_is_called_so_as_the_authors_build_it():
    from convert.wan import wan_config, wan_original_settings
    from dit_jax.models.wan import PRESETS

    between = replace(PRESETS["wan2.1-i2v-14b"], image_positions=514)
    written = wan_original_settings(between)
    assert written["model_type"] == "flf2v" and wan_config(written) == between
    assert wan_original_settings(replace(between, image_positions=None))["model_type"] == "i2v"


def test_a_transformer_alone(text_pipeline, tmp_path):
    published = as_published(text_pipeline / "transformer", tmp_path / "published")
    opened = open_checkpoint(published)
    assert (opened.layout, opened.is_pipeline, list(opened.settings)) == ("original", False, [""])
    assert opened.component("").config == open_checkpoint(text_pipeline).component("transformer").config


def without(stem: str):
    return lambda folder: [file.unlink() for file in folder.glob(f"{stem}*")]


def renamed(folder: Path) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["blocks.0.strange"] = state.pop("blocks.0.modulation")
    save_file(state, file)


def reconfigured(settings: dict):
    return lambda folder: (folder / "config.json").write_text(json.dumps(settings))


def reshaped(component: str, key: str, *shape: int):
    def damage(folder: Path) -> None:
        file = folder / f"{STEMS[component]}.pth"
        torch.save(torch.load(file, weights_only=True) | {key: torch.ones(shape)}, file)

    return damage


def patch_of_a_vector(folder: Path) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"patch_embedding.weight": np.ones(4, np.float32)}, file)


CLIP_PATCH = "visual.patch_embedding.weight"
PROBLEMS = {
    "no transformer": (without("diffusion_pytorch_model"), "lacks a transformer beside"),
    "no config": (without("config.json"), r"has width 24, expected a multiple of 128.*config\.json"),
    "a key of no Wan": (renamed, r"lacks blocks\.0\.modulation; expected shape \(1, 6, 24\)"),
    "damaged pickle": (lambda f: (f / "Wan2.1_VAE.pth").write_bytes(b"junk"), r"Wan2\.1_VAE\.pth cannot be read"),
    "a config of one setting": (reconfigured({"dim": 4}), r"config\.json: the config of WanModel lacks 'num_layers'"),
    "a config of no model": (reconfigured({"num_layers": 1, "dim": 4, "num_heads": 0}), "cannot be used"),
    "a patch of a vector": (
        patch_of_a_vector,
        r"model\.safetensors: patch_embedding\.weight has shape \(4,\), expected \(width, channels, t, y, x\)",
    ),
    "tokens of a vector": (
        reshaped("text_encoder", "token_embedding.weight", 4),
        r"bf16\.pth: token_embedding\.weight has shape \(4,\), expected \(vocabulary, width\)",
    ),
    "a bias of no heads": (
        reshaped("text_encoder", "blocks.0.pos_embedding.embedding.weight", 32, 0),
        r"blocks\.0\.pos_embedding\.embedding\.weight has shape \(32, 0\), expected \(buckets, heads\)",
    ),
    "a block without a number": (
        reshaped("text_encoder", "blocks.first.norm1.weight", 4),
        r"unexpected tensor blocks\.first\.norm1\.weight of shape \(4,\)",
    ),
    "a patch of a matrix": (
        reshaped("image_encoder", CLIP_PATCH, 80, 3),
        r"visual\.patch_embedding\.weight has shape \(80, 3\), expected \(width, channels, y, x\)",
    ),
    "positions of a vector": (
        reshaped("image_encoder", "visual.pos_embedding", 5),
        r"visual\.pos_embedding has shape \(5,\), expected \(1, positions, width\)",
    ),
    "a layer without a number": (
        reshaped("image_encoder", "visual.transformer.x.norm1.weight", 4),
        r"unexpected tensor visual\.transformer\.x\.norm1\.weight",
    ),
}


@pytest.mark.usefixtures("small_constants")
@pytest.mark.parametrize("kind", PROBLEMS)
def test_problems_are_named(kind, projecting_pipeline, tmp_path):
    folder = as_published(projecting_pipeline, tmp_path / "published")
    damage, message = PROBLEMS[kind]
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        convert(open_checkpoint(folder), tmp_path / "out", "native")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


def test_a_transformer_that_lacks_a_setting(text_pipeline, tmp_path):
    source = shutil.copytree(text_pipeline / "transformer", tmp_path / "source")
    settings = json.loads((source / "config.json").read_text())
    del settings["eps"]
    (source / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="the config of WanTransformer3DModel lacks 'eps'"):
        convert(open_checkpoint(source), tmp_path / "out", "original")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_damaged_side_file_is_named(text_pipeline, tmp_path):
    source = shutil.copytree(text_pipeline, tmp_path / "source")
    (source / "scheduler" / "scheduler_config.json").write_text("{")
    with pytest.raises(UserError, match=r"scheduler_config\.json is not JSON"):
        convert(open_checkpoint(source), tmp_path / "out", "original")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_configs_may_not_point_outside(text_pipeline, tmp_path):
    convert(open_checkpoint(text_pipeline), tmp_path / "original", "original")
    (tmp_path / "original" / SIDECAR).write_text('{"../config.json": {}}')
    with pytest.raises(UserError, match="inside the folder"):
        open_checkpoint(tmp_path / "original")


def test_a_component_of_another_model_has_no_place_in_this_layout(text_pipeline, tmp_path):
    source = shutil.copytree(text_pipeline, tmp_path / "source")
    (source / "text_encoder").rename(source / "text_encoder_3")
    index = json.loads((source / "model_index.json").read_text())
    index["text_encoder_3"] = index.pop("text_encoder")
    (source / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="the original layout has no place for text_encoder_3"):
        convert(open_checkpoint(source), tmp_path / "out", "original")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("kind", ["text_pipeline", "image_pipeline"])
def test_diffusers_own_converters_agree_with_our_keys(kind, request, tmp_path):
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers

    source = request.getfixturevalue(kind)
    convert(open_checkpoint(source), tmp_path / "original", "original")
    converters = {"transformer": convert_wan_transformer_to_diffusers, "vae": convert_wan_vae_to_diffusers}
    for name, converter in converters.items():
        state = {key: to_torch(array) for key, array in stored(tmp_path / "original", STEMS[name]).items()}
        found = converter(state)
        expected = stored(source / name, "diffusion_pytorch_model")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], to_torch(array)) for key, array in expected.items())
