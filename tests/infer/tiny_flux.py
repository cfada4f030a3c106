"""Small FLUX pipelines of diffusers with random weights everywhere, saved as directories."""

import string

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tiny_wan import randomise, tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

TEXT_WIDTH, POOLED_WIDTH, CHANNELS = 24, 16, 4


def clip_tokenizer():
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    merged = ["re", "red</w>", "ca", "cat</w>"]
    merges = [("r", "e"), ("re", "d</w>"), ("c", "a"), ("ca", "t</w>")]
    words = [*letters, *merged, "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=merges, model_max_length=77)


def clip():
    vocabulary = len(clip_tokenizer())
    config = CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=POOLED_WIDTH, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=77, eos_token_id=vocabulary - 1, bos_token_id=vocabulary - 2,
    )  # fmt: skip
    return randomise(CLIPTextModel(config))


def t5():
    config = T5Config(
        vocab_size=64, d_model=TEXT_WIDTH, d_kv=6, d_ff=32, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return randomise(T5EncoderModel(config))


def transformer(guidance: bool):
    return randomise(
        FluxTransformer2DModel(
            in_channels=4 * CHANNELS, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=POOLED_WIDTH, guidance_embeds=guidance,
            axes_dims_rope=(4, 6, 6),
        )
    )  # fmt: skip


def vae():
    torch.manual_seed(0)
    return randomise(
        AutoencoderKL(
            block_out_channels=(8, 8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, latent_channels=CHANNELS, norm_num_groups=4,
            sample_size=64, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.36, shift_factor=0.12,
        )
    )  # fmt: skip


def pipeline(dev: bool):
    """As FLUX.1 dev (guidance embedded, dynamic shift) or schnell (neither)."""
    shift = dict(use_dynamic_shifting=True, shift=3.0) if dev else dict(use_dynamic_shifting=False, shift=1.0)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**shift),
        vae=vae(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(),
        transformer=transformer(guidance=dev),
    )
