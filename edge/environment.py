"""What the environment says under the settings' prefix besides settings: misspelt ones, and what Kubernetes adds."""

import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Final

# Kubernetes, "Accessing the Service": a Service named sluice-edge, or sluice-edge-x, gives each container these.
_LINK_VALUE: Final = re.compile(r"(tcp|udp|sctp)://\S+:[0-9]{1,5}", re.IGNORECASE)
_LINK_NAME: Final = re.compile(
    r"(.+_)?(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT_[0-9]{1,5}_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)


def misspelt(prefix: str, settings: Collection[str], environment: Mapping[str, str]) -> str | None:
    """What is wrong with a variable that has the prefix and is no setting, or None. An empty one is an unset one."""
    names = [name.upper() for name in settings]
    for given, value in environment.items():
        name = given.upper().removeprefix(prefix)
        if name in names or not value or not given.upper().startswith(prefix):
            continue
        if _LINK_NAME.fullmatch(name) or _is_link(name, value):
            continue
        close = get_close_matches(name, names, n=1)
        return f"{given}: no such setting" + (
            f", did you mean {prefix}{close[0]}?" if close else ""
        )
    return None


def linked(prefix: str, settings: Collection[str], environment: Mapping[str, str]) -> set[str]:
    """The settings whose variable is not theirs: Kubernetes has put a Service's address there."""
    values = {given.upper(): value for given, value in environment.items()}
    variables = {name: prefix + name.upper() for name in settings}
    return {
        name
        for name, variable in variables.items()
        if variable in values and _is_link(variable, values[variable])
    }


def _is_link(name: str, value: str) -> bool:
    return name.endswith("PORT") and _LINK_VALUE.fullmatch(value) is not None
