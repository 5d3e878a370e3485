"""Reads settings from flags and the environment: --help lists them all, a bad value is one line and exit code 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsError

from inference_worker.environment import linked, misspelt

Settings = TypeVar("Settings", bound=BaseSettings)


class _Parser(argparse.ArgumentParser):
    """Argparse prints its usage before an error; one line is enough."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (--help lists the settings)", file=sys.stderr)
        raise SystemExit(2)


def read_settings(
    settings_class: type[Settings], program: str, arguments: Sequence[str]
) -> Settings:
    """Make the settings: a flag wins over its environment variable, which wins over the default.

    Raises: SystemExit(2) after one line that names the setting, SystemExit(0) after --help.
    """
    given = vars(_parser(settings_class, program).parse_args(arguments))
    prefix, fields = _variable(settings_class, ""), settings_class.model_fields
    if (problem := misspelt(prefix, fields, os.environ)) is not None:
        print(f"{program}: {problem} (--help lists the settings)", file=sys.stderr)
        raise SystemExit(2)
    unset = {name: fields[name].default for name in linked(prefix, fields, os.environ)}
    try:
        return settings_class(**unset | given)
    except (ValidationError, SettingsError) as error:
        print(f"{program}: {_explain(settings_class, given, error)}", file=sys.stderr)
        raise SystemExit(2) from None


def _parser(settings_class: type[BaseSettings], program: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=program,
        description=settings_class.__doc__,
        argument_default=argparse.SUPPRESS,  # what was not given stays out, for the environment to fill
        allow_abbrev=False,
    )
    for name, field in settings_class.model_fields.items():
        is_switch = field.annotation is bool
        parser.add_argument(
            _flag(name),
            dest=name,
            help=_help(settings_class, name, field),
            metavar=_unit(field).upper().replace(" ", "_"),
            # A switch may stand alone, or say which way: --log-prompts, --prefix-cache false.
            nargs="?" if is_switch else None,
            const="true" if is_switch else None,
        )
    return parser


def _help(settings_class: type[BaseSettings], name: str, field: FieldInfo) -> str:
    text = (
        f"{field.description} (default: {_default(field)}; env: {_variable(settings_class, name)})"
    )
    return text.replace("%", "%%")  # argparse formats this text


def _default(field: FieldInfo) -> str:
    value = field.default
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(value)
    if isinstance(value, int | float):
        return f"{value} {_unit(field)}"
    return str(value)


def _unit(field: FieldInfo) -> str:
    extra: Any = field.json_schema_extra
    return str(extra["unit"])


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _variable(settings_class: type[BaseSettings], name: str) -> str:
    return f"{settings_class.model_config['env_prefix']}{name}".upper()


def _explain(
    settings_class: type[BaseSettings],
    given: dict[str, Any],
    error: ValidationError | SettingsError,
) -> str:
    if isinstance(error, SettingsError):
        return " ".join(str(error).split())
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:  # a rule about several settings, which names them itself
        return message
    name = str(first["loc"][0])
    source = _flag(name) if name in given else _variable(settings_class, name)
    return f"{source}: {message}, got {str(first['input'])[:100]!r}"
