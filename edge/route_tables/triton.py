"""KServe's and Triton's routes."""

from typing import Any

from edge.dialects import triton
from edge.dialects import triton_schema as shape
from edge.dialects.triton_endpoints import TritonEndpoints
from edge.operation import GENERATE_ERRORS, Generate, Operation
from edge.route_tables.bodies import from_path_and_body


def operations(generate: Generate, info: TritonEndpoints) -> list[Operation]:
    """Their rows."""
    health = (500, 503, 504)
    table: list[Operation] = []

    def add(method: str, path: str, endpoint: Any, summary: str, answer: Any, **more: Any) -> None:
        errors = GENERATE_ERRORS if method == "POST" else (404, *health)
        table.append(
            Operation(
                method,
                path,
                endpoint,
                summary,
                answer,
                more.pop("errors", errors),
                error=shape.TritonError,
                refuse=triton.refuse,
                last_event="The end of the body is its end.",
                **more,
            )
        )

    # A version is optional; the longer paths come first, since a model's name may have slashes.
    for base in ("/v2/models/{model:path}/versions/{version}", "/v2/models/{model:path}"):
        add(
            "POST",
            f"{base}/generate",
            generate(from_path_and_body(triton.parse_generate), triton.refuse),
            "Continues a text, as KServe and Triton do.",
            shape.TritonGeneration,
            body=shape.TritonGenerateRequest,
        )
        add(
            "POST",
            f"{base}/generate_stream",
            generate(from_path_and_body(triton.parse_stream), triton.refuse),
            "Streams the continuation of a text, as KServe and Triton do.",
            None,
            body=shape.TritonGenerateRequest,
            events={"": shape.TritonGeneration},
        )
        add(
            "POST",
            f"{base}/infer",
            generate(from_path_and_body(triton.parse_infer), triton.refuse),
            "Continues a tensor of texts, as KServe and Triton do.",
            shape.TritonInference,
            body=shape.TritonInferRequest,
        )
        ready = "Whether the model is served."
        add("GET", f"{base}/ready", info.model_ready, ready, shape.TritonReady)
    for base in ("/v2/models/{model:path}/versions/{version}", "/v2/models/{model:path}"):
        add("GET", base, info.model, "What the model takes and gives.", shape.TritonModel)
    add("GET", "/v2", info.server, "What answers here.", shape.TritonServer, errors=())
    live = "Whether the edge is alive."
    add("GET", "/v2/health/live", info.live, live, shape.TritonLive, errors=(), is_open=True)
    ready = "Whether a worker is serving."
    add(
        "GET", "/v2/health/ready", info.ready, ready, shape.TritonReady, errors=health, is_open=True
    )
    return table
