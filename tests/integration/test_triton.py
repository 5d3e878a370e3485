"""The v2 inference protocol before the embedded model: plain HTTP as its documents show it, and Triton's own client."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from protos.sluice.v1 import generation_pb2 as pb
from tests.edge.sse import parse
from tests.integration.stack import Stack

PROMPT = "Once upon a time"
MODEL = "/v2/models/default"


def continuation(stack: Stack, text: str = PROMPT, max_tokens: int = 8) -> str:
    request = pb.GenerateRequest(
        prompt=pb.Prompt(text=text), stopping=pb.Stopping(max_tokens=max_tokens)
    )
    return "".join(message.delta.text for message in stack.stub.Generate(request))


def text_tensor(*texts: str, name: str = "TEXT", datatype: str = "BYTES") -> dict[str, Any]:
    return {"name": name, "shape": [len(texts)], "datatype": datatype, "data": list(texts)}


def tensor(name: str, datatype: str, *data: Any) -> dict[str, Any]:
    return {"name": name, "shape": [len(data)], "datatype": datatype, "data": list(data)}


@pytest.mark.parametrize("base", [MODEL, f"{MODEL}/versions/1"])
def test_generate(stack: Stack, base: str) -> None:
    body = {"text_input": PROMPT, "id": "mine", "parameters": {"max_tokens": 8, "temperature": 0}}
    answer = httpx.post(f"{stack.url}{base}/generate", json=body)
    assert answer.json() == {
        "id": "mine",
        "model_name": "sluice-tiny",
        "model_version": "1",
        "text_output": continuation(stack),
    }
    with_input = body | {"parameters": {"max_tokens": 8, "exclude_input_in_output": False}}
    answer = httpx.post(f"{stack.url}{base}/generate", json=with_input)
    assert answer.json()["text_output"] == PROMPT + continuation(stack)


def test_generate_stream(stack: Stack) -> None:
    parameters = {"max_tokens": 8, "stream": True, "details": True}
    body = {"text_input": PROMPT, "parameters": parameters}
    answer = httpx.post(f"{stack.url}{MODEL}/generate_stream", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [event.json() for event in parse(answer.content).events]
    assert "".join(event["text_output"] for event in events) == continuation(stack)
    assert (
        len(events) >= 2
    )  # text, then the details; how many tokens share an event, the reader's pace decides
    assert {event["model_name"] for event in events} == {"sluice-tiny"}
    assert all("details" not in event for event in events[:-1])
    details = events[-1]["details"]
    assert (details["finish_reason"], details["completion_tokens"]) == ("length", 8)
    whole = httpx.post(
        f"{stack.url}{MODEL}/generate", json=body | {"parameters": parameters | {"stream": False}}
    )
    assert whole.json()["details"] == details


def test_leaving_a_stream_ends_the_generation(slow_stack: Stack) -> None:
    before = slow_stack.load().generated_tokens
    body = {"text_input": PROMPT, "parameters": {"max_tokens": 3000}}
    with httpx.stream("POST", f"{slow_stack.url}{MODEL}/generate_stream", json=body) as answer:
        assert next(answer.iter_lines()).startswith("data: ")
    slow_stack.wait_idle()
    assert slow_stack.load().generated_tokens - before < 3000, "it ended by itself"


@pytest.mark.parametrize("datatype", ["BYTES", "STRING"])
@pytest.mark.parametrize("name", ["TEXT", "text_input", "prompt"])
def test_infer_takes_one_text_and_parameters(stack: Stack, name: str, datatype: str) -> None:
    inputs = [
        text_tensor(PROMPT, name=name, datatype=datatype),
        tensor("max_tokens", "INT32", 8),
        tensor("temperature", "FP32", 0.0),
    ]
    answer = httpx.post(f"{stack.url}{MODEL}/infer", json={"id": "i", "inputs": inputs})
    assert answer.json() == {
        "id": "i",
        "model_name": "sluice-tiny",
        "model_version": "1",
        "outputs": [
            {
                "name": "text_output",
                "datatype": "BYTES",
                "shape": [1],
                "data": [continuation(stack)],
            }
        ],
    }


def test_infer_takes_several_texts_in_any_nesting(stack: Stack) -> None:
    text = {"name": "TEXT", "shape": [2, 1], "datatype": "BYTES", "data": [["Once"], ["Count"]]}
    body = {"inputs": [text, tensor("max_tokens", "UINT8", 4)]}
    (output,) = httpx.post(f"{stack.url}{MODEL}/infer", json=body).json()["outputs"]
    assert output["shape"] == [2, 1]
    assert output["data"] == [continuation(stack, text, 4) for text in ("Once", "Count")]


@pytest.mark.parametrize(
    ("inputs", "problem"),
    [
        ([tensor("max_tokens", "INT32", 8)], "inputs: one of them must be text_input"),
        ([text_tensor("x"), text_tensor("y")], "inputs[1].name: 'TEXT' is given already"),
        ([text_tensor("x"), tensor("colour", "INT32", 8)], "inputs[1].name: there is no input"),
        ([tensor("TEXT", "INT8", 8)], "inputs[0].datatype: TEXT is BYTES, STRING"),
        ([tensor("TEXT", "BYTES", 8)], "inputs[0].data: '8' is no BYTES"),
        ([text_tensor("x") | {"shape": [2]}], "inputs[0].shape: [2] does not fit 1 elements"),
        ([text_tensor("x") | {"shape": []}, text_tensor("y")], "inputs[1].name"),
        ([text_tensor("x") | {"data": None}], "inputs[0].data: is required"),
        ([text_tensor("x") | {"shape": [0], "data": []}], "inputs[0].shape: 1 to"),
        ([text_tensor("x"), tensor("max_tokens", "FP32", 8.0)], "inputs[1].datatype"),
        ([text_tensor("x"), tensor("max_tokens", "INT8", 200)], "inputs[1].data: '200' is no INT8"),
        ([text_tensor("x"), tensor("max_tokens", "UINT8", -1)], "inputs[1].data: '-1' is no UINT8"),
        ([text_tensor("x"), tensor("max_tokens", "INT32", True)], "'True' is no INT32"),
        ([text_tensor("x"), tensor("max_tokens", "INT32", 1, 2)], "inputs[1].shape: max_tokens has"),
        ([text_tensor("x"), tensor("temperature", "FP16", 0.5)], "FP16 has no form in JSON"),
        ([text_tensor("x"), tensor("temperature", "FP32", 1e39)], "inputs[1].data: '1e+39' is no FP32"),
        ([text_tensor("x"), tensor("ignore_eos", "BOOL", 1)], "inputs[1].data: '1' is no BOOL"),
        ([text_tensor("x"), tensor("top_p", "FP32", 5.0)], "top_p: must be above 0 to 1"),
        ([text_tensor("")], "text_input: is empty"),
        (
            [text_tensor("x") | {"data": None, "parameters": {"binary_data_size": 5}}],
            "binary tensors and shared memory are not supported",
        ),
    ],
)  # fmt: skip
def test_the_limits_of_the_types_are_told(stack: Stack, inputs: Any, problem: str) -> None:
    answer = httpx.post(f"{stack.url}{MODEL}/infer", json={"inputs": inputs})
    assert answer.status_code == 400
    assert list(answer.json()) == ["error"]
    assert problem in answer.json()["error"]


@pytest.mark.parametrize(
    ("path", "body", "status", "problem"),
    [
        ("/v2/models/gpt-5/generate", {"text_input": "x"}, 404, "gpt-5"),
        (f"{MODEL}/versions/2/generate", {"text_input": "x"}, 404, "version 1 alone"),
        (f"{MODEL}/generate", {}, 400, "text_input is required"),
        (f"{MODEL}/generate", {"text_input": "x", "parameters": {"stream": True}}, 400, "stream"),
        (f"{MODEL}/generate", {"text_input": "x", "parameters": {"top_p": 7}}, 400,
         "parameters.top_p: must be above 0 to 1"),
        (f"{MODEL}/generate_stream", {"text_input": "x", "nonsense": 1}, 400, "nonsense"),
        (f"{MODEL}/infer", {"inputs": [text_tensor("x")], "outputs": [{"name": "y"}]}, 400,
         "outputs[0].name: there is no output 'y'"),
        (f"{MODEL}/infer", {"inputs": [text_tensor("x")], "parameters": {"priority": 1}}, 400,
         "parameters.priority"),
    ],
)  # fmt: skip
def test_refusals(stack: Stack, path: str, body: Any, status: int, problem: str) -> None:
    answer = httpx.post(f"{stack.url}{path}", json=body)
    assert answer.status_code == status
    assert problem in answer.json()["error"]


def test_tritons_own_client(stack: Stack) -> None:
    triton = pytest.importorskip("tritonclient.http", reason="pip install 'tritonclient[http]'")
    numpy = pytest.importorskip("numpy")
    with triton.InferenceServerClient(stack.url.removeprefix("http://")) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("default")
        assert client.is_model_ready("default", "1")
        assert not client.is_model_ready("gpt-5")
        assert client.get_server_metadata()["name"] == "sluice"
        model = client.get_model_metadata("sluice-tiny")
        text = triton.InferInput(model["inputs"][0]["name"], [1], model["inputs"][0]["datatype"])
        text.set_data_from_numpy(numpy.array([PROMPT], dtype=object), binary_data=False)
        limit = triton.InferInput("max_tokens", [1], "INT32")
        limit.set_data_from_numpy(numpy.array([8], dtype=numpy.int32), binary_data=False)
        result = client.infer("default", [text, limit], request_id="r")
        (said,) = result.as_numpy("text_output")
        assert said in (continuation(stack), continuation(stack).encode())
        assert result.get_response()["id"] == "r"
        with pytest.raises(triton.InferenceServerException, match="gpt-5"):
            client.infer("gpt-5", [text, limit])
        text.set_data_from_numpy(numpy.array([PROMPT], dtype=object), binary_data=True)
        with pytest.raises(triton.InferenceServerException):
            client.infer("default", [text])
