"""What a grammar may cost, in the units of llguidance's own parser, which are the same on every machine."""

from __future__ import annotations

from typing import Any, Final

# A step of a grammar that uses all of it takes some 10 ms; more fails the sequence, and no other. What steps may take
# on average is the budget's to say.
PARSER_LIMITS: Final[dict[str, Any]] = {
    "max_items_in_row": 1000,  # alternatives open at one place; optional properties of one object take four each
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 25_000,
    "max_lexer_states": 16_384,  # up to 2 kB each, shared by all choices of one grammar
    "max_grammar_size": 250_000,  # symbols
    "precompute_large_lexemes": False,  # would make the time to compile depend on the vocabulary
    "verbose_errors": False,
}
