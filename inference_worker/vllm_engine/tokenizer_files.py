"""The files of a checkpoint that another process needs to make its tokenizer and chat template, as a ZIP archive."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Final

from transformers.utils.hub import cached_file

# As vLLM's own servicer has it for text models (smg-grpc-servicer, tokenizer_bundle.py). A checkpoint has some of them.
_NAMES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.json",
    "chat_template.jinja",
)


def pack_tokenizer(model: str) -> bytes:
    """The archive of a directory or a hub id whose files are on this machine already. Takes a while: not for a loop.

    Raises: OSError, also if there are none.
    """
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as files:
        for name in _NAMES:
            path = cached_file(
                model,
                name,
                local_files_only=True,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
            if path is not None:
                files.writestr(name, Path(path).read_bytes())
    if not files.namelist():
        raise FileNotFoundError(f"{model}: no tokenizer files")
    return archive.getvalue()
