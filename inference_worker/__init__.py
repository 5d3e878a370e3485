"""The inference worker: owns one model and streams what it generates over gRPC."""
