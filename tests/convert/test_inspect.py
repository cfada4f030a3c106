"""dit-convert inspect: model, variant, layout, dtypes and parameters of every layout, at the published sizes too."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from tiny_checkpoints import FLUX_PIPELINE, SETTINGS, WAN_PIPELINE, model_folder, pipeline_folder, single_file, tensors

from convert import cli
from convert.checkpoint import open_checkpoint
from convert.components import component_of
from convert.encoders import ORIGINAL_CLIP, clip_text_settings, clip_vision_settings, t5_settings
from convert.flux import flux_settings
from convert.kinds import kind_to_write
from convert.transfer import convert
from convert.vae_kl import config_to_diffusers as vae_kl_settings
from convert.vae_wan import config_to_diffusers as vae_wan_settings
from convert.wan import wan_settings
from dit_jax.models import clip_text, flux, t5, vae_kl, vae_wan, wan

VARIANTS = {
    "wan": "Wan text-to-video, 2 blocks of width 256 with 2 heads",
    "wan-image": "Wan image-to-video, 1 blocks of width 256 with 2 heads",
    "flux-dev": "FLUX with guidance embedding, 1 double and 2 single blocks of width 256 with 2 heads",
    "flux-schnell": "FLUX without guidance embedding, 2 double and 1 single blocks of width 128 with 1 heads",
    "wan-vae": "custom sizes",
    "flux-vae": "custom sizes",
    "umt5": "2 blocks of width 12",
    "clip-vision": "2 blocks of width 80",
    "t5": "2 blocks of width 12",
    "clip-text": "2 blocks of width 64",
}


def inspected(place: Path, capsys) -> dict:
    assert cli.main(["inspect", str(place), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def made(layout: str, name: str, folder: Path) -> Path:
    if layout == "diffusers":
        return model_folder(folder / "diffusers", name, np.float16)
    file = single_file(folder / "file.safetensors", name, np.float16)
    if layout == "single file":
        return file
    convert(open_checkpoint(file), folder / layout, layout)
    return folder / layout


@pytest.mark.parametrize("layout", ["diffusers", "single file", "original", "native"])
@pytest.mark.parametrize("name", SETTINGS)
def test_what_a_model_is(name, layout, tmp_path, capsys):
    place = made(layout, name, tmp_path)
    summary = inspected(place, capsys)
    settings = SETTINGS[name]
    assert summary["path"] == str(place)
    assert summary["kind"] == settings.get("_class_name") or settings["architectures"] == [summary["kind"]]
    assert summary["layout"] == ("original" if layout == "single file" else layout)
    assert (summary["variant"], summary["dtypes"]) == (VARIANTS[name], ["float16"])
    assert summary["parameters"] == sum(array.size for array in tensors(name).values())


@pytest.mark.parametrize("layout", ["diffusers", "original", "native"])
@pytest.mark.parametrize("parts", [WAN_PIPELINE, FLUX_PIPELINE], ids=["wan", "flux"])
def test_what_a_pipeline_is(parts, layout, tmp_path, capsys):
    place = pipeline_folder(tmp_path / "diffusers", parts)
    if layout != "diffusers":
        convert(open_checkpoint(place), tmp_path / layout, layout)
    summary = inspected(tmp_path / layout, capsys)
    assert (summary["kind"], summary["layout"]) == ("pipeline Tiny", layout)
    assert summary["variant"] == VARIANTS[parts["transformer"]]
    assert {name: part["variant"] for name, part in summary["components"].items()} == {
        place: VARIANTS[name] for place, name in parts.items()
    }
    tokenizers = {place.replace("text_encoder", "tokenizer") for place in parts if "text_encoder" in place}
    assert set(summary["other_components"]) == tokenizers


PUBLISHED = {
    "flux.1-dev": (flux_settings(flux.FLUX_DEV), 11_901_408_320),
    "flux.1-schnell": (flux_settings(flux.FLUX_SCHNELL), 11_891_178_560),
    "wan2.1-t2v-1.3b": (wan_settings(wan.PRESETS["wan2.1-t2v-1.3b"]), 1_418_996_800),
    "wan2.1-i2v-14b": (wan_settings(wan.PRESETS["wan2.1-i2v-14b"]), 16_394_878_784),
    "flux-vae": (vae_kl_settings(vae_kl.FLUX_VAE), 83_819_683),
    "wan2.1-vae": (vae_wan_settings(vae_wan.WanVAEConfig()), 126_892_531),
    "umt5-xxl": (t5_settings(t5.UMT5_XXL), 5_680_910_336),
    "t5-xxl": (t5_settings(t5.T5_XXL), 4_762_310_656),
    "clip-vit-l-14": (clip_text_settings(clip_text.CLIP_L), 123_060_480),
    "clip-vit-h-14-projecting": (clip_vision_settings(ORIGINAL_CLIP), 632_076_800),
}


def sparse_file(file: Path, settings: dict) -> Path:
    """A file with the published shapes in bf16 whose data take no space on the disk."""
    described, kind = component_of(settings, file), kind_to_write(settings)
    header, end = {}, 0
    for row in described.rows:
        shape = described.shapes[row.ours]
        for block in range(shape[0]) if row.stacked(kind.layout) else [None]:
            key = row.key(kind.layout, block)
            outside = row.outside_shape(shape if block is None else shape[1:], kind.layout)
            if key not in header:
                size = int(np.prod(outside)) * np.dtype(ml_dtypes.bfloat16).itemsize
                header[key] = {"dtype": "BF16", "shape": outside, "data_offsets": [end, end + size]}
                end += size
    text = json.dumps(header).encode()
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    return file


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_told_by_their_names(name, tmp_path, capsys):
    settings, parameters = PUBLISHED[name]
    summary = inspected(sparse_file(tmp_path / "renamed.safetensors", settings), capsys)
    assert (summary["variant"], summary["parameters"], summary["dtypes"]) == (name, parameters, ["bfloat16"])


def test_lines_for_people(tmp_path, capsys):
    file = single_file(tmp_path / "any.safetensors", "flux-schnell")
    assert cli.main(["inspect", str(file)]) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == f"{file}: FluxTransformer2DModel in original layout, {VARIANTS['flux-schnell']}"
    assert "parameters, float32, hash " in second and third.split()[:2] == ["(model)", "FluxTransformer2DModel"]
