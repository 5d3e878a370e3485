"""What orchestrators ask; on a port of their own if there is one."""

from edge import response_schema as shape
from edge.info_endpoints import InfoEndpoints
from edge.metrics import EdgeMetrics
from edge.operation import Operation


def operations(
    info: InfoEndpoints, metrics: EdgeMetrics, has_open_metrics: bool
) -> list[Operation]:
    """Their rows."""
    return [
        Operation(
            "GET",
            "/health",
            info.health,
            "Whether the edge is alive.",
            shape.Health,
            (),
            is_open=True,
        ),
        Operation(
            "GET",
            "/ready",
            info.ready,
            "Whether a worker serves and the edge is not stopping.",
            shape.Readiness,
            (),
            other_answers={503: "Not ready; the body says why."},
            is_open=True,
        ),
        Operation(
            "GET",
            "/metrics",
            metrics.show,
            "What Prometheus scrapes.",
            None,
            (),
            other_content={"text/plain": "Prometheus' text format."},
            is_open=has_open_metrics,
        ),
    ]
