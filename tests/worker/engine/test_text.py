"""Detokenizer, stop strings and the output made of both: the same for any cut of the text into tokens."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import example, given
from hypothesis import strategies as st

from inference_worker.engine.choice_output import ChoiceOutput
from inference_worker.engine.detokenizer import ByteDetokenizer, WindowDetokenizer
from inference_worker.engine.event import Token
from inference_worker.engine.stop_strings import StopString, StopStrings

HARD_TEXTS = [
    "👩🏽‍🚀 and 👨‍👩‍👧‍👦",
    "e\u0301a\u0308\u0323",
    "流式传输，你好",
    "🇩🇪🇯🇵",
    "\ufffd real",
    "\u2028\u2029\x85",
]

few_letters = st.text(alphabet="ab", max_size=12)


def cut(data: bytes, sizes: Sequence[int]) -> list[bytes]:
    """Split bytes into pieces of the given sizes, repeated as needed."""
    pieces, start, i = [], 0, 0
    while start < len(data):
        pieces.append(data[start : start + sizes[i % len(sizes)]])
        start += sizes[i % len(sizes)]
        i += 1
    return pieces


def first_stop(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """What a reader of one character at a time sees: the naive definition."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(st.one_of(st.sampled_from(HARD_TEXTS), st.text()), st.lists(st.integers(1, 5), min_size=1))
def test_joined_deltas_equal_the_decoded_whole(text: str, sizes: list[int]) -> None:
    pieces = cut(text.encode(), sizes)
    detokenizer = ByteDetokenizer(pieces)
    parts = [detokenizer.push(i) for i in range(len(pieces))]
    assert "".join(parts) + detokenizer.flush() == text
    assert "\ufffd" in text or not any("\ufffd" in part for part in parts)


@given(st.lists(st.binary(max_size=4), max_size=12))
def test_malformed_bytes_end_the_same_however_they_are_cut(pieces: list[bytes]) -> None:
    detokenizer = ByteDetokenizer(pieces)
    streamed = "".join(detokenizer.push(i) for i in range(len(pieces))) + detokenizer.flush()
    assert streamed == b"".join(pieces).decode("utf-8", "replace")


def test_a_character_cut_short_becomes_one_replacement_at_the_end() -> None:
    detokenizer = ByteDetokenizer([b"ok \xf0\x9f", b"\x98"])
    assert (detokenizer.push(0), detokenizer.push(1)) == ("ok ", "")
    assert detokenizer.is_pending
    assert detokenizer.flush() == "\ufffd"


def test_ids_without_a_token_show_nothing() -> None:
    assert ByteDetokenizer([b"a"]).push(7) == ""


def test_the_first_space_of_a_text_is_stripped_once() -> None:
    detokenizer = ByteDetokenizer([b" a", b""], strip_first_space=True)
    assert [detokenizer.push(i) for i in (1, 0, 0)] == ["", "a", " a"]


@given(st.lists(st.integers(0, 5), max_size=20))
@example([0, *[3] * 12, 1])
def test_window_detokenizer_follows_a_decoder_that_needs_neighbours(ids: list[int]) -> None:
    words = ["one", "two", "##s", "", "drei", "##er"]

    def decode(
        token_ids: Sequence[int],
    ) -> str:  # WordPiece-like: a space unless the token is a suffix
        out = ""
        for word in (words[i] for i in token_ids):
            out += word[2:] if word.startswith("##") else f" {word}" if out and word else word
        return out

    detokenizer = WindowDetokenizer(decode)
    assert "".join(detokenizer.push(i) for i in ids) + detokenizer.flush() == decode(ids)


