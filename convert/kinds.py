"""The sorts of files that authors publish: by which keys each is known, what its shapes tell, how we call it.

The authors of Wan and FLUX keep in code what diffusers keeps in configs, so that a file is described from its shapes
and from the constants of the published models. Names of files tell nothing: people rename them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from convert import shapes
from convert.components import Settings, class_name
from convert.safetensors_files import Tensor
from convert.tables import Layout

# What ComfyUI puts before the keys of a model, alone in its file or beside its VAE and text encoders -> their classes.
PREFIXES = {
    "model.diffusion_model.": ("WanTransformer3DModel", "FluxTransformer2DModel"),
    "diffusion_model.": ("WanTransformer3DModel", "FluxTransformer2DModel"),
    "vae.": ("AutoencoderKLWan", "AutoencoderKL"),
    "text_encoders.clip_l.transformer.": ("CLIPTextModel",),
    "text_encoders.t5xxl.transformer.": ("T5EncoderModel",),
    "text_encoders.umt5xxl.transformer.": ("UMT5EncoderModel",),
}
# What it saves beside its text encoders: a number of CLIP's training (of T5 too) and the tokenizer's bytes.
BESIDE_ENCODERS = re.compile(r"text_encoders\.(\w+\.)?(logit_scale|spiece_model)")
_LORA = re.compile(r"\.(lora|hada|lokr|dora)_|^lora_|\.diff(_b)?$")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One sort of file of weights.

    name      for people
    classes   the classes of diffusers or transformers that it is the weights of
    place     its component in a pipeline
    keys      how the keys in such a file begin
    layout    the column of the tables that has its keys
    settings  (tensors, the authors' config.json or {}) -> the config of diffusers or transformers that the shapes imply
    stem      the class's config -> name of the file when we write it, without suffix; None where we write another kind
    """

    name: str
    classes: tuple[str, ...]
    place: str
    keys: re.Pattern[str]
    layout: Layout
    settings: Callable[[Mapping[str, Tensor], Settings], Settings]
    stem: Callable[[Settings], str] | None


def _keys(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.VERBOSE)


_T5_KEYS = r"(shared|encoder\.(embed_tokens|final_layer_norm))\.|spiece_model | encoder\.block\."

KINDS = (
    Kind(
        name="Wan transformer",
        classes=("WanTransformer3DModel",),
        place="transformer",
        keys=_keys(
            r"(patch_embedding|text_embedding|time_embedding|time_projection|head|img_emb)\."
            r"| blocks\.\d+\.(self_attn|cross_attn|norm3|modulation|ffn\.[02])\b"
        ),
        layout="original",
        settings=shapes.wan,
        stem=lambda settings: "diffusion_pytorch_model",
    ),
    Kind(
        name="FLUX transformer",
        classes=("FluxTransformer2DModel",),
        place="transformer",
        keys=_keys(r"(img_in|txt_in|time_in|vector_in|guidance_in|final_layer|double_blocks|single_blocks)\."),
        layout="original",
        settings=shapes.flux,
        stem=lambda settings: "flux1-dev" if settings.get("guidance_embeds") else "flux1-schnell",
    ),
    Kind(
        name="Wan VAE",
        classes=("AutoencoderKLWan",),
        place="vae",
        keys=_keys(r"(encoder|decoder)\.(conv1|middle|downsamples|upsamples|head)\. | conv[12]\."),
        layout="original",
        settings=shapes.vae_wan,
        stem=lambda settings: "Wan2.2_VAE" if settings.get("is_residual") else "Wan2.1_VAE",
    ),
    Kind(
        name="FLUX autoencoder",
        classes=("AutoencoderKL",),
        place="vae",
        keys=_keys(r"(encoder|decoder)\.(conv_in|conv_out|norm_out|mid|down|up)\. | (post_)?quant_conv\."),
        layout="original",
        settings=shapes.vae_kl,
        stem=lambda settings: "ae",
    ),
    Kind(
        name="UMT5 encoder",
        classes=("UMT5EncoderModel",),
        place="text_encoder",
        keys=_keys(r"(token_embedding|norm)\. | blocks\.\d+\.(norm[12]|attn|pos_embedding|ffn\.(gate|fc))\b"),
        layout="original",
        settings=shapes.umt5,
        stem=lambda settings: "models_t5_umt5-xxl-enc-bf16",
    ),
    Kind(
        name="CLIP image encoder",
        classes=("CLIPVisionModelWithProjection", "CLIPVisionModel"),
        place="image_encoder",
        keys=_keys(r"visual\. | textual\. | log_scale"),
        layout="original",
        settings=shapes.clip_vision,
        stem=lambda settings: "models_clip_open-clip-xlm-roberta-large-vit-huge-14",
    ),
    Kind(
        name="T5 encoder",
        classes=("T5EncoderModel",),
        place="text_encoder_2",
        # T5 has a table of relative positions in its first block only, UMT5 in every one.
        keys=_keys(_T5_KEYS + r"(0\.|\d+\.(?!layer\.0\.SelfAttention\.relative_attention_bias))"),
        layout="diffusers",
        settings=shapes.t5,
        stem=lambda settings: "t5xxl",
    ),
    Kind(
        name="UMT5 encoder",
        classes=("UMT5EncoderModel",),
        place="text_encoder",
        keys=_keys(_T5_KEYS),
        layout="diffusers",
        settings=shapes.t5,
        stem=None,
    ),
    Kind(
        name="CLIP text encoder",
        classes=("CLIPTextModel",),
        place="text_encoder",
        keys=_keys(r"text_model\. | text_projection\. | logit_scale"),
        layout="diffusers",
        settings=shapes.clip_text,
        stem=lambda settings: "clip_l",
    ),
)


def kind_of(keys: Iterable[str]) -> Kind | None:
    """The kind that explains most of a file's keys; None when none explains half of them."""
    keys = list(keys)
    explained = {kind: sum(bool(kind.keys.match(key)) for key in keys) for kind in KINDS}
    best = max(KINDS, key=lambda kind: explained[kind])
    return best if 0 < len(keys) <= 2 * explained[best] else None


def kind_to_write(settings: Settings) -> Kind | None:
    """The kind that a model's weights are written as; None where the original layout has no place for it."""
    return next((kind for kind in KINDS if class_name(settings) in kind.classes and kind.stem), None)


def holds_lora(keys: Iterable[str]) -> bool:
    """Whether a file holds low-rank or other differences to a model in place of a model."""
    return any(_LORA.search(key) for key in keys)
