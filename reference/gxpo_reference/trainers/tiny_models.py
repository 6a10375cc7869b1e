"""Language models and a tokenizer of a few thousand numbers, made in memory: no hub, no files."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

ARCHITECTURES = {"tiny-qwen2": (Qwen2Config, Qwen2ForCausalLM), "tiny-llama": (LlamaConfig, LlamaForCausalLM)}
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
WORDS = (*"0123456789", *"+-=:?.", "repeat", "the", "digit", "sum", "of", "and", "is")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of WORDS, each digit by itself; every other word is <unk>."""
    vocabulary = {word: n for n, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


def tiny_model(name: str = "tiny-qwen2", seed: int = 0, hidden: int = 16, dropout: float = 0.0) -> PreTrainedModel:
    """A random model of two layers for tiny_tokenizer().

    name: "tiny-qwen2" or "tiny-llama"; KeyError for another. seed: of its weights. hidden: width, a multiple of 4.
    dropout: of the attention, a probability.
    """
    config_class, model_class = ARCHITECTURES[name]
    config = config_class(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        attention_dropout=dropout,
        initializer_range=0.2,  # the usual 0.02 makes so narrow a model deaf to its prompt
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config)
