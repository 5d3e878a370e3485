"""One generating route of each dialect, for failures to be told on."""

from typing import Any

import grpc

CHAT = {"messages": [{"role": "user", "content": "hi"}]}

ROUTES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", CHAT | {"stream": True}),
    "chat unstreamed": ("/v1/chat/completions", CHAT),
    "completions": ("/v1/completions", {"prompt": "hi", "stream": True}),
    "completions unstreamed": ("/v1/completions", {"prompt": "hi"}),
    "native": ("/v1/streams", {"prompt": "hi"}),
}

Code = grpc.StatusCode
