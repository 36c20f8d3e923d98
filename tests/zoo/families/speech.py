"""Speech models of torchaudio."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.architecture import Architecture, Library

models = Library("torchaudio.models")

Batch = tuple[Any, Any]
LETTERS = 12


def tacotron() -> nn.Module:
    return models.Tacotron2(
        n_mels=8,
        symbol_embedding_dim=16,
        encoder_embedding_dim=16,
        encoder_n_convolution=1,
        attention_rnn_dim=24,
        attention_hidden_dim=8,
        attention_location_n_filter=4,
        attention_location_kernel_size=5,
        attention_dropout=0.0,
        decoder_rnn_dim=24,
        decoder_dropout=0.0,
        prenet_dim=16,
        postnet_n_convolution=2,
        postnet_embedding_dim=16,
        n_symbol=LETTERS,
    )


def spoken() -> Batch:
    letters, frames = torch.randint(0, LETTERS, (2, 6)), torch.randn(2, 8, 10)
    lengths = torch.full((2,), 6), torch.full((2,), 10)
    return (letters, lengths[0], frames, lengths[1]), frames


def frames_before_and_after(outputs: tuple[Tensor, ...], frames: Tensor) -> Tensor:
    """The decoder's frames and those that the postnet has mended, and when to stop."""
    stop = functional.binary_cross_entropy_with_logits(outputs[2], torch.zeros_like(outputs[2]))
    return functional.mse_loss(outputs[0], frames) + functional.mse_loss(outputs[1], frames) + stop


def conformer() -> nn.Module:
    return models.Conformer(16, num_heads=2, ffn_dim=32, num_layers=2, depthwise_conv_kernel_size=5)


def emformer() -> nn.Module:
    return models.Emformer(16, num_heads=2, ffn_dim=32, num_layers=2, segment_length=4, right_context_length=1)


def sequences() -> Batch:
    x = torch.randn(4, 13, 16)
    return (x, torch.full((4,), 13)), x.cumsum(1) / 4


def first_of_both(outputs: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    return functional.mse_loss(outputs[0], target[:, : outputs[0].shape[1]])


def deepspeech() -> nn.Module:
    return models.DeepSpeech(n_feature=8, n_hidden=32, n_class=LETTERS, dropout=0.0)


def spectra() -> Batch:
    return (torch.randn(4, 1, 10, 8),), torch.randint(0, LETTERS, (4, 10))


def frames_of(outputs: Tensor, target: Tensor) -> Tensor:
    return functional.nll_loss(outputs.transpose(1, 2), target)


def convtasnet() -> nn.Module:
    return models.ConvTasNet(
        num_sources=2,
        enc_kernel_size=8,
        enc_num_feats=16,
        msk_num_feats=8,
        msk_num_hidden_feats=16,
        msk_num_layers=2,
        msk_num_stacks=2,
    )


def mixture() -> Batch:
    sources = functional.interpolate(torch.randn(4, 2, 16), scale_factor=8, mode="linear")
    return (sources.sum(1, keepdim=True),), sources


def hdemucs() -> nn.Module:
    return models.HDemucs(sources=["voice", "rest"], audio_channels=1, channels=4, nfft=256, depth=3)


def song() -> Batch:
    sources = functional.interpolate(torch.randn(2, 2, 64), scale_factor=32, mode="linear")
    return (sources.sum(1, keepdim=True),), sources[:, :, None]


def wavernn() -> nn.Module:
    return models.WaveRNN(
        upsample_scales=[2, 2, 2],
        n_classes=16,
        hop_length=8,
        n_res_block=2,
        n_rnn=16,
        n_fc=16,
        n_freq=8,
        n_hidden=16,
        n_output=16,
    )


def waves() -> Batch:
    frames, kernel = 8, 5
    size = (frames - kernel + 1) * 8
    return (torch.randn(2, 1, size), torch.randn(2, 1, 8, frames)), torch.randint(0, 16, (2, size))


def samples_of(outputs: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(outputs[:, 0].transpose(1, 2), target)


def wav2vec() -> nn.Module:
    return models.wav2vec2_model(
        extractor_mode="group_norm",
        extractor_conv_layer_config=[(8, 10, 5), (8, 3, 2)],
        extractor_conv_bias=False,
        encoder_embed_dim=16,
        encoder_projection_dropout=0.0,
        encoder_pos_conv_kernel=4,
        encoder_pos_conv_groups=2,
        encoder_num_layers=2,
        encoder_num_heads=2,
        encoder_attention_dropout=0.0,
        encoder_ff_interm_features=32,
        encoder_ff_interm_dropout=0.0,
        encoder_dropout=0.0,
        encoder_layer_norm_first=False,
        encoder_layer_drop=0.0,
        aux_num_out=LETTERS,
    )


def recording() -> Batch:
    return (torch.randn(4, 165),), torch.randint(0, LETTERS, (4, 15))


def letters_of_first(outputs: tuple[Tensor, Any], target: Tensor) -> Tensor:
    return functional.cross_entropy(outputs[0].transpose(1, 2), target)


MSE = functional.mse_loss

ARCHITECTURES = (
    Architecture("torchaudio/Tacotron2", "speech", tacotron, spoken, frames_before_and_after),
    Architecture("torchaudio/Conformer", "speech", conformer, sequences, first_of_both),
    Architecture("torchaudio/Emformer", "speech", emformer, sequences, first_of_both),
    Architecture("torchaudio/DeepSpeech", "speech", deepspeech, spectra, frames_of),
    Architecture("torchaudio/ConvTasNet", "speech", convtasnet, mixture, MSE),
    Architecture("torchaudio/HDemucs", "speech", hdemucs, song, MSE),
    Architecture("torchaudio/WaveRNN", "speech", wavernn, waves, samples_of),
    Architecture("torchaudio/Wav2Vec2", "speech", wav2vec, recording, letters_of_first),
)
