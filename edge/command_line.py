"""Reads settings from flags and the environment: --help lists them all, a bad value is one line and exit code 2."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from edge.environment import linked, misspelt
from edge.settings import ENV_PREFIX, EdgeSettings

PROGRAM = "edge"
# Units that say what a number is, not what it counts: "8000 port" would be no English.
_NO_COUNT = frozenset({"port"})


class _Parser(argparse.ArgumentParser):
    """Argparse prints its usage before an error; one line is enough."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (--help lists the settings)", file=sys.stderr)
        raise SystemExit(2)


def read_settings(arguments: Sequence[str]) -> EdgeSettings:
    """Makes the settings: a flag wins over its environment variable, which wins over the default.

    Raises SystemExit(2) after one line that names the setting, SystemExit(0) after --help.
    """
    given = vars(_parser().parse_args(arguments))
    fields = EdgeSettings.model_fields
    if (problem := misspelt(ENV_PREFIX, fields, os.environ)) is not None:
        print(f"{PROGRAM}: {problem} (--help lists the settings)", file=sys.stderr)
        raise SystemExit(2)
    unset = {name: fields[name].default for name in linked(ENV_PREFIX, fields, os.environ)}
    try:
        return EdgeSettings(**unset | given)
    except ValidationError as error:
        print(f"{PROGRAM}: {_explain(given, error)}", file=sys.stderr)
        raise SystemExit(2) from None


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        description=EdgeSettings.__doc__,
        argument_default=argparse.SUPPRESS,  # what was not given stays out, for the environment to fill
        allow_abbrev=False,
    )
    for name, field in EdgeSettings.model_fields.items():
        is_switch = field.annotation is bool
        parser.add_argument(
            _flag(name),
            dest=name,
            help=_help(name, field),
            metavar=_unit(field).upper(),
            # A switch may stand alone, or say which way: --playground false.
            nargs="?" if is_switch else None,
            const="true" if is_switch else None,
        )
    return parser


def _help(name: str, field: FieldInfo) -> str:
    text = f"{field.description} (default: {_default(field)}; env: {_variable(name)})"
    return text.replace("%", "%%")  # argparse formats this text


def _default(field: FieldInfo) -> str:
    value, unit = field.default, _unit(field)
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float) and unit not in _NO_COUNT:
        return f"{value} {unit}"
    return str(value) or "none"


def _unit(field: FieldInfo) -> str:
    extra: Any = field.json_schema_extra
    return str(extra["unit"])


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _variable(name: str) -> str:
    return ENV_PREFIX + name.upper()


def _explain(given: dict[str, Any], error: ValidationError) -> str:
    first = error.errors()[0]
    name = str(first["loc"][0])
    source = _flag(name) if name in given else _variable(name)
    message = first["msg"].removeprefix("Value error, ")
    return f"{source}: {message}, got {str(first['input'])[:100]!r}"
