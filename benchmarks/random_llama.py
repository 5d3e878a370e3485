"""A Llama of random weights as a checkpoint on disk, with a tokenizer, so that any server can load it.

`python -m benchmarks.random_llama FOLDER` writes the one of 10 million parameters.

Its text is noise, but what a step costs depends on shapes, not on what the weights mean.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import count, islice, product
from pathlib import Path
from string import ascii_lowercase
from typing import Final

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END: Final = "<|end|>"
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}{{ 'answer ' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama whose output head is not tied to its embedding."""

    vocabulary: int = 8192
    hidden: int = 256
    intermediate: int = 768
    layers: int = 8
    heads: int = 8
    kv_heads: int = 4
    context: int = 2048
    logit_deviation: float = (
        1.0  # of the logits; at 1 thousands of tokens are likely, at 6 a few dozen
    )

    @property
    def num_parameters(self) -> int:
        head_dim = self.hidden // self.heads
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * head_dim
        mlp = 3 * self.hidden * self.intermediate
        norms = 2 * self.hidden
        layers = self.layers * (attention + mlp + norms)
        return 2 * self.vocabulary * self.hidden + layers + self.hidden

    def __str__(self) -> str:
        return (
            f"Llama of {self.num_parameters / 1e6:.1f} million random parameters (vocabulary {self.vocabulary}, "
            f"hidden {self.hidden}, intermediate {self.intermediate}, {self.layers} layers, {self.heads} heads, "
            f"{self.kv_heads} KV heads, output head not tied)"
        )


TEN_MILLION: Final = Shape()


def write_random_llama(folder: Path, shape: Shape = TEN_MILLION) -> None:
    """Write the checkpoint, float32, always the same one.

    A greedy choice never ends a text nor leaves a character unfinished: the head's rows of the end token and of bytes
    that only stand inside characters are zero, and among thousands of random logits some are above zero.
    """
    tokenizer = _tokenizer(shape.vocabulary)
    end = shape.vocabulary - 1
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=shape.context,
            bos_token_id=None,
            eos_token_id=end,
            pad_token_id=end,
            tie_word_embeddings=False,
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                # activations keep their size from layer to layer, so that attention and logits vary
                deviation = 1.0 if "embed" in name else parameter.shape[1] ** -0.5
                parameter.normal_(std=deviation)
        model.lm_head.weight *= shape.logit_deviation
        model.lm_head.weight[[end, *_ids_of_partial_bytes(tokenizer)]] = 0
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=shape.context,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def _tokenizer(size: int) -> Tokenizer:
    """Byte-level BPE: every byte, small letters in twos, threes and so on as far as there is room, and END."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = (
        "".join(word) for length in count(2) for word in product(ascii_lowercase, repeat=length)
    )
    tokens = [*alphabet, *islice(words, size - len(alphabet) - 1), END]
    merges = [(token[:-1], token[-1]) for token in tokens[len(alphabet) : -1]]
    model = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return tokenizer


def _ids_of_partial_bytes(tokenizer: Tokenizer) -> list[int]:
    """The bytes from 0x80 on, which byte-level BPE writes as characters beyond the letters, and the space's marks."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    return [i for token, i in vocabulary.items() if len(token) == 1 and ord(token) > 0x7E]


if __name__ == "__main__":
    write_random_llama(Path(sys.argv[1]))
