"""Small Wan pipelines of diffusers with random weights everywhere, saved as directories."""

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

WORDS = ["a", "red", "blue", "cat", "dog", "fish", "runs", "sleeps", "on", "under", "the", "moon", "<", ">", "&"]
TEXT_WIDTH, IMAGE_WIDTH = 24, 20


def tokenizer():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -3.0)]
    pieces += [(f"▁{word}", -2.0 - i / 10) for i, word in enumerate(WORDS)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def randomise(model, seed=0):
    """Ordinary random weights of this seed alone, around one where all were one, norms and gates included."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.data.eq(parameter.data.flatten()[0]).all():
            parameter.data = parameter.data + 0.2 * noise
        else:
            parameter.data = noise * (0.2 if parameter.ndim < 2 else parameter[0].numel() ** -0.5)
    return model.eval()


def transformer(image: bool, positions: int | None = None):
    return randomise(
        WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, ffn_dim=40, num_layers=3,
            in_channels=12 if image else 4, out_channels=4, text_dim=TEXT_WIDTH, freq_dim=32, cross_attn_norm=True,
            image_dim=IMAGE_WIDTH if image else None, added_kv_proj_dim=32 if image else None,
            pos_embed_seq_len=positions,
        )
    )  # fmt: skip


def vae():
    return randomise(
        AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1, temperal_downsample=[False, True, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.1, 0.9, 1.3, 0.8],
        )
    )  # fmt: skip


def residual_vae():
    """As Wan 2.2's: 16x16 pixels a latent, shortcuts round the levels."""
    return randomise(
        AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1, temperal_downsample=[False, True, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.1, 0.9, 1.3, 0.8], is_residual=True, patch_size=2,
            in_channels=12, out_channels=12, scale_factor_spatial=16,
        )
    )  # fmt: skip


def text_encoder():
    config = UMT5Config(
        vocab_size=64, d_model=TEXT_WIDTH, d_kv=6, d_ff=32, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return randomise(UMT5EncoderModel(config))


def image_encoder():
    config = CLIPVisionConfig(
        hidden_size=IMAGE_WIDTH,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    return randomise(CLIPVisionModel(config))


def scheduler():
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def text_to_video():
    return WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=text_encoder(),
        vae=vae(),
        scheduler=scheduler(),
        transformer=transformer(False),
    )


def expert(image: bool, seed: int):
    """One of Wan 2.2's: a first frame comes as channels alone."""
    return randomise(
        WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, ffn_dim=40, num_layers=2,
            in_channels=12 if image else 4, out_channels=4, text_dim=TEXT_WIDTH, freq_dim=32, cross_attn_norm=True,
        ),
        seed,
    )  # fmt: skip


def two_experts(image: bool):
    """As Wan 2.2's A14B: four steps are two of each expert's."""
    return (WanImageToVideoPipeline if image else WanPipeline)(
        tokenizer=tokenizer(),
        text_encoder=text_encoder(),
        vae=vae(),
        scheduler=scheduler(),
        transformer=expert(image, 1),
        transformer_2=expert(image, 2),
        boundary_ratio=0.875,
    )


def text_or_image():
    """As Wan 2.2's TI2V-5B, which runs with and without a first frame."""
    return WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=text_encoder(),
        vae=residual_vae(),
        scheduler=scheduler(),
        transformer=expert(False, 3),
        expand_timesteps=True,
    )


def image_to_video(first_and_last: bool = False):
    """With one image, or with two, of five tokens each."""
    size = {"height": 28, "width": 28}
    return WanImageToVideoPipeline(
        tokenizer=tokenizer(),
        text_encoder=text_encoder(),
        vae=vae(),
        scheduler=scheduler(),
        transformer=transformer(True, 10 if first_and_last else None),
        image_encoder=image_encoder(),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=size),
    )
