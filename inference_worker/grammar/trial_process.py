"""Compiles grammars on trial, in a process of its own that may die of one.

Run by its path, so it knows nothing of the package that it lies in. Reads one JSON object a line: `grammar`,
`limits` (of llguidance's parser) and `seconds` of processor time. Answers with one JSON string a line: what is wrong
with the grammar, empty if nothing is. A grammar that takes longer, or more memory, ends the process instead.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import threading

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

_MEMORY_BYTES = (
    1024 * 1024 * 1024
)  # address space of the whole process, a tenth of it before the first grammar
# Half of what the threads have that compile in the worker: whatever fits here, fits there.
_STACK_BYTES = 4 * 1024 * 1024


class _Bytes:
    """A vocabulary of all bytes. How long a grammar takes to compile does not depend on the vocabulary."""

    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")
    special_token_ids = (256,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def main() -> None:
    _limit(resource.RLIMIT_AS, _MEMORY_BYTES)
    _limit(resource.RLIMIT_CORE, 0)
    tokenizer = LLTokenizer(TokenizerWrapper(_Bytes()))
    for line in sys.stdin.buffer:
        job = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, job["seconds"])  # SIGPROF ends the process
        matcher = LLMatcher(
            tokenizer, job["grammar"], log_level=0, limits=LLParserLimits(**job["limits"])
        )
        matcher.compute_bitmask()
        problem = matcher.get_error()
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(problem) + "\n")
        sys.stdout.flush()


def _limit(kind: int, value: int) -> None:
    _soft, hard = resource.getrlimit(kind)
    if hard == resource.RLIM_INFINITY or value <= hard:
        resource.setrlimit(kind, (value, hard))


if __name__ == "__main__":
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=main)
    thread.start()
    thread.join()
