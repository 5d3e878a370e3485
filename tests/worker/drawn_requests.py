"""Requests as hypothesis draws them, and where in their output they stop."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from protos.sluice.v1 import generation_pb2 as pb
from tests.worker.stream_record import StreamRecord

PROMPTS = ["Count to 10", "Say hello.", "What is streaming?", "Repeat: é 漢字 👩‍💻", "a"]
samplings = st.one_of(
    st.just(pb.Sampling(temperature=0)),
    st.builds(
        pb.Sampling,
        temperature=st.sampled_from([0.5, 1.0, 1.7]),
        top_k=st.sampled_from([None, 5, 40]),
        top_p=st.sampled_from([None, 0.9]),
        min_p=st.sampled_from([None, 0.02]),
        logit_bias=st.sampled_from([None, {70: 3.0, 75: -100.0}]),
        repetition_penalty=st.sampled_from([None, 1.3]),
        presence_penalty=st.sampled_from([None, 0.7]),
        frequency_penalty=st.sampled_from([None, 0.4]),
        seed=st.sampled_from([None, 0, -7, 2**60]),
    ),
)
outputs = st.sampled_from(
    [
        pb.Output(token_ids=True),
        pb.Output(token_ids=True, logprobs=2),
        pb.Output(token_ids=True, echo=True),
        pb.Output(token_ids=True, echo=True, logprobs=1, prompt_logprobs=True),
        # is_continuable alone has to do
        pb.Output(),
        pb.Output(logprobs=0),
        pb.Output(echo=True),
    ]
)
# Of which the second can become whole before max_tokens.
constraints = st.sampled_from(
    [
        None,
        pb.Constraint(regex="[a-h0-9 ]{2,4}|(ab|é|漢)*[0-9]{9}"),
        pb.Constraint(choice=pb.ChoiceList(texts=["yes", "no", "no way", "👩‍💻 and é"])),
        pb.Constraint(json_schema='{"type": "array", "items": {"enum": [1, "é", null]}}'),
    ]
)
requests = st.builds(
    pb.GenerateRequest,
    constraint=st.none() | constraints,
    prompt=st.sampled_from(PROMPTS).map(lambda text: pb.Prompt(text=text)),
    sampling=samplings,
    stopping=st.integers(1, 20).map(
        lambda number: pb.Stopping(max_tokens=number, ignore_eos=number % 3 == 0)
    ),
    output=outputs,
    n=st.integers(1, 3),
    is_continuable=st.just(True),
)


@dataclass(frozen=True)
class Stops:
    """Where in the output to take stop sequences and tokens from: what comes, and what almost comes."""

    # Numbers of which the remainders count: hypothesis must not see that the output varies with the drawn seeds.
    choice: int
    begin: int
    length: int
    kind: int
    token: int

    def add_to(self, request: pb.GenerateRequest, uncut: StreamRecord) -> None:
        assert uncut.started is not None
        request.sampling.CopyFrom(uncut.started.sampling)  # the seed too
        said = [choice for choice in uncut.choices.values() if choice.text]
        if not said:
            return
        choice = said[self.choice % len(said)]
        begin = self.begin % len(choice.text)
        stop = choice.text[begin : begin + self.length]
        kinds: tuple[list[str], ...] = ([], [stop], [stop + "\0"], [stop + "\0", stop[:3]])
        request.stopping.stop_sequences.extend(kinds[self.kind])
        # without one of its tokens a constraint may have nothing left to say
        if choice.token_ids and self.token and not request.HasField("constraint"):
            request.stopping.stop_token_ids.append(
                choice.token_ids[self.token % len(choice.token_ids)]
            )


positions = st.integers(0, 10_000)
stops = st.builds(
    Stops,
    choice=positions,
    begin=positions,
    length=st.integers(1, 12),
    kind=st.integers(0, 3),
    token=st.one_of(st.just(0), positions),
)
