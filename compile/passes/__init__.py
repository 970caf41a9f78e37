"""Graph passes: each is a function `(graph, fakes, *, options) -> graph` in a file of its own."""
