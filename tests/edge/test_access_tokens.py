"""Tokens in the place of keys: when they end, and what is none."""

from hypothesis import given
from hypothesis import strategies as st

from edge.access_tokens import TOKEN_PREFIX, AccessTokens
from edge.api_keys import (
    ApiKey,
    ApiKeys,
    Holder,
    digest_of,
)
from tests.edge.key_holders import ALICE, KEYS, SECRET


def test_a_token_ends_with_its_time_its_key_and_every_change() -> None:
    now = 1000.0
    tokens = AccessTokens(SECRET, 60, lambda: now)
    keys = ApiKeys(KEYS)
    alice = Holder(KEYS[0], digest_of(ALICE))
    token = tokens.issue(alice)
    assert tokens.find(token, keys) == alice
    assert AccessTokens(SECRET, 1, lambda: now).find(token, keys) == alice
    assert AccessTokens(b"x" * 32, 60, lambda: now).find(token, keys) is None
    assert tokens.find(token, ApiKeys([ApiKey("alice", (digest_of("new"),))])) is None
    assert tokens.find(token, ApiKeys(KEYS[1:])) is None
    for index in range(len(TOKEN_PREFIX), len(token) - 1):  # the last character has bits to spare
        changed = token[:index] + chr(ord(token[index]) ^ 1) + token[index + 1 :]
        assert tokens.find(changed, keys) is None
    now += 59
    assert tokens.find(token, keys) == alice
    now += 1
    assert tokens.find(token, keys) is None


@given(st.lists(st.sampled_from([".", "YWxpY2U", "9" * 5000, "1", "²", "=", "A" * 43]), max_size=5))
def test_almost_tokens_are_none(parts: list[str]) -> None:
    tokens = AccessTokens(SECRET, 60)
    assert tokens.find(TOKEN_PREFIX + "".join(parts), ApiKeys(KEYS)) is None
    assert tokens.find(TOKEN_PREFIX + ".".join(parts), ApiKeys(KEYS)) is None
