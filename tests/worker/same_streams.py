"""Whether two streams said the same, whatever the messages were that carried it."""

from __future__ import annotations

import pytest

from tests.worker.stream_record import ChoiceRecord, StreamRecord


def assert_same(joined: StreamRecord, uncut: StreamRecord) -> None:
    assert joined.choices.keys() == uncut.choices.keys()
    for index, expected in uncut.choices.items():
        assert_same_choice(joined.choices[index], expected)
    assert joined.usage is not None
    assert uncut.usage is not None
    assert joined.usage.prompt_tokens == uncut.usage.prompt_tokens
    assert joined.usage.completion_tokens == uncut.usage.completion_tokens


def assert_same_choice(joined: ChoiceRecord, uncut: ChoiceRecord) -> None:
    assert joined.text == uncut.text
    assert (joined.reasoning, joined.calls) == (uncut.reasoning, uncut.calls)
    assert joined.token_ids == uncut.token_ids
    assert joined.num_tokens == uncut.num_tokens
    assert (joined.echo, joined.echoed_tokens) == (uncut.echo, uncut.echoed_tokens)
    for ours, theirs in (
        (joined.logprobs, uncut.logprobs),
        (joined.echo_logprobs, uncut.echo_logprobs),
    ):
        assert [x.token.token_id for x in ours] == [x.token.token_id for x in theirs]
        got = [candidate.logprob for x in ours for candidate in (x.token, *x.top)]
        expected = [candidate.logprob for x in theirs for candidate in (x.token, *x.top)]
        assert got == pytest.approx(expected, abs=2e-3)
    assert joined.finished is not None
    assert uncut.finished is not None
    for name in (
        *("finish_reason", "completion_tokens"),
        *("stop_sequence", "stop_token_id", "withheld_token_ids"),
    ):
        assert getattr(joined.finished, name) == getattr(uncut.finished, name)
