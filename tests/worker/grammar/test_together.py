"""A grammar together with everything else that a request may ask for."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest

from inference_worker.engine.grammar import GrammarFailed
from inference_worker.engine.request import OutputParams
from tests.worker.grammar.noise import Noise, NoiseRunner

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "tags": {"type": "array", "items": {"enum": ["é", "🦊", "x"]}, "maxItems": 3},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}


def check_person(text: str) -> None:
    jsonschema.validate(json.loads(text), PERSON)


def test_preemption_under_a_small_cache_changes_nothing(noise: Noise) -> None:
    grammar = noise.compile("json_schema", PERSON)

    def requests() -> list[object]:
        return [noise.request(grammar, n=3, seed=seed) for seed in range(3)]

    alone = noise.run(*requests())  # type: ignore[arg-type]
    engine = noise.new_engine(NoiseRunner(noise.tokenizer, num_blocks=40, block_size=4))
    crowded = noise.run(*requests(), engine=engine)  # type: ignore[arg-type]
    assert engine.load().preemptions > 0
    for expected, got in zip(alone, crowded, strict=True):
        assert [c.token_ids for c in got] == [c.token_ids for c in expected]
        assert [c.reason for c in got] == [c.reason for c in expected]
        for choice in got:
            if choice.reason == "STOP":
                check_person(choice.text)
    assert sum(c.reason == "STOP" for choices in crowded for c in choices) >= 6


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_runner_that_runs_ahead(
    noise: Noise, runs_ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next mask needs the token before it: a constrained row waits, the others run ahead."""
    grammar = noise.compile("choice", ["one of two", "two of two"])
    monkeypatch.setattr(NoiseRunner, "runs_ahead", runs_ahead)
    runner = NoiseRunner(noise.tokenizer)
    free = noise.request(None, max_tokens=30, stop_token_ids=frozenset())
    ((choice,), (unbound,)) = noise.run(
        noise.request(grammar), free, engine=noise.new_engine(runner)
    )
    assert choice.text in ("one of two", "two of two")
    assert unbound.reason == "LENGTH"
    assert runner.most_in_flight == (2 if runs_ahead else 0)


def test_rows_without_a_grammar_are_left_alone(noise: Noise) -> None:
    grammar = noise.compile("json_schema", PERSON)
    ((expected,),) = noise.run(noise.request(None, seed=3, max_tokens=60))
    ((choice,), (free,)) = noise.run(
        noise.request(grammar, seed=3), noise.request(None, seed=3, max_tokens=60)
    )
    assert free.token_ids == expected.token_ids
    assert choice.token_ids[:3] != free.token_ids[:3]


def test_the_prefix_cache_gives_the_same_text(noise: Noise) -> None:
    grammar = noise.compile("json_schema", PERSON)
    prompt = tuple(range(100, 160))
    first, second = (noise.write(grammar, prompt=prompt, seed=1) for _ in range(2))
    assert first.token_ids == second.token_ids
    assert first.finished is not None
    assert second.finished is not None
    assert second.finished.usage is not None
    assert second.finished.usage.cached_tokens >= 48


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 50.0},
        {"top_k": 1},
        {"top_k": 3, "temperature": 2.0},
        {"top_p": 0.05},
        {"min_p": 0.9},
        {"repetition_penalty": 3.0, "presence_penalty": 2.0, "frequency_penalty": 2.0},
    ],
    ids=str,
)
def test_every_way_of_sampling_stays_inside(noise: Noise, sampling: dict[str, float]) -> None:
    grammar = noise.compile("regex", "(red|green|blue){4}!")
    for seed in range(4):
        choice = noise.write(grammar, seed=seed, **sampling)
        assert choice.reason == "STOP"
        assert re.fullmatch("(red|green|blue){4}!", choice.text)


def test_a_bias_against_what_may_come_loses(noise: Noise) -> None:
    """And one in favour of what may not come gains nothing."""
    ids = {token: i for i in range(1792) if (token := noise.tokenizer.token_bytes(i))}
    against = {i: -100.0 for token, i in ids.items() if token and token[0] in b"ab"}
    grammar = noise.compile("regex", "[ab]{6}")
    choice = noise.write(grammar, logit_bias={**against, ids[b"z"]: 100.0, 2: 100.0})
    assert choice.reason == "STOP"
    assert re.fullmatch("[ab]{6}", choice.text)


