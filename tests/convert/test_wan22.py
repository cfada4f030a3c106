"""Wan 2.2 in all three layouts: two experts in folders of their own, a model that takes a frame or none, VAE 2.2."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoints
from safetensors.numpy import load_file, save_file

from convert.checkpoint import checkpoint_hash, open_checkpoint
from convert.components import component_of
from convert.encoders import t5_settings
from convert.shapes import SIDECAR
from convert.summary import summarise
from convert.transfer import convert, write_model
from convert.vae_wan import config_to_diffusers
from convert.wan import wan_settings
from dit_jax.config import UserError
from dit_jax.models.t5 import T5Config
from dit_jax.models.vae_wan import PRESETS as VAES
from dit_jax.models.vae_wan import WanVAEConfig
from dit_jax.parameters import with_leaves

TEXT = tiny_checkpoints.WAN
IMAGE = replace(TEXT, in_channels=36)
TEXT_OR_IMAGE = replace(TEXT, in_channels=48, out_channels=48)
RESIDUAL = replace(VAES["wan2.2"], base_dim=4, decoder_base_dim=8)
VARIANTS = {
    "t2v-a14b": (TEXT, WanVAEConfig(base_dim=4), 2, {"boundary_ratio": 0.875}, 12.0),
    "i2v-a14b": (IMAGE, WanVAEConfig(base_dim=4), 2, {"boundary_ratio": 0.9}, 5.0),
    "ti2v-5b": (TEXT_OR_IMAGE, RESIDUAL, 1, {"expand_timesteps": True}, 5.0),
}


def pipeline(folder: Path, variant: str) -> Path:
    """A diffusers folder of random weights, no two models alike."""
    config, vae, experts, told, shift = VARIANTS[variant]
    of_image = config.in_channels > config.out_channels
    index: dict = {"_class_name": "WanImageToVideoPipeline" if of_image else "WanPipeline", **told}
    settings = {
        "vae": config_to_diffusers(vae),
        "text_encoder": t5_settings(T5Config(**tiny_checkpoints.T5_SIZES)),
        **{name: wan_settings(config) for name in ("transformer", "transformer_2")[:experts]},
    }
    for seed, (name, its_settings) in enumerate(settings.items()):
        write_random(folder / name, its_settings, seed)
        library = "diffusers" if "_class_name" in its_settings else "transformers"
        index[name] = [library, its_settings.get("_class_name") or its_settings["architectures"][0]]
    (folder / "scheduler").mkdir()
    scheduler = {"_class_name": "UniPCMultistepScheduler", "flow_shift": shift}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index["scheduler"] = ["diffusers", "UniPCMultistepScheduler"]
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "spiece.model").write_bytes(bytes(range(9)))
    index["tokenizer"] = ["transformers", "T5TokenizerFast"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_random(folder: Path, settings: dict, seed: int) -> None:
    component, rng = component_of(settings, folder), np.random.default_rng(seed)
    values = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in component.shapes.items()}
    folder.parent.mkdir(exist_ok=True)
    write_model(folder, with_leaves(component.abstract, values), settings)


def weights(folder: Path) -> dict[str, dict[str, bytes]]:
    """Of every file of weights below a folder: key -> its bytes."""
    files = sorted(folder.rglob("*.safetensors"))
    return {
        str(file.relative_to(folder)): {key: array.tobytes() for key, array in load_file(file).items()}
        for file in files
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_round_trip_through_all_layouts_is_bit_exact(variant, tmp_path):
    source = pipeline(tmp_path / "diffusers", variant)
    convert(open_checkpoint(source), tmp_path / "native", "native")
    convert(open_checkpoint(tmp_path / "native"), tmp_path / "original", "original")
    convert(open_checkpoint(tmp_path / "original"), tmp_path / "again", "diffusers")
    assert weights(tmp_path / "again") == weights(source)
    assert len(weights(source)) == 2 + VARIANTS[variant][2]
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        assert json.loads((tmp_path / "again" / name).read_text()) == json.loads((source / name).read_text())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_release_is_described_by_its_folders_and_shapes(variant, tmp_path):
    source = open_checkpoint(pipeline(tmp_path / "diffusers", variant))
    published = tmp_path / "published"
    convert(source, published, "original")
    (published / SIDECAR).unlink()
    (published / "configuration.json").write_text("{}")
    found = open_checkpoint(published)
    assert found.settings.keys() == source.settings.keys()
    for name in source.settings:
        assert found.component(name).config == source.component(name).config, name
    _, _, experts, told, shift = VARIANTS[variant]
    index = json.loads(found.files["model_index.json"])
    assert index.items() >= told.items()
    assert index["_class_name"] == json.loads((tmp_path / "diffusers" / "model_index.json").read_text())["_class_name"]
    assert json.loads(found.files["scheduler/scheduler_config.json"])["flow_shift"] == shift
    high = published / "high_noise_model"
    config = json.loads(((high if experts == 2 else published) / "config.json").read_text())
    assert config["model_type"] == variant.partition("-")[0]
    release = "2.2" if variant == "ti2v-5b" else "2.1"
    assert (published / f"Wan{release}_VAE.safetensors").is_file()
    convert(found, tmp_path / "again", "diffusers")
    assert weights(tmp_path / "again") == weights(tmp_path / "diffusers")


def test_an_expert_alone_is_a_model(tmp_path):
    convert(open_checkpoint(pipeline(tmp_path / "diffusers", "t2v-a14b")), tmp_path / "original", "original")
    alone = open_checkpoint(tmp_path / "original" / "low_noise_model")
    assert list(alone.settings) == [""] and alone.component("").config == TEXT
    pair = open_checkpoint(tmp_path / "original")
    assert checkpoint_hash(alone) != checkpoint_hash(pair)


def test_one_of_two_experts_is_no_pipeline(tmp_path):
    convert(open_checkpoint(pipeline(tmp_path / "diffusers", "t2v-a14b")), tmp_path / "original", "original")
    for file in (tmp_path / "original" / "low_noise_model").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match=r"lacks one of Wan 2\.2's two experts") as error:
        open_checkpoint(tmp_path / "original")
    assert "\n" not in str(error.value)


def test_a_vae_of_other_latents_is_refused(tmp_path):
    write_random(tmp_path / "vae", config_to_diffusers(WanVAEConfig(base_dim=4)), 0)
    convert(open_checkpoint(tmp_path / "vae"), tmp_path / "original", "original")
    (tmp_path / "original" / SIDECAR).unlink()
    file = tmp_path / "original" / "Wan2.1_VAE.safetensors"
    state = load_file(file)
    save_file(state | {"decoder.conv1.weight": np.ones((16, 12, 3, 3, 3), np.float32)}, file)
    with pytest.raises(UserError, match="latents of 12 channels, expected 16"):
        open_checkpoint(file)


def test_inspect_names_the_experts_variant(tmp_path, monkeypatch):
    source = pipeline(tmp_path / "diffusers", "t2v-a14b")
    sized = {"wan2.1-t2v-14b": TEXT, "wan2.2-t2v-a14b": TEXT}
    monkeypatch.setattr("convert.summary.PRESETS", sized)
    assert summarise(open_checkpoint(source)).variant == "wan2.2-t2v-a14b"
    assert summarise(open_checkpoint(shutil.copytree(source / "transformer", tmp_path / "one"))).variant == (
        "wan2.1-t2v-14b"
    )
