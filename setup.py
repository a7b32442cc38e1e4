"""Packaging of fastmum.

`kernels/`, `configs/` and `launch/` are installed inside `fastmum`, because as top-level packages they would shadow
others of the same name.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "fastmum/__init__.py").read_text(), re.M).group(1)
MAPPED = {"fastmum.kernels": "kernels", "fastmum.configs": "configs", "fastmum.launch": "launch"}
EXTRAS = {
    "dali": ["nvidia-dali-cuda130>=2.0; sys_platform == 'linux'"],
    "colmap": ["scipy>=1.12", "pycolmap>=3.12"],
    "video": ["av>=14.2"],
    "flash": ["flash-attn>=2.7; sys_platform == 'linux'"],
    "flash4": ["flash-attn-4>=4.0.0b36; sys_platform == 'linux'"],
    "xformers": ["xformers>=0.0.35; sys_platform == 'linux'"],
    "wandb": ["wandb>=0.31"],
    "fp8": ["torchao>=0.12"],
    "evaluate": ["h5py>=3.10"],
    "recognition": ["scikit-learn>=1.4"],
    "exr": ["OpenEXR>=3.3"],
    "matching": ["opencv-python-headless>=4.8"],
    "remote": ["fsspec>=2024.6", "s3fs>=2024.6"],  # other stores: gcsfs, huggingface_hub, aiohttp
    "ray": ["ray>=2.52"],  # first version with tokens for clusters
    "viewer": ["plotly>=6.0"],  # plotly.js is inside
    "hf": ["transformers>=4.56"],  # first version with DINOv3
    "onnx": ["onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20"],
}
TESTED_WITHOUT_GPU = (
    "dali", "colmap", "video", "wandb", "fp8", "evaluate", "recognition", "exr", "matching", "remote", "ray", "viewer",
    "hf", "onnx",
)  # fmt: skip
EXTRAS["dev"] = [requirement for extra in TESTED_WITHOUT_GPU for requirement in EXTRAS[extra]]
# pycolmap writes the binary models of tests.
EXTRAS["dev"] += ["pycolmap>=3.12", "pytest>=8.2", "pytest-benchmark>=4.0", "hypothesis>=6.100", "ruff>=0.6"]
EXTRAS["dev"] += ["moto[server]>=5.0", "webdataset>=0.2.100"]  # an S3 server, and another reader of shards
EXTRAS["dev"] += ["mypy>=1.11", "types-PyYAML", "setuptools>=77"]

setup(
    name="fastmum",
    version=VERSION,
    description="Fast pretraining of MuM-style multi-view masked image encoders",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["fastmum", "fastmum.*"]), *MAPPED],
    package_dir={"fastmum": "fastmum", **MAPPED},
    package_data={
        "fastmum": ["py.typed"],
        "fastmum.report": ["*.html"],
        "fastmum.evaluate": ["*.html"],
        "fastmum.configs": ["*.yaml", "*/*.yaml"],
        "fastmum.launch": ["*.sh"],
    },
    entry_points={"console_scripts": ["fastmum=fastmum.cli:main"]},
    # The wheel of scikit-image has the photographs that texture the rendered scenes.
    install_requires=[
        "torch>=2.10", "triton>=3.4; sys_platform == 'linux'", "numpy>=1.26", "omegaconf>=2.3", "pillow>=11.3",
        "safetensors>=0.4.3", "xxhash>=3", "tensorboard>=2.16", "tqdm>=4.66", "natsort>=8.4", "scipy>=1.11.4",
        "pyarrow>=16", "pyyaml>=6", "platformdirs>=4.2", "scikit-image>=0.24", "jinja2>=3.1", "matplotlib>=3.8",
    ],
    extras_require=EXTRAS,
    classifiers=[
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)  # fmt: skip
