"""The part of gpu.py that vLLM does, in a process of its own: `python -m benchmarks.gpu_vllm JOB`.

JOB is the plan as JSON. vLLM fills a model of the same shape with random weights itself. A step's time is that of a
long run less that of a short one with the same prompts, by the steps between them. Prints seconds by number of
sequences, as JSON on a line of its own.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from benchmarks.gpu import GROUP_SIZE, SHAPES

_SHORT: Final = 8  # tokens


def write_config(folder: Path, shape_name: str, weights: str) -> None:
    """A checkpoint without weights."""
    shape = SHAPES[shape_name]
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    if weights == "awq":
        config["quantization_config"] = {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP_SIZE,
            "zero_point": True,
            "version": "gemm",
        }
    (folder / "config.json").write_text(json.dumps(config))


def main() -> None:
    job: dict[str, Any] = json.loads(sys.argv[1])
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as name:
        write_config(Path(name), job["shape"], job["weights"])
        engine = LLM(
            model=name,
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype="bfloat16",
            max_model_len=job["length"],
            max_num_seqs=max(job["batches"]),
            enable_prefix_caching=False,
            gpu_memory_utilization=0.85,
        )

    def seconds(count: int, num_tokens: int) -> float:
        vocabulary = SHAPES[job["shape"]].vocabulary
        prompts = [
            {
                "prompt_token_ids": [
                    (7 * i + 13 * j) % vocabulary for j in range(job["prompt_tokens"])
                ]
            }
            for i in range(count)
        ]
        params = SamplingParams(
            temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False
        )
        began = time.perf_counter()
        engine.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - began

    found: dict[int, list[float]] = {}
    for count in job["batches"]:
        long = _SHORT + job["steps"]
        seconds(count, long)  # warms up
        found[count] = [
            (seconds(count, long) - seconds(count, _SHORT)) / job["steps"]
            for _ in range(job["repetitions"])
        ]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
