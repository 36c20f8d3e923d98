"""Models of the transformers library that nobody here wrote: tiny random configurations, and tasks to train on.

Every maker is given the library, so that this module does not import it. The inputs hold `labels` (or
`return_loss`), so that the models compute a loss; `TASK` names them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, CLASSES = 48, 4
TASK = ("labels", "return_loss")


def _words(rows: int = 8, length: int = 12, seed: int = 7) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def _classes(rows: int = 8) -> Tensor:
    return torch.arange(rows) % CLASSES


def _language() -> dict[str, Any]:
    return {"input_ids": _words(), "labels": _words()}


def _masked() -> dict[str, Any]:
    return {"input_ids": _words(), "labels": _words(seed=8)}


def _sequences() -> dict[str, Any]:
    return {"input_ids": _words(), "decoder_input_ids": _words(8, 6, 9), "labels": _words(8, 6, 8)}


def _images() -> dict[str, Any]:
    return {"pixel_values": _normal(8, 3, 16, 16), "labels": _classes()}


def _captions() -> dict[str, Any]:
    return {"input_ids": _words(8, 8), "pixel_values": _normal(8, 3, 16, 16), "return_loss": True}


def _sound() -> dict[str, Any]:
    return {
        "input_features": _normal(4, 8, 40),
        "decoder_input_ids": _words(4, 6),
        "labels": _words(4, 6, 9),
    }


def _speech() -> dict[str, Any]:
    return {"input_values": _normal(4, 400), "labels": _classes(4)}


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
DROPPED = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _bert(tf: Any) -> nn.Module:
    return tf.BertForMaskedLM(tf.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=16, **SMALL, **DROPPED))


def _distilbert(tf: Any) -> nn.Module:
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 16}
    config = tf.DistilBertConfig(
        vocab_size=VOCABULARY, dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0, num_labels=CLASSES, **sizes
    )
    return tf.DistilBertForSequenceClassification(config)


def _gpt2(tf: Any) -> nn.Module:
    dropped = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = tf.GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, **dropped
    )
    return tf.GPT2LMHeadModel(config)


def _llama(tf: Any) -> nn.Module:
    config = tf.LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, max_position_embeddings=16, **SMALL)
    return tf.LlamaForCausalLM(config)


def _mistral(tf: Any) -> nn.Module:
    config = tf.MistralConfig(
        vocab_size=VOCABULARY, num_key_value_heads=2, sliding_window=8, max_position_embeddings=16, **SMALL
    )
    return tf.MistralForCausalLM(config)


def _t5(tf: Any) -> nn.Module:
    config = tf.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        decoder_start_token_id=0,
    )
    return tf.T5ForConditionalGeneration(config)


def _vit(tf: Any) -> nn.Module:
    return tf.ViTForImageClassification(tf.ViTConfig(image_size=16, patch_size=4, num_labels=CLASSES, **SMALL))


def _swin(tf: Any) -> nn.Module:
    config = tf.SwinConfig(
        image_size=16,
        patch_size=2,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        drop_path_rate=0.0,
        num_labels=CLASSES,
    )
    return tf.SwinForImageClassification(config)


def _convnext(tf: Any) -> nn.Module:
    config = tf.ConvNextConfig(
        image_size=16, patch_size=2, num_stages=2, hidden_sizes=[16, 32], depths=[2, 2], num_labels=CLASSES
    )
    return tf.ConvNextForImageClassification(config)


def _mamba(tf: Any) -> nn.Module:
    config = tf.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2)
    return tf.MambaForCausalLM(config)


def _whisper(tf: Any) -> nn.Module:
    config = tf.WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=8,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=20,
        max_target_positions=12,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return tf.WhisperForConditionalGeneration(config)


def _clip(tf: Any) -> nn.Module:
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
    vision = {"image_size": 16, "patch_size": 4}
    return tf.CLIPModel(tf.CLIPConfig(text_config=SMALL | text, vision_config=SMALL | vision, projection_dim=16))


def _wav2vec2(tf: Any) -> nn.Module:
    config = tf.Wav2Vec2Config(
        vocab_size=VOCABULARY,
        conv_dim=[16, 16],
        conv_kernel=[10, 4],
        conv_stride=[5, 2],
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
        hidden_dropout=0.0,
        activation_dropout=0.0,
        attention_dropout=0.0,
        feat_proj_dropout=0.0,
        layerdrop=0.0,
        apply_spec_augment=False,
        num_labels=CLASSES,
        classifier_proj_size=16,
        **SMALL,
    )
    return tf.Wav2Vec2ForSequenceClassification(config)


HUB: dict[str, tuple[Callable[[Any], nn.Module], Callable[[], dict[str, Any]]]] = {
    "bert": (_bert, _masked),
    "distilbert": (_distilbert, lambda: {"input_ids": _words(), "labels": _classes()}),
    "gpt2": (_gpt2, _language),
    "llama": (_llama, _language),
    "mistral": (_mistral, _language),
    "t5": (_t5, _sequences),
    "vit": (_vit, _images),
    "swin": (_swin, _images),
    "convnext": (_convnext, _images),
    "mamba": (_mamba, _language),
    "whisper": (_whisper, _sound),
    "clip": (_clip, _captions),
    "wav2vec2": (_wav2vec2, _speech),
}