@given(
    few_letters,
    st.lists(few_letters.filter(bool), max_size=3),
    st.lists(st.integers(1, 4), min_size=1),
)
@example("aab", ["ab", "b"], [3])
@example("abab", ["aba", "bab"], [1])
def test_stop_strings_do_not_depend_on_the_cut(
    text: str, stops: list[str], sizes: list[int]
) -> None:
    matcher = StopStrings([StopString(stop) for stop in stops])
    seen = ""
    for piece in cut(text.encode(), sizes):
        seen += matcher.push(piece.decode())
        assert not any(stop in seen for stop in stops)
        if matcher.matched:
            break
    seen += matcher.flush()
    assert (seen, matcher.matched) == first_stop(text, stops)


@given(
    few_letters,
    st.lists(few_letters.filter(bool), max_size=2),
    st.lists(st.integers(1, 4), min_size=1),
)
def test_certain_tokens_spell_the_certain_text(
    text: str, stops: list[str], sizes: list[int]
) -> None:
    pieces = cut(text.encode(), sizes)
    output = ChoiceOutput(0, ByteDetokenizer(pieces), [StopString(stop) for stop in stops])
    seen, tokens = "", 0
    for i in range(len(pieces)):
        output.push(Token(i))
        if output.stop_sequence:
            break
        if delta := output.take():
            seen += delta.text
            tokens += len(delta.tokens)
            spelled = b"".join(pieces[:tokens]).decode()
            assert seen.startswith(spelled)  # no token shows more than the text does
    output.flush()
    if delta := output.take():
        seen += delta.text
        tokens += len(delta.tokens)
    expected, matched = first_stop(text, stops)
    assert (seen, output.stop_sequence) == (expected, matched)
    if matched is None:
        assert tokens == len(pieces)
    else:
        assert seen.startswith(b"".join(pieces[:tokens]).decode())


def test_tokens_of_an_unfinished_character_come_with_it() -> None:
    pieces = [b"\xe4", b"\xbd", b"\xa0", b"!"]
    output = ChoiceOutput(0, ByteDetokenizer(pieces), [])
    output.push(Token(0))
    output.push(Token(1))
    assert output.take() is None
    output.push(Token(2))
    delta = output.take()
    assert delta is not None
    assert (delta.text, [t.token_id for t in delta.tokens]) == ("你", [0, 1, 2])


def test_tokens_of_a_character_that_never_ends_come_at_the_end() -> None:
    output = ChoiceOutput(0, ByteDetokenizer([b"\xe4"]), [])
    output.push(Token(0))
    output.flush()
    delta = output.take()
    assert delta is not None
    assert (delta.text, [t.token_id for t in delta.tokens]) == ("\ufffd", [0])


@given(
    st.one_of(few_letters, st.sampled_from(HARD_TEXTS)),
    st.lists(few_letters.filter(bool), max_size=2),
    st.lists(st.integers(1, 4), min_size=1),
    st.integers(0, 12),
)
@example("aab", ["ab"], [1], 2)  # cut inside what becomes a stop sequence
def test_an_output_that_is_brought_up_to_a_cut_goes_on_as_the_uncut_one(
    text: str, stops: list[str], sizes: list[int], num_delivered: int
) -> None:
    pieces = cut(text.encode(), sizes)
    automata = [StopString(stop) for stop in stops]
    before = ChoiceOutput(0, ByteDetokenizer(pieces), automata)
    delivered, seen = [], ""
    for i in range(min(num_delivered, len(pieces))):
        before.push(Token(i))
        if before.stop_sequence:
            break
        delivered.append(i)
        if delta := before.take():
            seen += delta.text
    after = ChoiceOutput(0, ByteDetokenizer(pieces), automata)
    after.replay(delivered, len(seen))
    num_tokens = 0
    for i in range(len(delivered), len(pieces)):
        after.push(Token(i))
        if after.stop_sequence:
            break
    after.flush()
    if delta := after.take():
        seen += delta.text
        num_tokens = len(delta.tokens)
    expected, matched = first_stop(text, stops)
    assert (seen, after.stop_sequence) == (expected, matched)
    if matched is None:
        assert num_tokens == len(pieces) - len(delivered)
