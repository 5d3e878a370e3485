"""Grammars that mean harm: each is refused, and costs nobody else anything."""

from __future__ import annotations

import json

from inference_worker.grammar.source import GrammarSource


def _schema(schema: object) -> GrammarSource:
    return GrammarSource("json_schema", json.dumps(schema))


def _doubling(depth: int) -> dict[str, object]:
    """A schema that doubles with each of its definitions."""
    definitions: dict[str, object] = {"a0": {"type": "string", "pattern": "^.*a.*$"}}
    for i in range(1, depth + 1):
        before = {"$ref": f"#/$defs/a{i - 1}"}
        definitions[f"a{i}"] = {"allOf": [before, before]}
    return {"$defs": definitions, "$ref": f"#/$defs/a{depth}"}


# These two were seen to take half a minute and gigabytes, whatever limits the library is given.
ENDLESS = {
    "an intersection of many patterns": _schema(
        {"type": "string", "allOf": [{"pattern": f".*{chr(97 + i)}{i}.*"} for i in range(20)]}
    ),
    "definitions that double": _schema(_doubling(25)),
}

REFUSED = ENDLESS | {
    "a remote reference": _schema({"$ref": "http://169.254.169.254/latest"}),
    "a reference to a file": _schema({"$ref": "file:///etc/passwd"}),
    "a schema that is itself": _schema({"$ref": "#"}),
    "definitions in a circle": _schema(
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
    ),
    "deep nesting": GrammarSource("json_schema", '{"items":' * 6000 + "{}" + "}" * 6000),
    "a deep regex": GrammarSource("regex", "(" * 60_000 + "a" + ")" * 60_000),
    "a deep grammar": GrammarSource("lark", "start: " + "(" * 60_000 + '"a"' + ")" * 60_000),
    "overlapping properties": _schema(
        {"type": "object", "patternProperties": {f"^{i}.*x$": {} for i in range(100)}}
    ),
    "no text at all": GrammarSource("regex", "[^\\s\\S]"),
    "an unsatisfiable schema": _schema({"type": "integer", "minimum": 5, "maximum": 1}),
    "a look-ahead": GrammarSource("regex", "(?=a)a"),
    "a special token": GrammarSource("lark", "start: <|im_end|>"),
    "an unknown rule": GrammarSource("lark", "start: nowhere"),
}

# These compile at once, however large they look; what they become on the way is bounded step by step.
LAZY = {
    "a long text": _schema({"type": "string", "minLength": 10_000_000}),
    "a long list": _schema({"type": "array", "minItems": 1_000_000, "items": {"type": "null"}}),
    "nested repetition": GrammarSource("regex", "((a{1,999}){1,999}){1,999}"),
    "exponential states": GrammarSource("regex", "(a|b)*a(a|b){25}"),
    "a large alternation": GrammarSource("choice", json.dumps([f"c{i}" for i in range(4096)])),
    "an ambiguous grammar": GrammarSource("lark", 'start: "a"* start | start start | ""'),
    "many lexemes": GrammarSource(
        "lark",
        "start: (" + "|".join(f"T{i}" for i in range(300)) + ")*\n"
        "" + "\n".join(f"T{i}: /[a-z]*{i}[a-z]*{i}/" for i in range(300)),
    ),
}
