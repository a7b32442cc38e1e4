"""Tables of offline predictions, and GPU-hours projected from them."""

import json

import pytest

from benchmarks.projection import ProjectionError, gpu_hours, projection_tables, read_predictions

SIDE = {"flops": 2.6e13, "bytes": 1.5e11, "launches": 1200, "peak_bytes": 3.1e10, "predicted_ms": 150.0}
PREDICTIONS = {
    "gpu": "A100-80GB", "model": "mum_vitl16", "frames": 96, "fastmum": SIDE,
    "reference": SIDE | {"predicted_ms": 300.0, "launches": 5000},
}  # fmt: skip


def test_hours():
    assert gpu_hours(518.4, 64) == pytest.approx(4608)  # 500,000 x 0.5184 s x 64: the paper's 4,608 GPU-hours
    assert gpu_hours(3600.0, 1, steps=1000) == pytest.approx(1.0)


def test_tables(tmp_path):
    path = tmp_path / "offline.json"
    path.write_text(json.dumps(PREDICTIONS))
    text = "\n".join(projection_tables(read_predictions(path)))
    assert "For mum_vitl16, 96 frames per GPU, A100-80GB." in text
    assert "| fastmum | 26.00 | 150.0 | 1,200 | 31.0 | 150.0 | 2.00 |" in text
    assert "| reference | 26.00 | 150.0 | 5,000 | 31.0 | 300.0 | 1.00 |" in text
    assert "4,608 GPU-hours" in text
    assert "| fastmum | 1,333 | 0.87 | 29% |" in text
    assert "compiled" not in text
    text = "\n".join(projection_tables(PREDICTIONS | {"reference_compiled": SIDE | {"predicted_ms": 200.0}}))
    assert "| reference, compiled | 26.00 | 150.0 | 1,200 | 31.0 | 200.0 | 1.50 |" in text


@pytest.mark.parametrize(
    ("text", "named"),
    [(None, "cannot be read"), ("{", "JSON"), ("[]", "'fastmum'"), (json.dumps({"fastmum": SIDE}), "'reference'"),
     (json.dumps(PREDICTIONS | {"reference": {"flops": 1}}), "reference.bytes")],
)  # fmt: skip
def test_other_files_are_refused(tmp_path, text, named):
    path = tmp_path / "offline.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ProjectionError, match=f"offline.json.*{named}"):
        read_predictions(path)
