"""Makes the default model from scratch: corpus, tokenizer, training, checkpoint, check.

``python -m inference_worker.default_model.train`` takes half an hour on two CPU cores. The same
machine and library versions give the same weights, bit by bit. Where other work shares the
cores, ``OMP_WAIT_POLICY=PASSIVE`` in the environment keeps the two threads from spinning while
they wait for each other; the result is the same.
"""

import argparse
import json
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from inference_worker.default_model import CHECKPOINT, corpus
from inference_worker.default_model.batches import IGNORED, batches
from inference_worker.default_model.card import Figures, card
from inference_worker.default_model.optimizer import Muon
from inference_worker.default_model.pinned import (
    Pinned,
    computed,
    failures,
    pinned,
    with_tools,
)
from inference_worker.default_model.tools import compose_with_tools
from inference_worker.default_model.train_tokenizer import (
    CHAT_TEMPLATE,
    END_OF_TEXT,
    IM_END,
    TOKENIZER_CONFIG,
    token_id,
    train_tokenizer,
)

TOKENS_PER_BATCH: Final = 2048
DRILLS: Final = 15_000
MATRIX_RATE: Final = 0.02
OTHER_RATE: Final = 0.005
WARMUP_STEPS: Final = 50
DECAY_SHARE: Final = 0.6
THREADS: Final = 2
REPORT_EVERY: Final = 50


def make_deterministic() -> None:
    """Fixes everything that the result depends on: seed, thread count, kernels."""
    torch.manual_seed(corpus.SEED)
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)


def build_model(tokenizer: Tokenizer) -> Any:
    """The untrained model."""
    end, pad = token_id(tokenizer, IM_END), token_id(tokenizer, END_OF_TEXT)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=[end, pad],
            pad_token_id=pad,
            dtype="float32",
        )
    )
    model.generation_config.do_sample = False
    model.generation_config.eos_token_id = [end, pad]
    model.generation_config.pad_token_id = pad
    return model


def rate(step: int, steps: int) -> float:
    """The learning rate as a share of its peak: warm-up, plateau, straight to zero."""
    return min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / (steps * DECAY_SHARE))


def optimizers(model: Any) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    hidden = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in hidden}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        Muon(hidden, lr=MATRIX_RATE),
        torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


def train(model: Any, stream: Batches, steps: int, peak_share: float) -> None:
    """Trains in place."""
    pair = optimizers(model)
    peaks = [peak_share * optimizer.param_groups[0]["lr"] for optimizer in pair]
    losses: deque[float] = deque(maxlen=REPORT_EVERY)
    started = time.monotonic()
    for step, (ids, labels) in enumerate(islice(stream, steps)):
        for optimizer, peak in zip(pair, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate(step, steps)
        learned = labels != IGNORED
        # Logits for the learned positions only: the rest would be thrown away.
        logits = model.lm_head(model.model(ids).last_hidden_state[learned])
        loss = cross_entropy(logits, labels[learned])
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in pair:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % REPORT_EVERY == 0 or step + 1 == steps:
            report(step + 1, steps, time.monotonic() - started, sum(losses) / len(losses))


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the training, with a learning rate that rises and falls of its own."""

    steps: int
    peak_share: float  # of the rates above
    has_tools: bool
    seed: int
    counts: float = 0.0  # share of counting besides

    def batches(self, tokenizer: Tokenizer) -> Batches:
        """Its batches, of samples that no other stage has seen."""
        if self.has_tools:
            samples = compose_with_tools(self.seed, self.counts)
            return batches(tokenizer, samples, self.seed, TOKENS_PER_BATCH)
        samples = corpus.compose(self.seed, DRILLS)
        return batches(tokenizer, samples, self.seed, TOKENS_PER_BATCH, DRILLS)


STAGES: Final = (
    Stage(2400, 1.0, has_tools=False, seed=corpus.SEED),
    Stage(700, 0.35, has_tools=True, seed=corpus.SEED),  # tools, among what was learned before
    # to settle
    Stage(200, 0.15, has_tools=True, seed=corpus.SEED + 2, counts=0.25),
    Stage(200, 0.1, has_tools=True, seed=corpus.SEED + 4, counts=0.1),
)


def report(done: int, steps: int, seconds: float, loss: float) -> None:
    """One line of progress."""
    left = seconds / done * (steps - done)
    print(f"step {done}/{steps}  loss {loss:.4f}  {seconds:.0f} s, {left:.0f} s left", flush=True)


def save(model: Any, tokenizer: Tokenizer, out: Path) -> None:
    """Writes an ordinary Hugging Face checkpoint."""
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=2) + "\n")
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    for path in out.iterdir():
        path.chmod(0o644)  # safetensors writes files that only their owner can read


def check(out: Path) -> tuple[int, list[tuple[Pinned, str]]]:
    """Loads the checkpoint again and returns how many answers were checked and which failed."""
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out)
    known, generated = [*pinned(), *with_tools()], computed()
    wrong = list(failures(model, tokenizer, known))
    wrong += failures(model, tokenizer, generated, batch=20)
    return len(known) + len(generated), wrong


def run(stages: Sequence[Stage], tokenizer: Tokenizer, work: Path, most_steps: int) -> Any:
    """Trains through the stages, each kept in a folder of `work`, from which an interrupted training goes on.

    The result has the mean of the weights at the ends of the stages with tools, which answers more surely than any of
    them (Izmailov et al., Averaging Weights Leads to Wider Optima, arXiv 1803.05407).
    """
    model = build_model(tokenizer)
    ends: list[dict[str, torch.Tensor]] = []
    for number, stage in enumerate(stages, 1):
        folder = work / f"stage-{number}"
        if folder.exists():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        else:
            steps = min(stage.steps, most_steps)
            train(model, stage.batches(tokenizer), steps, stage.peak_share)
            save(model, tokenizer, folder)
        if stage.has_tools:
            ends.append({name: value.clone() for name, value in model.state_dict().items()})
    model.load_state_dict({name: sum(end[name] for end in ends) / len(ends) for name in ends[0]})
    return model


def main() -> int:
    """Trains, saves and checks; the exit status is 1 where a pinned answer is wrong."""
    parser = argparse.ArgumentParser(description="Makes the default model from scratch.")
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="checkpoint folder")
    parser.add_argument(
        "--work", type=Path, default=Path("build/default_model"), help="folder of the stages"
    )
    parser.add_argument("--most-steps", type=int, default=10**9, help="of each stage; for a trial")
    parser.add_argument("--no-check", action="store_true", help="skip the pinned answers")
    options = parser.parse_args()
    started = time.monotonic()
    make_deterministic()
    tokenizer = train_tokenizer()
    model = run(STAGES, tokenizer, options.work, options.most_steps)
    save(model, tokenizer, options.out)
    seconds = time.monotonic() - started
    checked, wrong = (0, []) if options.no_check else check(options.out)
    for conversation, answer in wrong:
        print(f"wrong: {conversation['messages'][-1]['content']!r} -> {answer!r}")
    figures = Figures(
        parameters=model.num_parameters(),
        vocabulary=tokenizer.get_vocab_size(),
        steps=[stage.steps for stage in STAGES],
        passed=checked - len(wrong),
        checked=checked,
    )
    (options.out / "README.md").write_text(card(figures), encoding="utf-8")
    print(f"{checked - len(wrong)} of {checked} answers exact; {seconds:.0f} s; {options.out}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
