"""Predictions of trained runs as files: `fastmum predict RUN ...`."""
