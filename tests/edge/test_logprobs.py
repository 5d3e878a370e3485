"""Log-probabilities, in the shapes of chat and of completions."""

import math

import httpx
import jsonschema
import pytest

from protos.sluice.v1 import generation_pb2 as pb
from tests.edge.scripted_worker import ScriptedCall, ScriptedWorker
from tests.edge.sse import openai_chunks, parse


def candidate(token: bytes, logprob: float | None, token_id: int = 1) -> pb.Candidate:
    return pb.Candidate(token_id=token_id, token=token, logprob=logprob)


def entry(token: bytes, logprob: float | None, *top: pb.Candidate) -> pb.TokenLogprob:
    return pb.TokenLogprob(token=candidate(token, logprob), top=top)


SMILE = "😀".encode()


async def two_tokens_of_one_character(call: ScriptedCall) -> None:
    await call.started()
    await call.delta(
        "a", logprobs=[entry(b"a", -0.5, candidate(b"a", -0.5), candidate(b"b", -1.5))]
    )
    await call.delta("", logprobs=[entry(SMILE[:2], -0.25)])
    await call.delta("😀", logprobs=[entry(SMILE[2:], -math.inf)])
    await call.finished()


CONTENT = [
    {
        "token": "a",
        "logprob": -0.5,
        "bytes": [97],
        "top_logprobs": [
            {"token": "a", "logprob": -0.5, "bytes": [97]},
            {"token": "b", "logprob": -1.5, "bytes": [98]},
        ],
    },
    {"token": "\\xf0\\x9f", "logprob": -0.25, "bytes": [0xF0, 0x9F], "top_logprobs": []},
    {"token": "\\x98\\x80", "logprob": -9999.0, "bytes": [0x98, 0x80], "top_logprobs": []},
]


