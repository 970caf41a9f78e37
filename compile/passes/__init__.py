"""Graph passes: one function `(graph, fakes, *, options) -> graph` per file."""
