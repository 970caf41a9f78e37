"""Structured output: grammars for answers, and bitmasks of the allowed next tokens."""