async def test_chat(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    worker.script = two_tokens_of_one_character
    body = {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 2}
    whole = (await http.post("/v1/chat/completions", json=body)).json()
    assert whole["choices"][0]["logprobs"] == {"content": CONTENT, "refusal": None}
    response = await http.post("/v1/chat/completions", json=body | {"stream": True})
    chunks = openai_chunks(response.content)
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert streamed == [None, *({"content": [item], "refusal": None} for item in CONTENT), None]


async def test_chat_without_asking(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    worker.script = two_tokens_of_one_character
    body = {"messages": [{"role": "user", "content": "x"}]}
    whole = (await http.post("/v1/chat/completions", json=body)).json()
    assert whole["choices"][0]["logprobs"] is None


async def test_a_response(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    async def script(call: ScriptedCall) -> None:
        await call.started()
        await call.delta("", reasoning="Hm", logprobs=[entry(b"Hm", -1.0)])
        await call.delta(
            "a", logprobs=[entry(b"a", -0.5, candidate(b"a", -0.5), candidate(b"b", -1.5))]
        )
        await call.delta("", logprobs=[entry(SMILE[:2], -0.25)])
        await call.delta("😀", logprobs=[entry(SMILE[2:], -math.inf)])
        await call.delta("", logprobs=[entry(SMILE[:1], -2.0)])  # cut inside a character
        await call.finished(pb.FINISH_REASON_LENGTH)

    worker.script = script
    body = {"input": "x", "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    whole = (await http.post("/v1/responses", json=body)).json()
    cut = {"token": "\\xf0", "logprob": -2.0, "bytes": [0xF0], "top_logprobs": []}
    (part,) = whole["output"][1]["content"]
    assert (part["text"], part["logprobs"]) == ("a😀", [*CONTENT, cut])
    assert whole["top_logprobs"] == 2
    response = await http.post("/v1/responses", json=body | {"stream": True})
    events = [event.json() for event in parse(response.content).events]
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [(delta["delta"], delta["logprobs"]) for delta in deltas] == [
        ("a", CONTENT[:1]),
        ("😀", CONTENT[1:]),
        ("", [cut]),
    ]
    (done,) = (event for event in events if event["type"] == "response.output_text.done")
    assert done["logprobs"] == part["logprobs"]
    document = (await http.get("/openapi.json")).json()
    schema = {"$ref": "#/components/schemas/ResponsesAnswer", "components": document["components"]}
    jsonschema.validate(whole, schema)


async def test_legacy(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    worker.script = two_tokens_of_one_character
    body = {"prompt": "x", "logprobs": 2}
    whole = (await http.post("/v1/completions", json=body)).json()
    expected = {
        "tokens": ["a", "\\xf0\\x9f", "\\x98\\x80"],
        "token_logprobs": [-0.5, -0.25, -9999.0],
        "top_logprobs": [{"a": -0.5, "b": -1.5}, {"\\xf0\\x9f": -0.25}, {"\\x98\\x80": -9999.0}],
        "text_offset": [0, 1, 1],
    }
    assert whole["choices"][0]["logprobs"] == expected
    response = await http.post("/v1/completions", json=body | {"stream": True})
    deltas = [chunk["choices"][0]["logprobs"] for chunk in openai_chunks(response.content)]
    assert deltas.pop() is None
    joined = {name: [value for delta in deltas for value in delta[name]] for name in expected}
    assert joined == expected


async def test_echo_as_evaluation_harnesses_want_it(
    http: httpx.AsyncClient, worker: ScriptedWorker
) -> None:
    async def script(call: ScriptedCall) -> None:
        await call.started()
        await call.delta(
            "The end",
            is_prompt=True,
            token_count=2,
            logprobs=[entry(b"The", None), entry(b" end", -0.75, candidate(b" end", -0.75))],
        )
        await call.delta(".", logprobs=[entry(b".", -0.125)])
        await call.finished(pb.FINISH_REASON_LENGTH, completion_tokens=1)

    worker.script = script
    body = {"prompt": [[5, 6]], "echo": True, "max_tokens": 1, "logprobs": 1}
    whole = (await http.post("/v1/completions", json=body)).json()
    output = worker.call.request.output
    assert (output.echo, output.prompt_logprobs, output.logprobs) == (True, True, 1)
    choice = whole["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("The end.", "length")
    assert choice["logprobs"] == {
        "tokens": ["The", " end", "."],
        "token_logprobs": [None, -0.75, -0.125],
        "top_logprobs": [None, {" end": -0.75}, {".": -0.125}],
        "text_offset": [0, 3, 7],
    }
    assert whole["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize("stops_at_token", [True, False])
async def test_the_stop_token_is_scored_and_no_text(
    http: httpx.AsyncClient, worker: ScriptedWorker, stops_at_token: bool
) -> None:
    withheld = [entry(b"<end>", -0.5, candidate(b"<end>", -0.5))]
    ending = {"stop_token_id": 2} if stops_at_token else {"stop_sequence": "<end>"}

    async def script(call: ScriptedCall) -> None:
        await call.started()
        await call.delta("Yes", logprobs=[entry(b"Yes", -0.25)])
        await call.finished(completion_tokens=2, withheld_logprobs=withheld, **ending)

    worker.script = script
    body: dict[str, object] = {"prompt": "x", "logprobs": 1}
    lists: dict[str, list[object]] = {
        "tokens": ["Yes", "<end>"],
        "token_logprobs": [-0.25, -0.5],
        "top_logprobs": [{"Yes": -0.25}, {"<end>": -0.5}],
        "text_offset": [0, 3],
    }
    if not stops_at_token:  # the text is cut there, perhaps inside a token
        lists = {name: values[:1] for name, values in lists.items()}
    (choice,) = (await http.post("/v1/completions", json=body)).json()["choices"]
    assert (choice["text"], choice["logprobs"]) == ("Yes", lists)
    response = await http.post("/v1/completions", json=body | {"stream": True})
    streamed = [chunk["choices"][0]["logprobs"] or {} for chunk in openai_chunks(response.content)]
    joined = {name: [x for each in streamed for x in each.get(name, [])] for name in lists}
    assert joined == lists
    # a chat has it in neither
    body = {"messages": [{"role": "user", "content": "x"}], "logprobs": True}
    (choice,) = (await http.post("/v1/chat/completions", json=body)).json()["choices"]
    assert [item["token"] for item in choice["logprobs"]["content"]] == ["Yes"]


@pytest.mark.parametrize("logprob", [-math.inf, math.nan])
async def test_what_json_cannot_say_is_the_lowest_and_no_null(
    http: httpx.AsyncClient, worker: ScriptedWorker, logprob: float
) -> None:
    async def script(call: ScriptedCall) -> None:
        await call.started()
        await call.delta("a", logprobs=[entry(b"a", logprob, candidate(b"b", logprob))])
        await call.finished()

    worker.script = script
    messages = [{"role": "user", "content": "x"}]
    body: dict[str, object] = {"messages": messages, "logprobs": True, "top_logprobs": 1}
    chat = (await http.post("/v1/chat/completions", json=body)).json()
    (shown,) = chat["choices"][0]["logprobs"]["content"]
    assert shown["logprob"] == shown["top_logprobs"][0]["logprob"] == -9999.0
    legacy = (await http.post("/v1/completions", json={"prompt": "x", "logprobs": 1})).json()
    shown = legacy["choices"][0]["logprobs"]
    assert shown["token_logprobs"] == [-9999.0]
    assert shown["top_logprobs"] == [{"a": -9999.0, "b": -9999.0}]
    native = await http.post("/v1/streams", json={"prompt": "x", "logprobs": 1})
    (shown,) = parse(native.content).events[1].json()["logprobs"]
    assert shown["logprob"] == shown["top"][0]["logprob"] == -9999.0


@pytest.mark.parametrize("fields", [{"logprobs": 1}, {"logprobs": 1, "return_token_ids": True}])
async def test_native(
    http: httpx.AsyncClient, worker: ScriptedWorker, fields: dict[str, object]
) -> None:
    worker.script = two_tokens_of_one_character
    response = await http.post("/v1/streams", json={"prompt": "x"} | fields)
    delta = parse(response.content).events[2].json()
    assert delta["logprobs"] == [
        {
            "token_id": 1,
            "token": "\\xf0\\x9f",
            "bytes": [0xF0, 0x9F],
            "logprob": -0.25,
            "top": [],
        }
    ]
    assert worker.call.request.output.token_ids == fields.get("return_token_ids", False)
