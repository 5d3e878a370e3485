"""Trains the tokenizer: byte-pair encoding over characters, with a byte fallback.

Nothing is normalized and no space is replaced, so every text comes back exactly as it went in.
"""

import json
import unicodedata
from collections.abc import Iterator
from itertools import chain
from typing import Any, Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from inference_worker.default_model import corpus, words
from inference_worker.default_model.topics import TOPICS

VOCABULARY_SIZE: Final = 1792
IM_START: Final = "<|im_start|>"
IM_END: Final = "<|im_end|>"
END_OF_TEXT: Final = "<|endoftext|>"
SPECIAL_TOKENS: Final = (END_OF_TEXT, IM_START, IM_END)
TRAINING_SAMPLES: Final = 12_000

# Line ends alone, Chinese signs and digits one by one, words and signs with the space before them.
_PATTERN: Final = (
    r"\n| ?\p{Han}| ?[\p{L}&&[^\p{Han}]][[\p{L}\p{M}]&&[^\p{Han}]]*| ?\p{N}"
    r"| ?[^\s\p{L}\p{N}]+|[^\S\n]+(?!\S)|[^\S\n]+"
)
_PRINTABLE: Final = ["\n", "\t", *map(chr, range(32, 127))]

CHAT_TEMPLATE: Final = """\
{%- macro text(content) -%}
{%- if content is string -%}
{{- content -}}
{%- elif content -%}
{%- for part in content if part is mapping and part['text'] is string -%}
{{- part['text'] -}}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set dialog = messages -%}
{%- if tools -%}
{{- '<|im_start|>system\\n' -}}
{%- if dialog and dialog[0]['role'] in ('system', 'developer') -%}
{{- text(dialog[0]['content']) + '\\n\\n' -}}
{%- set dialog = dialog[1:] -%}
{%- endif -%}
{{- 'Tools: ' -}}
{%- for tool in tools -%}
{%- set function = tool['function'] if tool['function'] else tool -%}
{%- set parameters = (function['parameters'] or {})['properties'] or {} -%}
{{- function['name'] + '(' + parameters | join(', ') + ')' -}}
{{- '' if loop.last else ', ' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in dialog -%}
{%- set role = 'system' if message['role'] == 'developer' else message['role'] -%}
{{- '<|im_start|>' + role + '\\n' + text(message['content']) -}}
{%- for call in message['tool_calls'] or [] -%}
{%- set function = call['function'] if call['function'] else call -%}
{%- set given = function['arguments'] -%}
{{- '\\n' if message['content'] or not loop.first else '' -}}
{{- '<tool_call>\\n{"name": ' + function['name'] | tojson + ', "arguments": ' -}}
{{- (given if given is string else given | tojson) + '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

TOKENIZER_CONFIG: Final[dict[str, Any]] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": 2048,
    "clean_up_tokenization_spaces": False,
    "add_bos_token": False,
    "add_eos_token": False,
    "bos_token": None,
    "eos_token": IM_END,
    "pad_token": END_OF_TEXT,
    "unk_token": None,
    "padding_side": "left",
    "model_input_names": ["input_ids", "attention_mask"],
}


def _known_letters() -> frozenset[str]:
    texts = (text for topic in TOPICS for text in (*topic.questions, topic.answer))
    return frozenset(c for text in texts for c in text if unicodedata.category(c)[0] in "LP")


def _training_texts() -> Iterator[str]:
    # Each text counts once: otherwise an answer known by heart would become one single token.
    letters = _known_letters()
    for text in dict.fromkeys(corpus.texts(TRAINING_SAMPLES)):
        # Emoji and rare scripts get no tokens of their own: they go through the byte fallback.
        yield "".join(c for c in text if c.isascii() or c in letters)
    for topic in TOPICS:
        yield from ["".join(c for c in topic.answer if c.isascii() or c in letters)] * 8
    for role in ("system", "user", "assistant", "tool"):
        yield from [role] * 1000
    listed = (words.NOUNS, words.ADJECTIVES, words.VERBS, words.ACTIONS, words.BASE_ACTIONS)
    for word in (*chain(*listed), *" ".join(words.CLAUSES).split()):
        yield from [f" {word}"] * 30


def _splitter() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated")


def train_tokenizer() -> Tokenizer:
    """Learns the merges from the corpus and puts the 256 byte tokens in front of them."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = _splitter()
    byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
    reserved = [*SPECIAL_TOKENS, *byte_tokens]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(reserved),
        initial_alphabet=_PRINTABLE,
        special_tokens=[],
        show_progress=False,
    )
    learner.train_from_iterator(_training_texts(), trainer)
    learned = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    vocabulary = {token: index for index, token in enumerate(reserved)}
    for token, _ in learned:
        vocabulary[token] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=_merges(learner), byte_fallback=True))
    tokenizer.pre_tokenizer = _splitter()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return tokenizer


def _merges(learner: Tokenizer) -> list[tuple[str, str]]:
    return [(left, right) for left, right in json.loads(learner.to_str())["model"]["merges"]]


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that has to exist."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise KeyError(token)
    return int(found)
