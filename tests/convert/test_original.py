"""A folder as Wan's authors publish it: `.pth` files, one config, everything else implied by shapes and constants."""

import json
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import original
from convert.checkpoint import open_checkpoint
from convert.transfer import convert
from dit_jax.config import UserError
from dit_jax.models.vae_wan import WanVAEConfig

torch = pytest.importorskip("torch")
TINY_VAE = WanVAEConfig(base_dim=4, dim_mult=(1, 2, 4, 4))
PTH = [stem for name, stem in original.STEMS.items() if name != original.TRANSFORMER]


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
    (folder / original.CONFIGS).unlink()
    return folder


@pytest.fixture
def small_constants(monkeypatch):
    """The constants that no shape tells, at the size of the fixtures."""
    monkeypatch.setattr(original, "WanVAEConfig", lambda: TINY_VAE)
    monkeypatch.setattr(original, "ORIGINAL_CLIP", replace(original.ORIGINAL_CLIP, width=80, heads=1))


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
    transformer = original.STEMS[original.TRANSFORMER]
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


def test_published_sizes_are_the_constants():
    config = {"model_type": "t2v", "dim": 1536, "ffn_dim": 8960, "freq_dim": 256, "in_dim": 16, "num_heads": 12}
    config |= {"num_layers": 30, "out_dim": 16, "eps": 1e-6, "text_len": 512, "_class_name": "WanModel"}
    from convert.wan import wan_config
    from dit_jax.models.wan import PRESETS

    assert wan_config(config) == PRESETS["wan2.1-t2v-1.3b"]


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


PROBLEMS = {
    "no transformer": (without("diffusion_pytorch_model"), "lacks diffusion_pytorch_model.safetensors"),
    "no config": (without("config.json"), "lacks config.json"),
    "a key of no Wan": (renamed, r"lacks blocks\.0\.modulation; expected shape \(1, 6, 24\)"),
    "damaged pickle": (lambda f: (f / "Wan2.1_VAE.pth").write_bytes(b"junk"), r"Wan2\.1_VAE\.pth cannot be read"),
}


@pytest.mark.usefixtures("small_constants")
@pytest.mark.parametrize("kind", PROBLEMS)
def test_problems_are_named(kind, text_pipeline, tmp_path):
    folder = as_published(text_pipeline, tmp_path / "published")
    damage, message = PROBLEMS[kind]
    damage(folder)
    with pytest.raises(UserError, match=message):
        convert(open_checkpoint(folder), tmp_path / "out", "native")
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


def test_configs_may_not_point_outside(text_pipeline, tmp_path):
    convert(open_checkpoint(text_pipeline), tmp_path / "original", "original")
    (tmp_path / "original" / original.CONFIGS).write_text('{"../config.json": {}}')
    with pytest.raises(UserError, match="inside the folder"):
        open_checkpoint(tmp_path / "original")


def test_only_wan_has_this_layout(text_pipeline, tmp_path):
    with pytest.raises(UserError, match="for Wan pipelines and Wan transformers only"):
        convert(open_checkpoint(text_pipeline / "vae"), tmp_path / "out", "original")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["text_pipeline", "image_pipeline"])
def test_diffusers_own_converters_agree_with_our_keys(kind, request, tmp_path):
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers

    source = request.getfixturevalue(kind)
    convert(open_checkpoint(source), tmp_path / "original", "original")
    converters = {"transformer": convert_wan_transformer_to_diffusers, "vae": convert_wan_vae_to_diffusers}
    for name, converter in converters.items():
        state = {key: to_torch(array) for key, array in stored(tmp_path / "original", original.STEMS[name]).items()}
        found = converter(state)
        expected = stored(source / name, "diffusion_pytorch_model")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], to_torch(array)) for key, array in expected.items())
