"""Architectures of `transformers`: two layers of width 32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.architecture import Architecture

WORDS = 99


def _causal(kind: str, **options: Any) -> Architecture:
    def model() -> nn.Module:
        import transformers

        transformers.utils.logging.set_verbosity_error()
        config = getattr(transformers, f"{kind}Config")(**options)
        return transformers.AutoModelForCausalLM.from_config(config)

    def batch() -> tuple[Any, Any]:
        words = torch.randint(3, WORDS, (4, 16))
        return {"input_ids": words}, words

    return Architecture(f"transformers/{kind}", "language", model, batch, _next_word, daily=kind in _DAILY)


def _next_word(outputs: Any, words: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), words[:, 1:].flatten())


_LLAMA = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "pad_token_id": 0,
}
_DAILY = {"GPT2", "Mixtral"}

ARCHITECTURES = (
    _causal("GPT2", vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    _causal("Llama", **_LLAMA),
    _causal("Mixtral", **_LLAMA, num_local_experts=4, num_experts_per_tok=2),
)
