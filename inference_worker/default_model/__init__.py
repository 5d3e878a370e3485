"""The embedded default model: a tiny trained chat model, shipped with the package.

``CHECKPOINT`` is an ordinary Hugging Face checkpoint folder (Llama architecture, safetensors).
The other modules compose its corpus, train its tokenizer and train the model from scratch:
``python -m inference_worker.default_model.train``. Importing this package loads nothing heavy.
"""

from pathlib import Path
from typing import Final

CHECKPOINT: Final[Path] = Path(__file__).resolve().parent / "checkpoint"

__all__ = ["CHECKPOINT"]
