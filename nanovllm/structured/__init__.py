"""Structured output: grammars for answers, and masks of the allowed next tokens."""
