"""Benchmarks: of an engine in this process (`throughput`, `latency`), and of a server (`serve`)."""
