"""Streams whose client is a process that somebody else stops, kills or cuts off: `python -m … HOST PORT COUNT`.

Imports nothing but the standard library, since it starts many times.
"""

from __future__ import annotations

import json
import socket
import sys
import threading

BODY = {"prompt": "go", "max_tokens": 4000, "stream": True, "model": "default"}


def connect(host: str, port: int) -> socket.socket:
    """A connection with a request for a long stream on it, whose answer nobody reads."""
    connection = socket.socket()
    # so that what is not read is soon noticed
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(60)
    connection.connect((host, port))
    payload = json.dumps(BODY).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: edge\r\ncontent-length: {len(payload)}\r\n\r\n"
    connection.sendall(head.encode() + payload)
    return connection


if __name__ == "__main__":
    host, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    connections = [connect(host, port) for _ in range(count)]
    print("ready", flush=True)
    threading.Event().wait()
