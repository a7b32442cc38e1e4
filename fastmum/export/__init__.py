"""Export of weights: `python -m fastmum.export WEIGHTS --format released|safetensors|hf|timm|onnx`."""

from fastmum.export.formats import FORMATS, Exported, ExportError, Format, export, released_state

__all__ = ["FORMATS", "ExportError", "Exported", "Format", "export", "released_state"]
