"""One page about a run: `python -m fastmum.report RUN`."""
