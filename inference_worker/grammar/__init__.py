"""Structured output: what a request's constraint says, compiled by llguidance into the engine's grammars."""
