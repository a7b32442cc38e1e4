"""What a run tells: metrics.jsonl, TensorBoard, pictures, and Weights & Biases where it is asked for."""

from fastmum.engine.metrics import read_metrics
from fastmum.engine.telemetry.telemetry import Telemetry

__all__ = ["Telemetry", "read_metrics"]
