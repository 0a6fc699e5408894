# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
from pathlib import Path

from setuptools import setup


HERE = Path(__file__).parent

setup(
    name="semantic-fill",
    version="0.1.0",
    description="Paired image translation with FLUX.1 Fill, guided by a semantic map",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=["semantic_fill"],
    package_data={"semantic_fill": ["py.typed"]},
    py_modules=["pipeline_flux_fill_semantic", "semantic_attention", "train_semantic_fill_lora"],
    entry_points={
        "console_scripts": [
            "semantic-fill-train = train_semantic_fill_lora:main",
            "semantic-fill-evaluate = semantic_fill.evaluate:run",
        ]
    },
    install_requires=(HERE / "requirements.txt").read_text().split(),
    extras_require={
        "benchmarks": ["basemap-data", "resvg-py", "scikit-image"],
        "app": ["basemap-data", "gradio>=6"],
        "demo": ["basemap-data", "scikit-image"],
        "evaluate": ["torchvision"],
        "test": [
            "bitsandbytes",
            "hypothesis",
            "playwright",
            "prodigyopt",
            "pytest",
            "pytest-xdist",
            "scikit-image",
        ],
        "quantization": ["bitsandbytes"],
        "tracking": ["wandb"],
    },
)
