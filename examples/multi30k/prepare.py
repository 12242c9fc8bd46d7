"""Multi30k English -> German as prompts and responses, and a sentencepiece model made from it.

    python examples/multi30k/prepare.py --output runs/multi30k/inputs --data FOLDER

FOLDER holds train, val and test_2016_flickr as `multi30k_train.en.gz` or `train.en` and so on, a sentence a line,
aligned (https://github.com/multi30k/dataset; for research and education). Without --data they are read from the hub's
bentrevett/multi30k. Writes train.jsonl, val.jsonl, test.jsonl (rows {"prompt": English, "response": German}) and
spm.model. Exit status: 0, or 2 with one line about what is wrong.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import sys
from pathlib import Path

from megatron_amd.errors import InputError, first_line

SPLITS = {"train": ("train", "train"), "val": ("val", "validation"), "test": ("test_2016_flickr", "test")}
"""Our file: the corpus's name of it, the hub's."""
VOCABULARY = 4000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="folder of the corpus; unset: the hub")
    options = parser.parse_args()
    try:
        prepare(options.output, options.data)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def prepare(output: Path, data: Path | None) -> None:
    pairs = {
        name: read_files(data, corpus) if data else read_hub(hub) for name, (corpus, hub) in SPLITS.items()
    }  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    for name in SPLITS:
        rows = (json.dumps({"prompt": en, "response": de}, ensure_ascii=False) + "\n" for en, de in pairs[name])
        (output / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    write_tokenizer(output / "spm.model", [text for pair in pairs["train"] for text in pair])
    print(
        f"{output}: {', '.join(f'{len(rows):,} {name}' for name, rows in pairs.items())} pairs, {VOCABULARY:,} pieces"
    )


def read_files(folder: Path, split: str) -> list[tuple[str, str]]:
    """Aligned lines of both languages, without pairs of which one is empty."""
    sides = []
    for language in ("en", "de"):
        names = [f"{prefix}{split}.{language}{suffix}" for prefix in ("multi30k_", "") for suffix in ("", ".gz")]
        file = next((folder / name for name in names if (folder / name).is_file()), None)
        if file is None:
            raise InputError(f"{folder}: has none of {', '.join(names)}; give the folder of the Multi30k corpus")
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        sides.append(content.decode("utf-8").rstrip("\n").split("\n"))  # other characters may end a line, too
    if len(sides[0]) != len(sides[1]):
        raise InputError(f"{folder}: {split} has {len(sides[0])} English and {len(sides[1])} German lines")
    return [(en.strip(), de.strip()) for en, de in zip(*sides, strict=True) if en.strip() and de.strip()]


def read_hub(split: str) -> list[tuple[str, str]]:
    import datasets

    try:
        rows = datasets.load_dataset("bentrevett/multi30k", split=split)
    except Exception as error:  # whatever the client raises without a network
        raise InputError(f"bentrevett/multi30k cannot be read from the hub ({first_line(error)}); use --data") from None
    return [(row["en"].strip(), row["de"].strip()) for row in rows]


def write_tokenizer(file: Path, texts: list[str]) -> None:
    """A unigram model with T5's ids for padding, end and unknown."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=VOCABULARY, pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1, character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    file.write_bytes(model.getvalue())


if __name__ == "__main__":
    sys.exit(main())
