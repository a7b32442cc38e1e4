"""Measurements of speed: `make benchmark`, or one of the modules by itself, `python -m benchmarks.step`."""
