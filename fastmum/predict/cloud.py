"""Point clouds as files: PLY, GLB."""

import json
import struct

import numpy as np

VERTEX = np.dtype([("xyz", "<f4", 3), ("rgb", "u1", 3)])
GLTF_FLOAT, GLTF_BYTE, GLTF_POINTS = 5126, 5121, 0  # constants of glTF 2.0
OPENCV_TO_GLTF = [1, 0, 0, 0]  # quaternion x y z w: half a turn about x, since y is up in glTF


def ply(xyz: np.ndarray, rgb: np.ndarray) -> bytes:
    """A binary PLY file of points (N, 3) and their colours (N, 3) uint8."""
    vertices = np.empty(len(xyz), VERTEX)
    vertices["xyz"], vertices["rgb"] = xyz, rgb
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {len(xyz)}"]
    lines += [*(f"property float {axis}" for axis in "xyz"), *(f"property uchar {c}" for c in ("red", "green", "blue"))]
    return "\n".join([*lines, "end_header\n"]).encode() + vertices.tobytes()


def glb(xyz: np.ndarray, rgb: np.ndarray) -> bytes:
    """A glTF 2.0 file, binary, of the same; a node turns OpenCV's axes to glTF's."""
    xyz, count = np.ascontiguousarray(xyz, "<f4"), len(xyz)
    colours = np.concatenate([rgb, np.full((count, 1), 255, np.uint8)], axis=1)  # padded to four bytes
    content = xyz.tobytes() + colours.tobytes()
    low, high = (bound.tolist() for bound in (xyz.min(0), xyz.max(0)))
    scene = {
        "asset": {"version": "2.0", "generator": "fastmum"},
        "scene": 0, "scenes": [{"nodes": [0]}], "nodes": [{"mesh": 0, "rotation": OPENCV_TO_GLTF}],
        "meshes": [{"primitives": [{"mode": GLTF_POINTS, "attributes": {"POSITION": 0, "COLOR_0": 1}}]}],
        "accessors": [
            {"bufferView": 0, "componentType": GLTF_FLOAT, "count": count, "type": "VEC3", "min": low, "max": high},
            {"bufferView": 1, "componentType": GLTF_BYTE, "normalized": True, "count": count, "type": "VEC4"},
        ],
        "bufferViews": [
            {"buffer": 0, "byteOffset": 0, "byteLength": xyz.nbytes},
            {"buffer": 0, "byteOffset": xyz.nbytes, "byteLength": colours.nbytes},
        ],
        "buffers": [{"byteLength": len(content)}],
    }  # fmt: skip
    text = json.dumps(scene).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(content), b"BIN\0") + content
    return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks
