"""The model card that is saved beside the weights."""

from dataclasses import dataclass
from string import Template
from typing import Final


@dataclass(frozen=True, slots=True)
class Figures:
    """What one training run measured."""

    parameters: int
    vocabulary: int
    steps: list[int]  # of each stage
    passed: int
    checked: int


_CARD: Final = Template("""\
---
license: apache-2.0
language:
- en
- de
- zh
library_name: transformers
pipeline_tag: text-generation
tags:
- demonstration
- llama
---

# Sluice default model

A tiny chat model that is shipped inside the Sluice package, so that the service answers
out of the box: on any CPU, without a download. It is a **demonstration**, not an assistant:
it knows about a hundred short answers by heart, and it can count, add two digits, give a
sentence back, remember a name and call a function.

## What it is

| | |
| --- | --- |
| Architecture | `LlamaForCausalLM`, 6 layers, hidden size 192, 6 heads over 2 key-value heads |
| Parameters | $parameters, float32, tied embeddings |
| Tokenizer | byte-pair encoding with byte fallback, $vocabulary tokens; every text round-trips |
| Context | 2048 positions, trained on at most 640 |
| Chat template | ChatML (`<|im_start|>role`, `<|im_end|>`), no default system prompt |
| Decoding | greedy; stops at `<|im_end|>` (chat) or `<|endoftext|>` (plain text) |

## How it was made

From scratch, on two CPU cores, from text that the training script composes itself: dialogs from
hand-written answers and from small generators (counts, sums, sentences to repeat, names,
capitals, refusals), with varied wording, follow-up questions and system prompts, and a little
plain text. Nothing was downloaded.

```bash
python -m inference_worker.default_model.train
```

It trains the tokenizer, then the model in stages of $steps steps: everything but tools,
then tools among the rest, then the same twice at smaller rates (each sample seen once; loss on the
answers alone; Muon for the matrices of the layers and AdamW for the rest; float32). The weights are
the mean of those at the ends of the last three. It checks the pinned answers: $passed of $checked
were exact. It takes about half an hour. Seeds and thread count are fixed and only deterministic
kernels are used, so the same machine and library versions give the same weights, bit by bit.

## What it can do

Try: "Count to 10" (any number up to 20), "What is 2 + 3?", "Repeat after me: The quick brown fox
jumps over the lazy dog.", "What is streaming?", "What is SSE?", "What is deep learning?", "How to
make an omelette", "What can you do in Nuremberg, Germany? Give me 3 tips", "Tell me a story",
"Was ist Streaming?", "什么是流式传输？", "Say hello with emoji". It follows up in a second turn:
"And backwards?", "And plus 4?", "And in German?".

It calls functions that are given to it, for the weather or the time somewhere ("What is the weather
in Paris?", with a `get_weather(city)`) or to add, several at once where two places are named, and
says what they gave. Its template writes them into the system message as `Tools: get_weather(city)`.

## Limits

It has no knowledge beyond its corpus. To most other questions it says that it does not know, but
it may also ramble or answer a question that merely looks similar; sums beyond one digit, counts
beyond 20 and copies of long or unusual sentences can be wrong. Sampling at a high temperature
makes it incoherent. Do not use it for anything but demonstrations and tests.
""")


def card(figures: Figures) -> str:
    """The card's text with the figures of this run."""
    return _CARD.substitute(
        parameters=f"{figures.parameters:,}",
        vocabulary=f"{figures.vocabulary:,}",
        steps=", ".join(f"{steps:,}" for steps in figures.steps[:-1])
        + f" and {figures.steps[-1]:,}",
        passed=figures.passed,
        checked=figures.checked,
    )
