"""Weights for others: `python -m fastmum.export WEIGHTS --format released|safetensors|hf|onnx`.

A format is a line in `FORMATS` and a file here that writes it, and compares what it wrote with fastmum where it can.
"""

from fastmum.export.command import main
from fastmum.export.errors import ExportError
from fastmum.export.formats import FORMATS, Exported, Format, export
from fastmum.export.released import released_state

__all__ = ["FORMATS", "ExportError", "Exported", "Format", "export", "main", "released_state"]