def test_logprobs_are_those_of_the_model(noise: Noise) -> None:
    """The masks change what is drawn, never what is told: the sum over the vocabulary stays one."""
    grammar = noise.compile("regex", "[0-9]{8}")
    choice = noise.write(grammar, output=OutputParams(logprobs=5))
    assert re.fullmatch("[0-9]{8}", choice.text)
    for token in choice.tokens:
        assert token.logprob is not None
        assert len(token.top) == 5
        likeliest = token.top[0].logprob
        assert likeliest is not None
        assert likeliest >= token.logprob
    digits = [
        noise.tokenizer.token_bytes(i).isdigit() for t in choice.tokens for i in [t.top[0].token_id]
    ]
    assert not all(digits)


def test_a_stop_sequence_cuts_the_text(noise: Noise) -> None:
    grammar = noise.compile("choice", ["left middle right"])
    choice = noise.write(grammar, stop_sequences=(" mid",))
    assert (choice.reason, choice.text) == ("STOP_SEQUENCE", "left")


def test_max_tokens_cuts_the_text(noise: Noise) -> None:
    grammar = noise.compile("regex", "[0-9]{2000}")
    choice = noise.write(grammar, max_tokens=7)
    assert choice.reason == "LENGTH"
    assert len(choice.tokens) == 7
    assert choice.text.isdigit()


def test_the_last_token_may_make_it_whole(noise: Noise) -> None:
    grammar = noise.compile("regex", "[\x00-\x7f]{1}")
    choice = noise.write(grammar, max_tokens=1)
    assert (choice.reason, len(choice.tokens)) == ("STOP", 1)


@pytest.mark.parametrize("logit", [-50.0, 50.0])
def test_an_end_comes_where_the_text_is_whole(
    noise: Noise, logit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However likely or unlikely it is: as soon as the text may end, at the latest where nothing can follow."""
    runner = NoiseRunner(noise.tokenizer)
    runner.logit_of_end = logit
    grammar = noise.compile("regex", "[0-9]{3}[a-c]{0,5}")
    ((choice,),) = noise.run(
        noise.request(grammar, temperature=0.0), engine=noise.new_engine(runner)
    )
    assert choice.finished is not None
    assert choice.reason == "STOP"
    if logit > 0:
        assert choice.finished.stop_token_id == 2
        assert re.fullmatch("[0-9]{3}[a-c]{0,1}", choice.text)
    else:
        assert choice.finished.stop_token_id is None
        assert re.fullmatch("[0-9]{3}[a-c]{5}", choice.text)


def test_ignoring_the_end_goes_on_as_long_as_it_can(noise: Noise) -> None:
    request = {"stop_token_ids": frozenset[int](), "logit_bias": {2: 100.0}}
    endless = noise.write(noise.compile("regex", "[0-9]+"), max_tokens=50, **request)
    assert (endless.reason, len(endless.tokens)) == ("LENGTH", 50)
    bounded = noise.write(noise.compile("regex", "[0-9]{1,9}"), max_tokens=50, **request)
    assert (bounded.reason, len(bounded.text)) == ("STOP", 9)


def test_a_stop_token_that_is_text_ends_only_a_whole_text(noise: Noise) -> None:
    nines = frozenset(i for i in range(3, 300) if noise.tokenizer.token_bytes(i) == b"9")
    assert nines
    grammar = noise.compile("regex", "[0-9]{4}")
    for seed in range(5):
        choice = noise.write(grammar, seed=seed, stop_token_ids=nines)
        assert choice.reason == "STOP"
        assert re.fullmatch("[0-8]{4}", choice.text)


def test_what_becomes_too_complex_fails_alone(noise: Noise) -> None:
    ambiguous = noise.compile("lark", 'start: "a"* start | start start | ""')
    fine = noise.compile("regex", "[0-9]{300}")
    ((failed,), (digits,), (free,)) = noise.run(
        noise.request(ambiguous, max_tokens=1500, stop_token_ids=frozenset()),
        noise.request(fine),
        noise.request(None, max_tokens=300, stop_token_ids=frozenset()),
    )
    assert failed.failed is not None
    assert isinstance(failed.failed.error, GrammarFailed)
    assert "items" in str(failed.failed.error)
    assert re.fullmatch("[0-9]{300}", digits.text)
    assert len(free.tokens) == 300
    # the next one begins afresh
    assert noise.compile("lark", 'start: "a"* start | start start | ""') is not ambiguous


def test_a_token_outside_the_grammar_fails_its_choice_alone(
    noise: Noise, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a runner that knows no masks would draw: never a text that is not of the language."""
    grammar = noise.compile("regex", "[0-9]{5}")
    monkeypatch.setattr("inference_worker.model.sampler.restrict", lambda logits, _: (logits, {}))
    ((choice,), (free,)) = noise.run(
        noise.request(grammar), noise.request(None, max_tokens=20, stop_token_ids=frozenset())
    )
    assert choice.failed is not None
    assert isinstance(choice.failed.error, GrammarFailed)
    assert len(free.tokens) == 20
