"""Write a model's AWQ form, of 4 bits a weight, which the worker serves. Needs autoawq: the extra `quantize`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

PROGRAM = "inference_worker.quantize"
BUILT_IN_TEXT: Final = Path(__file__).with_name("calibration.txt")


class _Parser(argparse.ArgumentParser):
    """Argparse prints its usage before an error; one line is enough."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (--help lists the options)", file=sys.stderr)
        raise SystemExit(2)


def main(arguments: Sequence[str]) -> int:
    """Quantize; 0, or 2 after one line on stderr that says what is wrong."""
    given = _parser().parse_args(arguments)
    out: Path = given.out
    if out.exists():
        return _refuse(f"{out}: exists already, and nothing is overwritten")
    if _looks_like_path(given.model) and not Path(given.model).is_dir():
        return _refuse(f"{given.model}: no such directory")
    calibration: Path = given.calibration
    try:
        text = calibration.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        return _refuse(f"--calibration: {calibration}: {reason}")
    # Imported only now: --help and a bad option need no torch.
    from inference_worker.model.awq_writer import CannotQuantize, QuantizeOptions, quantize
    from inference_worker.model.errors import LoadError

    options = QuantizeOptions(
        group_size=given.group_size,
        layout=given.layout,
        zero_point=given.zero_point,
        calibration_tokens=given.calibration_tokens,
    )
    try:
        quantize(given.model, out, text, options)
    except (CannotQuantize, LoadError) as error:
        return _refuse(f"{given.model}: {error}")
    except OSError as error:
        return _refuse(f"{out}: {error.strerror or error}")
    print(f"written: {out}; serve it with --model {out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, description=__doc__, allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help="checkpoint directory or hub id")
    parser.add_argument("out", metavar="OUT", type=Path, help="directory to make")
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        type=Path,
        default=BUILT_IN_TEXT,
        help="UTF-8 text like what the model will be asked and will answer (default: a short one that is built in)",
    )
    parser.add_argument(
        "--calibration-tokens",
        metavar="TOKENS",
        type=_count,
        default=32768,
        help="how much of the text is used at most (default: %(default)s)",
    )
    parser.add_argument(
        "--group-size",
        metavar="INPUTS",
        type=int,
        choices=(32, 64, 128),
        default=128,
        help="inputs that share a scale: 32, 64 or 128 (default: %(default)s)",
    )
    parser.add_argument(
        "--layout",
        choices=("gemm", "gemv"),
        default="gemm",
        help="how the file packs the weights; they are served alike (default: %(default)s)",
    )
    parser.add_argument(
        "--zero-point",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="give each group a zero of its own; without, weights are symmetric about 0",
    )
    return parser


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 64:
        raise argparse.ArgumentTypeError(f"a whole number of at least 64 is wanted, got {text!r}")
    return int(text)


def _looks_like_path(model: str) -> bool:
    return model.startswith((".", "/", "~")) or model.count("/") > 1


def _refuse(message: str) -> int:
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
