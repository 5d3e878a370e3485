"""The embedded default model: its files, its tokenizer, its corpus and its greedy answers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from inference_worker.default_model import CHECKPOINT, corpus
from inference_worker.default_model.answers import PLAIN_TEXTS
from inference_worker.default_model.batches import Encoder
from inference_worker.default_model.pinned import (
    Pinned,
    computed,
    failures,
    pinned,
    with_tools,
)
from inference_worker.default_model.tools import Call, tools_text
from inference_worker.default_model.train_tokenizer import train_tokenizer

PINNED: list[Pinned] = json.loads(
    (Path(__file__).parent / "pinned_answers.json").read_text(encoding="utf-8")
)
AWKWARD_TEXTS = (
    "",
    " ",
    "  two  spaces  ",
    "\n\n\ttab\r\n",
    "▁lower ▁block▁",
    "<0x41> <0xF0><0x9F>",
    "👩‍💻👋🏽🏳️‍🌈👨‍👩‍👧‍👦",
    "e\u0301 a\u0308\u0323",
    "流式传输 漢字カナ 한글",
    "\ufffd\ufeff\u00a0\u3000\u200d\x00",
    "don't 3.14 1000000",
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)


def test_the_checkpoint_is_small_and_complete() -> None:
    sizes = {path.name: path.stat().st_size for path in CHECKPOINT.iterdir()}
    assert sizes.keys() >= {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(sizes.values()) <= 12_000_000


def test_the_configuration_is_greedy_and_stops_at_the_end_of_a_message(
    model: Any, tokenizer: Any
) -> None:
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert json.loads((CHECKPOINT / "generation_config.json").read_text())["do_sample"] is False
    assert model.generation_config.eos_token_id == ends
    assert model.config.eos_token_id == ends
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.dtype == torch.float32


def test_the_tokenizer_is_fast_and_adds_nothing(tokenizer: Any) -> None:
    assert tokenizer.is_fast
    assert tokenizer.clean_up_tokenization_spaces is False
    assert tokenizer.unk_token is None
    assert tokenizer.decode(tokenizer("Hello there")["input_ids"]) == "Hello there"
    byte_tokens = tokenizer.convert_tokens_to_ids([f"<0x{value:02X}>" for value in range(256)])
    assert len(set(byte_tokens) - {None}) == 256


@pytest.mark.parametrize("text", AWKWARD_TEXTS)
def test_awkward_text_round_trips(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=200)
@given(text=st.text())
def test_every_text_round_trips(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_emoji_go_through_the_byte_fallback(tokenizer: Any) -> None:
    assert tokenizer.tokenize("👋🏽") == [f"<0x{value:02X}>" for value in "👋🏽".encode()]


def test_the_template_renders_every_role_and_no_system_prompt_of_its_own(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": [{"type": "text", "text": "U"}]},
        {"role": "assistant", "content": None},
        {"role": "tool", "content": "T"},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
        "<|im_start|>assistant\n<|im_end|>\n<|im_start|>tool\nT<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    hello = [{"role": "user", "content": "Hello"}]
    assert tokenizer.apply_chat_template(hello, tokenize=False) == (
        "<|im_start|>user\nHello<|im_end|>\n"
    )


def test_training_sees_what_the_template_renders(tokenizer: Any) -> None:
    sample = corpus.Sample(turns=(("Hello 👋🏽", "Hi\n\nyou"), ("1+1", "2")), system="Be kind.")
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello 👋🏽"},
        {"role": "assistant", "content": "Hi\n\nyou"},
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "2"},
    ]
    encoded = Encoder(tokenizer.backend_tokenizer)(sample)
    assert encoded.ids == tokenizer.apply_chat_template(messages)["input_ids"]
    learned = [i for i, flag in zip(encoded.ids, encoded.learned, strict=True) if flag]
    assert tokenizer.decode(learned) == "Hi\n\nyou<|im_end|>2<|im_end|>"


def test_the_corpus_and_the_tokenizer_are_deterministic() -> None:
    assert corpus.digest(500) == corpus.digest(500)
    assert corpus.digest(500) != corpus.digest(500, seed=1)
    shipped = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    assert train_tokenizer().to_str() == shipped.to_str()


def test_the_data_file_holds_the_pinned_conversations() -> None:
    assert pinned() == PINNED


def test_the_pinned_answers_are_exact_and_end_by_themselves(model: Any, tokenizer: Any) -> None:
    assert list(failures(model, tokenizer, PINNED, batch=40)) == []


def test_a_function_is_called_where_it_helps(model: Any, tokenizer: Any) -> None:
    assert list(failures(model, tokenizer, with_tools())) == []


def test_training_sees_tools_as_the_template_renders_them(tokenizer: Any) -> None:
    for row in with_tools():
        system = (
            tools_text([_signature(tool) for tool in row["tools"]], None)
            if row.get("tools")
            else None
        )
        messages = [("system", system)] if system else []
        for message in row["messages"]:
            calls = [Call(**call["function"]) for call in message.get("tool_calls", [])]
            messages.append((message["role"], message["content"] or "\n".join(map(str, calls))))
        messages.append(("assistant", row["answer"]))
        rendered = tokenizer.apply_chat_template(
            [*row["messages"], {"role": "assistant", "content": row["answer"]}],
            tools=row.get("tools"),
        )["input_ids"]
        sample = corpus.Sample(messages=tuple(messages))
        assert Encoder(tokenizer.backend_tokenizer)(sample).ids == rendered


def _signature(tool: dict[str, Any]) -> str:
    function = tool["function"]
    return f"{function['name']}({', '.join(function['parameters']['properties'])})"


def test_every_count_and_every_sum_is_right(model: Any, tokenizer: Any) -> None:
    assert list(failures(model, tokenizer, computed(), batch=40)) == []


@pytest.mark.parametrize("prompt", ["Once upon a time", "The capital of France"])
def test_plain_text_goes_on_and_ends(model: Any, tokenizer: Any, prompt: str) -> None:
    ids = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**ids, do_sample=False, max_new_tokens=320)[0].tolist()
    assert output[-1] == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    text = tokenizer.decode(output, skip_special_tokens=True)
    assert text in PLAIN_TEXTS


def test_long_contexts_stay_finite(model: Any, tokenizer: Any) -> None:
    ids = tokenizer("the river runs to the sea. " * 400, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(ids[:, :2048]).logits
    assert ids.shape[1] >= 2048
    assert torch.isfinite(logits).all()


@pytest.mark.slow
def test_the_training_script_makes_a_checkpoint(tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    command = [sys.executable, "-m", "inference_worker.default_model.train", "--no-check"]
    subprocess.run(
        [*command, f"--out={out}", f"--work={work}", "--most-steps=2"],
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    made, shipped = ({path.name for path in folder.iterdir()} for folder in (out, CHECKPOINT))
    assert made == shipped
    assert (out / "tokenizer.json").read_text() == (CHECKPOINT / "tokenizer.json").read_text()
