"""Benchmarks that need a CUDA device; without one they say so and end well."""
