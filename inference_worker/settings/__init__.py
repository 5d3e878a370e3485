"""Settings of the worker: each one a field, a flag and an environment variable, read once at the start."""

from inference_worker.settings.engine import EngineSettings
from inference_worker.settings.model import EMBEDDED_MODEL_NAME, ModelSettings
from inference_worker.settings.replay import ReplaySettings
from inference_worker.settings.request import RequestSettings
from inference_worker.settings.server import ServerSettings
from inference_worker.settings.telemetry import TelemetrySettings

__all__ = ["EMBEDDED_MODEL_NAME", "WorkerSettings"]


# The order of --help is that of the groups from the last to the first.
class WorkerSettings(
    TelemetrySettings,
    ServerSettings,
    ReplaySettings,
    RequestSettings,
    EngineSettings,
    ModelSettings,
):
    """Serve one language model over gRPC."""
