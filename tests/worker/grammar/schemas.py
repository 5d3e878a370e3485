"""JSON schemas made by hypothesis."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

Schema = dict[str, Any]

_PATTERNS = ("^[a-z]{1,5}$", "^(yes|no)$", "^\\d{4}-\\d{2}$", '^x[^"]{0,3}y$', "^[αβγ]+$", "^\\w+$")


@st.composite
def integers(draw: st.DrawFn) -> Schema:
    low = draw(st.integers(-300, 300))
    return {"type": "integer", "minimum": low, "maximum": low + draw(st.integers(0, 500))}


@st.composite
def numbers(draw: st.DrawFn) -> Schema:
    low = draw(st.integers(-30, 30))
    kind = draw(st.sampled_from(["minimum", "exclusiveMinimum"]))
    return {"type": "number", kind: low, "maximum": low + draw(st.integers(1, 50))}


@st.composite
def strings(draw: st.DrawFn) -> Schema:
    if draw(st.booleans()):
        return {"type": "string", "pattern": draw(st.sampled_from(_PATTERNS))}
    low = draw(st.integers(0, 4))
    return {"type": "string", "minLength": low, "maxLength": low + draw(st.integers(0, 6))}


@st.composite
def combined_integers(draw: st.DrawFn) -> Schema:
    """An integer by several keywords, or by several schemas at once."""
    low, width, factor = (
        draw(st.integers(-50, 50)),
        draw(st.integers(20, 200)),
        draw(st.integers(2, 9)),
    )
    bounds = {"minimum": low, "maximum": low + width}
    if draw(st.booleans()):
        return {"type": "integer", "multipleOf": factor, **bounds}
    return {"allOf": [{"type": "integer", **bounds}, {"minimum": low + 5}]}


_FORMATS = ("date", "time", "date-time", "email", "ipv4", "ipv6", "uuid")

_scalars = st.one_of(
    integers(),
    numbers(),
    strings(),
    combined_integers(),
    st.just({"type": ["integer", "null"], "minimum": 3, "maximum": 70}),
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.sampled_from(_FORMATS).map(lambda name: {"type": "string", "format": name}),
    st.lists(st.sampled_from(["red", "é\n", 7, 2.5, None, True]), min_size=1, unique_by=repr).map(
        lambda values: {"enum": values}
    ),
    st.sampled_from([{"const": "one"}, {"const": {"a": [1, None]}}]),
)

_names = st.sampled_from(["a", "name", "naïve", 'quo"te', "x y", "$id_"])


@st.composite
def objects(draw: st.DrawFn, values: st.SearchStrategy[Schema]) -> Schema:
    properties = draw(st.dictionaries(_names, values, max_size=3))
    required = [name for name in properties if draw(st.booleans())]
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": draw(st.sampled_from([False, {"type": "integer"}])),
    }


@st.composite
def arrays(draw: st.DrawFn, values: st.SearchStrategy[Schema]) -> Schema:
    low = draw(st.integers(0, 2))
    return {
        "type": "array",
        "items": draw(values),
        "minItems": low,
        "maxItems": low + draw(st.integers(0, 2)),
    }


@st.composite
def tuples(draw: st.DrawFn, values: st.SearchStrategy[Schema]) -> Schema:
    items = draw(st.lists(values, min_size=1, max_size=3))
    least = draw(st.integers(0, len(items)))
    return {"type": "array", "prefixItems": items, "items": False, "minItems": least}


@st.composite
def tagged(draw: st.DrawFn, values: st.SearchStrategy[Schema]) -> Schema:
    """One of several objects, of which a property tells which."""
    members = [
        {
            "type": "object",
            "properties": {"kind": {"const": kind}, "value": draw(values)},
            "required": ["kind", "value"],
            "additionalProperties": False,
        }
        for kind in draw(st.sampled_from([["a"], ["a", "b"], ["a", "b", "ab"]]))
    ]
    return {"oneOf": members}


@st.composite
def named_by_pattern(draw: st.DrawFn, values: st.SearchStrategy[Schema]) -> Schema:
    return {
        "type": "object",
        "patternProperties": {"^x[0-9]$": draw(values)},
        "properties": {"id": {"type": "boolean"}},
        "required": draw(st.sampled_from([[], ["id"]])),
        "additionalProperties": False,
    }


def _deeper(values: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    return st.one_of(
        objects(values),
        arrays(values),
        tuples(values),
        tagged(values),
        named_by_pattern(values),
        st.lists(values, min_size=1, max_size=3).map(lambda members: {"anyOf": members}),
    )


_trees = st.recursive(_scalars, _deeper, max_leaves=6)


@st.composite
def schemas(draw: st.DrawFn) -> Schema:
    """A schema whose every text ends, some with a definition that refers to itself."""
    schema = draw(_trees)
    if draw(st.booleans()):
        return schema
    node = {
        "type": "object",
        "properties": {
            "value": schema,
            "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
        },
        "required": ["value", "next"],
        "additionalProperties": False,
    }
    return {"$defs": {"node": node}, "$ref": "#/$defs/node"}
