"""The worker as a gateway of the vLLM and SGLang world sees it: `vllm.grpc.engine.VllmEngine`.

Its messages come from the package smg-grpc-proto, which the worker runs fine without: nothing outside this package
imports it, and this package is imported only with `--vllm-engine`.
"""
