"""Package metadata. Tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """`__version__` of the package, read as text: importing it would need its dependencies."""
    text = (ROOT / "megatron_amd" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('megatron_amd/__init__.py has no line such as: __version__ = "1.2.3"')
    return match[1]


INSTALL_REQUIRES = [
    "torch>=2.6",
    "megatron-core>=0.16.1,<0.20",  # 0.16.1 is the newest for Python 3.10 and 3.11
    "numpy",
    "sentencepiece",
    "datasets>=3",
    "pyarrow",
    "tensorboard>=2.15",
    "transformers>=5",
    "safetensors>=0.4",
    "pyyaml>=6",
    "psutil",  # megatron.core.dist_checkpointing imports it without declaring it
    "jinja2>=3.1",  # transformers renders chat templates with it without declaring it
    "huggingface_hub>=1",  # models named by their hub name
    "tqdm",
]

EXTRAS_REQUIRE = {
    "te": ["transformer-engine[pytorch]>=2.9"],
    # Reading the demo's quantised teacher (tools/prepare_demo.py).
    "demo": ["gguf>=0.17", "accelerate>=1.1"],
    # BLEU of examples/multi30k.
    "examples": ["sacrebleu>=2.4"],
    # What benchmarks/ compares with.
    "bench": ["trl>=1.16,<2"],
    "dev": [
        "megatron_amd[demo,examples]",
        "pytest>=9,<10",
        "ruff>=0.17,<0.18",
        "mypy>=2.4,<2.5",
        "types-PyYAML",
        "pre-commit>=4,<5",
        "setuptools>=77",  # tests/unit/test_package.py builds the wheel without a network
    ],
}

setup(
    name="megatron_amd",
    version=read_version(),
    description="AMD is adversarial moment-matching distillation of large language models on Megatron-Core "
    "(not the chip vendor)",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["distillation", "adversarial moment matching", "megatron", "llm"],
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_amd", "megatron_amd.*"]),
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
)
