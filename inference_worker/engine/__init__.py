"""The continuous-batching engine. Imports neither grpc nor torch: the model is behind `runner.Runner`."""
