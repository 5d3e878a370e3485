"""Text to token ids and back, and the chat template: what the service needs of a checkpoint's tokenizer."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Encoding
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from inference_worker.chat.format import MARKS, THINK_START, ChatFormat
from inference_worker.control_tokens import ControlTokenError, ControlTokens, unused_mark
from inference_worker.engine.detokenizer import ByteDetokenizer, Detokenizer, WindowDetokenizer

_SURROGATE = re.compile("[\ud800-\udfff]")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Special tokens that are part of the output's text, where calls and reasoning are told apart from the rest.
_SHOWN_MARKS = frozenset(mark.encode() for mark in MARKS)
_MARK_TOKENS = 8  # more than a mark and the line end behind it take
_RESERVED_ARGUMENTS = frozenset(
    inspect.signature(PreTrainedTokenizerFast.apply_chat_template).parameters
) | {"messages", "bos_token", "eos_token", "unk_token", "pad_token"}
_SENTENCEPIECE_DECODERS = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


class TemplateError(ValueError):
    """The chat template refuses the messages, or there is none."""


class TextTooLong(ValueError):
    """The text of a chat has more bytes than may be encoded."""

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(f"{size} bytes of text; at most {limit}")
        self.size = size
        self.limit = limit


class UnsupportedTokenizer(ValueError):
    """The checkpoint has no tokenizer that can be used here."""


class Tokenizer:
    """A fast tokenizer. Its methods may be called from several threads."""

    def __init__(self, hf_tokenizer: PreTrainedTokenizerFast) -> None:
        self._hf = hf_tokenizer
        # the Rust tokenizer itself: unlike the wrapper it holds no state that an encode changes
        self._backend = hf_tokenizer.backend_tokenizer
        # a checkpoint may have saved what its training loop used; here a prompt is taken whole
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocabulary_size: int = self._backend.get_vocab_size(with_added_tokens=True)
        self._special_ids = frozenset(
            token_id
            for token_id, token in hf_tokenizer.added_tokens_decoder.items()
            if token.special
        )
        self._control_tokens = ControlTokens(
            token.content for token in hf_tokenizer.added_tokens_decoder.values() if token.special
        )
        decoder = json.loads(self._backend.to_str())["decoder"]
        raw = _bytes_of_tokens(self._backend, hf_tokenizer.added_tokens_decoder, decoder)
        self._is_bytewise = raw is not None
        self._token_bytes = raw or _decoded_tokens(self._backend, self.vocabulary_size)
        self.chat_format = ChatFormat.of_template(hf_tokenizer.chat_template)
        self._shown_bytes = [
            b"" if token_id in self._special_ids and shown not in _SHOWN_MARKS else shown
            for token_id, shown in enumerate(self._token_bytes)
        ]
        self._strips_first_space = _strips_first_space(decoder)
        self._has_token_bound = (
            bool(_decoder_kinds(decoder) & {"ByteLevel", "ByteFallback"})
            and self._is_bytewise
            and self._backend.normalizer is None
            and not any(t.lstrip or t.rstrip for t in hf_tokenizer.added_tokens_decoder.values())
        )

    @classmethod
    def load(cls, directory_or_id: str) -> Tokenizer:
        """Load a checkpoint's tokenizer.

        Raises: UnsupportedTokenizer, OSError (nothing there).
        """
        hf_tokenizer = AutoTokenizer.from_pretrained(directory_or_id)
        if not isinstance(hf_tokenizer, PreTrainedTokenizerFast):
            raise UnsupportedTokenizer(f"{directory_or_id}: no fast tokenizer (tokenizer.json)")
        return cls(hf_tokenizer)

    @property
    def max_token_bytes(self) -> int | None:
        """The most bytes of a text that one token can stand for; None if there is no such bound.

        There is none where a normalizer shortens the text, an added token swallows the spaces around it, or one
        unknown token stands for any text.
        """
        if not self._has_token_bound:
            return None
        return max(map(len, self._token_bytes), default=0)

    @property
    def text_bytes(self) -> Sequence[bytes] | None:
        """The bytes that each token adds to a text, none for special ones; None if they depend on its neighbours."""
        return self._shown_bytes if self._is_bytewise else None

    @property
    def has_chat_template(self) -> bool:
        return self._hf.chat_template is not None

    def opens_reasoning(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt ends with the mark that begins reasoning, which some chat templates write themselves."""
        end = self.decode(prompt[-_MARK_TOKENS:], keep_special_tokens=True)
        return self.chat_format.marks_reasoning and end.rstrip().endswith(THINK_START)

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids of a text, after the special tokens that the tokenizer puts before every text.

        Without `special_tokens` the name of one in the text is text. Raises: ControlTokenError, for a name that cannot
        be.
        """
        if special_tokens:
            return self._encode(text, add_special_tokens=True)
        return self._encode_pieces(self._control_tokens.pieces(text), add_special_tokens=True)

    def split(self, text: str) -> list[tuple[int, str]]:
        """The tokens of a text that continues another, each with its part of it; the parts are the whole text.

        Of the tokens that make one character the first has it. A text may have no tokens at all.
        """
        (encoding,) = self._backend.encode_batch([text], add_special_tokens=False)
        parts, begin = [], 0
        for token_id, (_, end) in zip(encoding.ids, encoding.offsets, strict=True):
            parts.append((token_id, text[begin:end]))
            begin = max(begin, end)
        if parts and begin < len(text):  # what the tokenizer does not keep is kept here
            parts[-1] = (parts[-1][0], parts[-1][1] + text[begin:])
        return parts

    def encode_inner(self, text: str) -> list[int]:
        """Token ids of a text that stands inside another: nothing is put before it."""
        return self._encode(text, add_special_tokens=False)

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        arguments: dict[str, Any] | None = None,
        *,
        special_tokens: bool = False,
        continue_final_message: bool = False,
        max_bytes: int | None = None,
    ) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer, or for the rest of the last message.

        `arguments` are more variables of the template. Names of special tokens in any of these are text, unless
        `special_tokens` says that they are those tokens; the template's own always are. Of more text than `max_bytes`
        nothing is encoded. Raises: TemplateError, TextTooLong.
        """
        given: Any = [messages, tools, arguments]
        if special_tokens:
            text = self._render(*given, continue_final_message=continue_final_message)
            _check_size([text], max_bytes)
            return self._encode(text, add_special_tokens=False)
        try:
            mark = unused_mark(given)
            marked = self._control_tokens.marked(given, mark)
            text = self._render(*marked, continue_final_message=continue_final_message)
            pieces = self._control_tokens.marked_pieces(text, mark)
        except ControlTokenError as error:
            raise TemplateError(str(error)) from error
        except RecursionError as error:
            raise TemplateError("something in it is nested too deeply") from error
        _check_size(pieces, max_bytes)
        return self._encode_pieces(pieces, add_special_tokens=False)

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        arguments: dict[str, Any] | None,
        *,
        continue_final_message: bool,
    ) -> str:
        """What the template makes of them: it writes every special token itself. Raises: TemplateError."""
        if reserved := _RESERVED_ARGUMENTS & (arguments or {}).keys():
            raise TemplateError(f"{min(reserved)} is not the caller's to set")
        if not self.has_chat_template:
            raise TemplateError("the model has no chat template; send text or token ids instead")
        try:
            text: Any = self._hf.apply_chat_template(
                messages,
                tools=tools,  # type: ignore[arg-type]  # a schema is as good as a function
                tokenize=False,
                add_generation_prompt=not continue_final_message,
                continue_final_message=continue_final_message,
                **(arguments or {}),
            )
        except (
            Exception
        ) as error:  # Jinja runs the checkpoint's own code: any exception is its refusal
            raise TemplateError(f"the chat template refuses the messages: {error}") from error
        if _SURROGATE.search(text):  # JSON inside a chat can spell one
            raise TemplateError("half of a surrogate pair is no character")
        return str(text)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token, a special one's name included; empty for an id that has no token."""
        return self._token_bytes[token_id] if token_id < len(self._token_bytes) else b""

    def decode(self, token_ids: Iterable[int], keep_special_tokens: bool = False) -> str:
        """The text of token ids that stand at the beginning of a text."""
        if not self._is_bytewise:
            return self._window_decode(list(token_ids), keep_special_tokens)
        table = self._token_bytes if keep_special_tokens else self._shown_bytes
        detokenizer = ByteDetokenizer(table, strip_first_space=self._strips_first_space)
        return "".join([detokenizer.push(i) for i in token_ids]) + detokenizer.flush()

    def new_detokenizer(self, *, at_start: bool = False) -> Detokenizer:
        """For one choice; `at_start` if its first token begins a text instead of continuing a prompt."""
        if not self._is_bytewise:
            return WindowDetokenizer(self._window_decode)
        strip = at_start and self._strips_first_space
        return ByteDetokenizer(self._shown_bytes, strip_first_space=strip)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # unlike `encode`, the batch call lets go of the interpreter: the event loop and the engine run on
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def _encode_pieces(self, pieces: list[str], *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text in pieces. A tokenizer that puts a space before a text puts one before each."""
        if len(pieces) <= 1:
            return self._encode("".join(pieces), add_special_tokens=add_special_tokens)
        encodings = self._backend.encode_batch_fast(pieces, add_special_tokens=False)
        if add_special_tokens:
            encodings = [self._backend.post_process(Encoding.merge(encodings))]
        return [token_id for encoding in encodings for token_id in encoding.ids]

    def _window_decode(self, token_ids: Sequence[int], keep_special_tokens: bool = False) -> str:
        text: str = self._backend.decode(
            list(token_ids), skip_special_tokens=not keep_special_tokens
        )
        return text


def _check_size(pieces: Iterable[str], max_bytes: int | None) -> None:
    """Raises: TextTooLong."""
    if max_bytes is not None and (size := sum(len(piece.encode()) for piece in pieces)) > max_bytes:
        raise TextTooLong(size, max_bytes)


def _bytes_of_tokens(
    backend: Any, added_tokens: dict[int, Any], decoder: dict[str, Any] | None
) -> list[bytes] | None:
    """The bytes of every token, or None if they depend on the neighbours."""
    kinds = _decoder_kinds(decoder)
    if kinds == {"ByteLevel"}:
        to_bytes = _byte_level
    elif kinds and kinds <= _SENTENCEPIECE_DECODERS and _replaces_only_spaces(decoder):
        marks_space = bool(kinds & {"Replace", "Metaspace"})
        has_bytes = "ByteFallback" in kinds

        def to_bytes(token: str) -> bytes:
            if has_bytes and (match := _BYTE_TOKEN.fullmatch(token)):
                return bytes([int(match[1], 16)])
            return (token.replace("▁", " ") if marks_space else token).encode()
    else:
        return None
    table = [b""] * backend.get_vocab_size(with_added_tokens=True)
    for token, token_id in backend.get_vocab(with_added_tokens=False).items():
        table[token_id] = to_bytes(token)
    for token_id, added in added_tokens.items():
        table[token_id] = added.content.encode()
    return table


def _decoded_tokens(backend: Any, size: int) -> list[bytes]:
    return [backend.decode([i], skip_special_tokens=False).encode() for i in range(size)]


def _decoder_steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    steps: list[dict[str, Any]] = (
        decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    )
    return steps


def _decoder_kinds(decoder: dict[str, Any] | None) -> set[str]:
    return {step["type"] for step in _decoder_steps(decoder)}


def _replaces_only_spaces(decoder: dict[str, Any] | None) -> bool:
    """Whether every Replace and Metaspace turns "▁" into a space and every Strip takes one space off the start."""
    for step in _decoder_steps(decoder):
        match step["type"]:
            case "Replace":
                if step["pattern"] != {"String": "▁"} or step["content"] != " ":
                    return False
            case "Metaspace":
                if step["replacement"] != "▁":
                    return False
            case "Strip":
                if (step["content"], step["start"], step["stop"]) != (" ", 1, 0):
                    return False
    return True


def _strips_first_space(decoder: dict[str, Any] | None) -> bool:
    return any(
        step["type"] == "Strip"
        or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in _decoder_steps(decoder)
    )


def _byte_level_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for (Radford et al., GPT-2, encoder.py)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return alphabet


_BYTE_LEVEL = _byte_level_alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTE_LEVEL[character] for character in token])
    except KeyError:  # a token that was not made from bytes stands for itself
        return token.encode()
