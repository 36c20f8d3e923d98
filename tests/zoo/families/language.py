"""Architectures of `transformers`: two layers of width 32, no dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zoo.architecture import Architecture

WORDS = 99


def _built(kind: str, auto: str, **options: Any) -> Callable[[], nn.Module]:
    def model() -> nn.Module:
        import transformers

        transformers.utils.logging.set_verbosity_error()
        config = getattr(transformers, f"{kind}Config")(**options)
        return getattr(transformers, auto).from_config(config)

    return model


def _words() -> Tensor:
    return torch.randint(3, WORDS, (4, 16))


def _next_word(outputs: Any, words: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), words[:, 1:].flatten())


def _each_word(outputs: Any, words: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.logits.flatten(0, 1), words.flatten())


def _own(outputs: Any, _: None) -> Tensor:
    return outputs.loss


def _causal(kind: str, **options: Any) -> Architecture:
    """Predicts the next word."""

    def batch() -> tuple[Any, Any]:
        words = _words()
        return {"input_ids": words}, words

    model = _built(kind, "AutoModelForCausalLM", vocab_size=WORDS, pad_token_id=0, **options)
    return Architecture(f"transformers/{kind}", "language", model, batch, _next_word, kind in _DAILY)


def _masked(kind: str, **options: Any) -> Architecture:
    """Predicts the words that were replaced by another."""

    def batch() -> tuple[Any, Any]:
        words = _words()
        return {"input_ids": words.where(torch.rand(words.shape) < 0.7, 2)}, words

    model = _built(kind, "AutoModelForMaskedLM", vocab_size=WORDS, pad_token_id=0, **options)
    return Architecture(f"transformers/{kind}", "language", model, batch, _each_word, kind in _DAILY)


def _translating(kind: str, **options: Any) -> Architecture:
    """Predicts one sequence from another."""

    def batch() -> tuple[Any, Any]:
        words = _words()
        return {"input_ids": _words(), "decoder_input_ids": words}, words

    model = _built(kind, "AutoModelForSeq2SeqLM", vocab_size=WORDS, pad_token_id=0, **options)
    return Architecture(f"transformers/{kind}", "language", model, batch, _next_word, kind in _DAILY)


def _other(
    kind: str,
    family: str,
    auto: str,
    batch: Callable[[], Any],
    loss: Callable[[Any, Any], Tensor],
    uncovered: str = "",
    **options: Any,
) -> Architecture:
    """Images or sounds."""
    model = _built(kind, auto, **options)
    return Architecture(f"transformers/{kind}", family, model, batch, loss, uncovered=uncovered)


_DAILY = {"GPT2", "Mixtral", "T5"}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = {**_SMALL, "num_key_value_heads": 2, "intermediate_size": 64}
_BERT = {**_SMALL, "intermediate_size": 64, **_NO_DROPOUT}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "dropout": 0.0,
}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
_DROP = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_DEEPSEEK = {
    **_LLAMA,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
_VIT = {**_BERT, "image_size": 32, "patch_size": 8}
_SOUND = {
    **_SMALL,
    "intermediate_size": 64,
    "conv_dim": (16, 16, 32),
    "conv_stride": (5, 4, 4),
    "conv_kernel": (10, 8, 4),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 32,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
}


def _images() -> tuple[Any, Any]:
    return {"pixel_values": torch.randn(4, 3, 32, 32)}, torch.arange(4) % 2


def _images_alone() -> tuple[Any, Any]:
    return {"pixel_values": torch.randn(4, 3, 32, 32)}, None


def _class(outputs: Any, classes: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.logits, classes)


def _heard() -> tuple[Any, Any]:
    words = _words()
    return {"input_features": torch.randn(4, 16, 64), "decoder_input_ids": words}, words


def _spelt() -> tuple[Any, Any]:
    return {"input_values": torch.randn(2, 4000), "labels": torch.randint(1, 32, (2, 5))}, None


def _pairs() -> tuple[Any, Any]:
    return {"input_ids": _words(), "pixel_values": torch.randn(4, 3, 32, 32), "return_loss": True}, None


_TEXT = {"vocab_size": WORDS, **_SMALL, "intermediate_size": 64, "eos_token_id": 98}
_SIGHT = {**_SMALL, "intermediate_size": 64, "image_size": 32, "patch_size": 8}

ARCHITECTURES = (
    _causal("GPT2", n_embd=32, n_layer=2, n_head=4, **_DROP),
    _causal("GPTNeo", hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]),
    _causal("GPTNeoX", **_SMALL, intermediate_size=64),
    _causal("GPTJ", n_embd=32, n_layer=2, n_head=4, rotary_dim=4, **_DROP),
    _causal("OPT", **_SMALL, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0),
    _causal("Bloom", hidden_size=32, n_layer=2, n_head=4),
    _causal("Falcon", **_SMALL),
    _causal("Llama", **_LLAMA),
    _causal("Mistral", **_LLAMA),
    _causal("Gemma", **_LLAMA, head_dim=8),
    _causal("Gemma2", **_LLAMA, head_dim=8, query_pre_attn_scalar=8),
    _causal("Phi", **_LLAMA),
    _causal("Qwen2", **_LLAMA),
    _causal("Qwen3", **_LLAMA, head_dim=8),
    _causal("Cohere", **_LLAMA),
    _causal("Mixtral", **_LLAMA, num_local_experts=4, num_experts_per_tok=2),
    _causal("Qwen3Moe", **_LLAMA, head_dim=8, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2),
    _causal("GraniteMoe", **_LLAMA, num_local_experts=4, num_experts_per_tok=2),
    _causal("DeepseekV3", **_DEEPSEEK),
    _causal("Olmoe", **_LLAMA, num_experts=4, num_experts_per_tok=2),
    _causal("Rwkv", hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, intermediate_size=64),
    _causal("Mamba", hidden_size=32, num_hidden_layers=2, state_size=8),
    _causal("RecurrentGemma", **_LLAMA, lru_width=32, block_types=("recurrent", "attention")),
    _masked("Bert", **_BERT),
    _masked("Roberta", **_BERT),
    _masked("Albert", **_BERT, embedding_size=16),
    _masked("Electra", **_BERT, embedding_size=16),
    _masked("Deberta", **_BERT, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    _masked("DebertaV2", **_BERT, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    _masked("DistilBert", dim=32, n_layers=2, n_heads=4, hidden_dim=64, dropout=0.0, attention_dropout=0.0),
    _masked("ModernBert", **_SMALL, intermediate_size=64),
    _masked("FNet", hidden_size=32, num_hidden_layers=2, intermediate_size=64, hidden_dropout_prob=0.0),
    _masked("MobileBert", **_BERT, embedding_size=32, intra_bottleneck_size=32, true_hidden_size=32),
    _masked("SqueezeBert", **_BERT, embedding_size=32),
    _translating("T5", **_T5),
    _translating("Bart", **_BART),
    _translating("Pegasus", **_BART),
    _translating("SwitchTransformers", **_T5, num_experts=4, expert_capacity=64),
    _other(
        "Whisper",
        "speech",
        "AutoModelForSpeechSeq2Seq",
        _heard,
        _next_word,
        **_BART,
        vocab_size=WORDS,
        num_mel_bins=16,
        max_source_positions=32,
        max_target_positions=32,
        pad_token_id=0,
    ),
    _other("Wav2Vec2", "speech", "AutoModelForCTC", _spelt, _own, **_SOUND),
    _other("Hubert", "speech", "AutoModelForCTC", _spelt, _own, **_SOUND),
    _other("CLIP", "vision", "AutoModel", _pairs, _own, text_config=_TEXT, vision_config=_SIGHT, projection_dim=16),
    _other("Siglip", "vision", "AutoModel", _pairs, _own, text_config=_TEXT, vision_config=_SIGHT),
    _other("ViT", "vision", "AutoModelForImageClassification", _images, _class, **_VIT),
    _other(
        "ViTMAE",
        "vision",
        "AutoModelForPreTraining",
        _images_alone,
        _own,
        **_VIT,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    ),
    _other(
        "Dinov2",
        "vision",
        "AutoModelForImageClassification",
        _images,
        _class,
        r".*mask_token",
        **_SMALL,
        image_size=32,
        patch_size=8,
    ),
)
