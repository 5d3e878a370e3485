"""The HTTP side of Sluice: one gRPC message of the worker becomes one server-sent event."""
