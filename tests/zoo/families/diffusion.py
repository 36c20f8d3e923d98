"""Denoisers and autoencoders of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.architecture import Architecture, Library

diffusers = Library("diffusers")

Batch = tuple[Any, Any]


def sample(output: Any, target: Tensor) -> Tensor:
    """The squared error of what a denoiser puts out."""
    return functional.mse_loss(output.sample, target)


def mean(output: Any, target: Tensor) -> Tensor:
    return functional.mse_loss(output.sample[:, : target.shape[1]], target)


def image(channels: int, size: int, **more: Callable[[], Tensor]) -> Batch:
    noise = torch.randn(4, channels, size, size)
    named = {name: make() for name, make in more.items()}
    return {"sample": torch.randn(4, channels, size, size), **named}, noise


def steps() -> Tensor:
    return torch.randint(0, 1000, (4,))


def unet() -> nn.Module:
    blocks = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    return diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(16, 32),
        down_block_types=blocks[0],
        up_block_types=blocks[1],
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
    )


def conditional_unet() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=12,
    )


def dit() -> nn.Module:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_num_groups=1,
        dropout=0.0,
    )


def pixart() -> nn.Module:
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        cross_attention_dim=32,
        caption_channels=12,
        use_additional_conditions=False,
        norm_num_groups=1,
    )


def sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=12,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
    )


def flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )


def flux_batch() -> Batch:
    named = {
        "hidden_states": torch.randn(4, 16, 4),
        "encoder_hidden_states": torch.randn(4, 5, 12),
        "pooled_projections": torch.randn(4, 16),
        "timestep": torch.rand(4),
        "img_ids": torch.randint(0, 4, (16, 3)).float(),
        "txt_ids": torch.zeros(5, 3),
    }
    return named, torch.randn(4, 16, 4)


def sd3_batch() -> Batch:
    named = {
        "hidden_states": torch.randn(4, 4, 8, 8),
        "encoder_hidden_states": torch.randn(4, 5, 12),
        "pooled_projections": torch.randn(4, 16),
        "timestep": steps(),
    }
    return named, torch.randn(4, 4, 8, 8)


def dit_batch() -> Batch:
    named = {
        "hidden_states": torch.randn(4, 4, 8, 8),
        "timestep": steps(),
        "class_labels": torch.randint(0, 10, (4,)),
    }
    return named, torch.randn(4, 4, 8, 8)


def pixart_batch() -> Batch:
    named = {
        "hidden_states": torch.randn(4, 4, 8, 8),
        "timestep": steps(),
        "encoder_hidden_states": torch.randn(4, 5, 12),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return named, torch.randn(4, 4, 8, 8)


def prior() -> nn.Module:
    return diffusers.PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        embedding_dim=32,
        num_embeddings=7,
        additional_embeddings=4,
        dropout=0.0,
    )


def prior_batch() -> Batch:
    named = {
        "hidden_states": torch.randn(4, 32),
        "timestep": steps(),
        "proj_embedding": torch.randn(4, 32),
        "encoder_hidden_states": torch.randn(4, 7, 32),
    }
    return named, torch.randn(4, 32)


def predicted(output: Any, target: Tensor) -> Tensor:
    return functional.mse_loss(output.predicted_image_embedding, target)


def uvit() -> nn.Module:
    return diffusers.UVit2DModel(
        hidden_size=32,
        cond_embed_dim=16,
        encoder_hidden_size=16,
        micro_cond_encode_dim=2,
        micro_cond_embed_dim=10,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=33,
        codebook_size=32,
        block_out_channels=32,
        block_num_heads=2,
        in_channels=32,
        intermediate_size=64,
        sample_size=8,
    )


def uvit_batch() -> Batch:
    named = {
        "input_ids": torch.randint(0, 33, (4, 8, 8)),
        "encoder_hidden_states": torch.randn(4, 5, 16),
        "pooled_text_emb": torch.randn(4, 16),
        "micro_conds": torch.rand(4, 5),
    }
    return named, torch.randint(0, 32, (4, 8, 8))


def autoencoder() -> nn.Module:
    return diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(16, 32),
        latent_channels=4,
        norm_num_groups=4,
    )


def vector_quantised() -> nn.Module:
    return diffusers.VQModel(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(16, 32),
        latent_channels=3,
        norm_num_groups=4,
        num_vq_embeddings=32,
    )


def audio() -> nn.Module:
    return diffusers.UNet1DModel(
        sample_size=64,
        in_channels=2,
        out_channels=2,
        down_block_types=("DownBlock1DNoSkip", "AttnDownBlock1D"),
        up_block_types=("AttnUpBlock1D", "UpBlock1DNoSkip"),
        block_out_channels=(32, 32),
        extra_in_channels=64,
    )


def audio_batch() -> Batch:
    return {"sample": torch.randn(4, 2, 64), "timestep": steps()}, torch.randn(4, 2, 64)


def text() -> Tensor:
    return torch.randn(4, 5, 12)


def autoencoded() -> Batch:
    pictures = functional.interpolate(torch.randn(4, 3, 4, 4), scale_factor=4, mode="bilinear")
    return (pictures,), pictures


ARCHITECTURES = (
    Architecture("diffusers/UNet2D", "diffusion", unet, lambda: image(3, 16, timestep=steps), sample),
    Architecture(
        "diffusers/UNet2DCondition",
        "diffusion",
        conditional_unet,
        lambda: image(4, 16, timestep=steps, encoder_hidden_states=text),
        sample,
    ),
    Architecture("diffusers/DiT", "diffusion", dit, dit_batch, mean),
    Architecture("diffusers/PixArt", "diffusion", pixart, pixart_batch, mean),
    Architecture("diffusers/SD3", "diffusion", sd3, sd3_batch, sample),
    Architecture("diffusers/Flux", "diffusion", flux, flux_batch, sample),
    Architecture(  # its statistics of embeddings serve after the denoising, not in it
        "diffusers/PriorTransformer", "diffusion", prior, prior_batch, predicted, uncovered="clip_(mean|std)"
    ),
    Architecture("diffusers/UVit2D", "diffusion", uvit, uvit_batch, functional.cross_entropy),
    Architecture("diffusers/UNet1D", "diffusion", audio, audio_batch, sample),
    Architecture("diffusers/AutoencoderKL", "diffusion", autoencoder, autoencoded, sample),
    Architecture("diffusers/VQModel", "diffusion", vector_quantised, autoencoded, sample),
)
