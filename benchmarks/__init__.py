"""Benchmarks: each module measures one figure next to the limits of the same machine and run."""
