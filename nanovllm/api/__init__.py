"""HTTP: an OpenAI-compatible server on an `AsyncEngine`."""
