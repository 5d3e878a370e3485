"""The tokenizer of a checkpoint, as the service uses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from inference_worker.default_model import CHECKPOINT
from inference_worker.tokenizer import TemplateError, Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(str(CHECKPOINT))


def save(directory: Path, backend: Backend) -> Tokenizer:
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=backend).save_pretrained(directory)
    return Tokenizer.load(str(directory))


def byte_level() -> Backend:
    vocabulary = {
        character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    backend = Backend(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def sentencepiece() -> Backend:
    letters = {letter: 256 + i for i, letter in enumerate("▁helo")}
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | letters
    backend = Backend(models.BPE(vocabulary, [], byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    backend.decoder = decoders.Sequence(steps)
    return backend


def word_piece() -> Backend:
    backend = Backend(
        models.WordPiece({"[UNK]": 0, "one": 1, "two": 2, "##s": 3}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    return backend


@given(st.text())
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, keep_special_tokens=True) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


@pytest.mark.parametrize("text", ["hello", "two  spaces ", "naïve 你好 👩🏽‍🚀", "\ufffd"])
@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_bytewise_tokenizers_stream_what_they_decode(
    make: object, text: str, tmp_path: Path
) -> None:
    backend = make()  # type: ignore[operator]
    tokenizer = save(tmp_path, backend)
    ids = tokenizer.encode(text)
    detokenizer = tokenizer.new_detokenizer(at_start=True)
    streamed = "".join(map(detokenizer.push, ids)) + detokenizer.flush()
    assert streamed == tokenizer.decode(ids) == backend.decode(ids) == text


def test_a_completion_keeps_the_space_that_a_text_would_lose(tmp_path: Path) -> None:
    tokenizer = save(tmp_path, sentencepiece())
    ids = tokenizer.encode("hello")
    assert tokenizer.decode(ids) == "hello"
    assert "".join(map(tokenizer.new_detokenizer().push, ids)) == " hello"


def test_tokens_that_depend_on_their_neighbours_are_decoded_together(tmp_path: Path) -> None:
    tokenizer = save(tmp_path, word_piece())
    detokenizer = tokenizer.new_detokenizer()
    streamed = "".join(map(detokenizer.push, [1, 3, 2])) + detokenizer.flush()
    assert streamed == "ones two"
    assert tokenizer.max_token_bytes is None


def test_the_bytes_of_a_token_are_bounded_only_where_they_are(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    assert tokenizer.max_token_bytes == max(
        len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocabulary_size)
    )
    greedy = byte_level()
    greedy.add_tokens([AddedToken("<x>", lstrip=True)])
    assert save(tmp_path, greedy).max_token_bytes is None


def test_saved_truncation_and_padding_do_not_touch_prompts(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(max_length=8)
    backend.enable_padding(length=64)
    tokenizer = save(tmp_path, backend)
    assert len(tokenizer.encode("x" * 37)) == 37
    assert len(tokenizer.encode("x")) == 1


def test_special_tokens_are_hidden_unless_asked_for(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_chat([{"role": "user", "content": "Hello"}])
    assert "<|im_start|>" not in tokenizer.decode(ids)
    assert tokenizer.decode(ids, keep_special_tokens=True).startswith("<|im_start|>user")
    assert tokenizer.token_bytes(ids[0]) == b"<|im_start|>"
    assert tokenizer.token_bytes(10**6) == b""


def test_without_a_chat_template_a_chat_is_refused(tmp_path: Path) -> None:
    tokenizer = save(tmp_path, byte_level())
    assert not tokenizer.has_chat_template
    with pytest.raises(TemplateError, match="no chat template"):
        tokenizer.encode_chat([{"role": "user", "content": "Hello"}])
