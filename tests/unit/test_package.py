"""What a user installs: the wheel and the sdist hold what they should, and the wheel works away from the checkout."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import megatron_amd

ROOT = Path(__file__).parents[2]
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2])"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built from a copy so that the checkout stays as it is."""
    copy = tmp_path_factory.mktemp("build") / "checkout"
    unwanted = shutil.ignore_patterns(
        ".git", ".venv*", ".*_cache", "runs", "build", "dist", "*.egg-info", "__pycache__"
    )
    shutil.copytree(ROOT, copy, ignore=unwanted)
    for kind in ("sdist", "wheel"):
        subprocess.run([sys.executable, "-c", BUILD, kind, "dist"], cwd=copy, check=True, capture_output=True)
    return copy / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return built / f"megatron_amd-{megatron_amd.__version__}-py3-none-any.whl"


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        return Parser().parsestr(archive.read(name).decode("utf-8"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"megatron_amd-{megatron_amd.__version__}.dist-info/"
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "megatron_amd").rglob("*") if path.is_file()}
    assert {name for name in names if not name.startswith(info)} == {
        file for file in files if "__pycache__" not in file
    }
    assert info + "licenses/LICENSE" in names


def test_the_sdist_holds_what_the_project_is_built_and_checked_with(built: Path):
    base = f"megatron_amd-{megatron_amd.__version__}"
    with tarfile.open(built / f"{base}.tar.gz") as archive:
        names = {name.removeprefix(f"{base}/") for name in archive.getnames()}
    wanted = ["LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "Dockerfile", "setup.py"]
    wanted += ["pyproject.toml", ".ci/run", "megatron_amd/config.py", "tools/prepare_demo.py", "tools/find_python.sh"]
    wanted += ["tests/conftest.py", "tests/unit/test_package.py", "examples/gpt/llama_amm.yaml"]
    assert not [name for name in wanted if name not in names]
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc") or name.startswith("runs/")]


def test_metadata(metadata: Message):
    assert metadata["Name"] in ("megatron_amd", "megatron-amd")
    assert metadata["Version"] == megatron_amd.__version__
    assert "not the chip vendor" in metadata["Summary"]
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_payload().strip(), "the README is missing"
    requirements = metadata.get_all("Requires-Dist")
    plain = {re.split(r"[<>=!~\[; ]", text)[0]: text for text in requirements if "extra ==" not in text}
    assert set(plain) == {
        *("torch", "megatron-core", "numpy", "sentencepiece", "datasets", "tensorboard", "transformers"),
        *("safetensors", "pyarrow", "pyyaml", "psutil", "jinja2", "huggingface_hub", "tqdm"),
    }
    assert "<0.20" in plain["megatron-core"]
    assert ">=0.16.1" in plain["megatron-core"]
    assert any("transformer-engine[pytorch]" in text and 'extra == "te"' in text for text in requirements)
    assert not any(text.startswith("apex") for text in requirements), "the apex on PyPI is another package"


def test_every_third_party_import_is_a_requirement():
    """What megatron_amd imports comes from the standard library, from a requirement, or is tried for and absent."""
    from tests.unit.test_imports import imported_modules

    names = {"yaml", "megatron", "megatron_amd", "torch", "numpy", "sentencepiece", "datasets", "tensorboard"}
    names |= {
        "transformers",
        "safetensors",
        "huggingface_hub",
        "jinja2",
        "psutil",
        "pyarrow",
        "tqdm",
        *sys.stdlib_module_names,
    }
    optional = {"transformer_engine", "apex", "amp_C"}
    for path in sorted((ROOT / "megatron_amd").rglob("*.py")):
        used = {module.split(".")[0] for module in imported_modules(path.read_text(encoding="utf-8"))} - {""}
        assert used <= names | optional, path


def test_the_installed_wheel_runs_outside_the_checkout(wheel: Path, tmp_path: Path):
    """Unpacked as an installer would, with this environment's packages but not its link to the checkout."""
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-c", "import megatron_amd; print(megatron_amd.__version__, megatron_amd.__file__)"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    version, file = done.stdout.split()
    assert version == megatron_amd.__version__
    assert Path(file).is_relative_to(site)
    command = [sys.executable, "-m", "megatron_amd.train", "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "objective.beta" in done.stdout
    assert done.stderr == ""
