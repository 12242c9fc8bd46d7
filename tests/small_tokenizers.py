"""Real tokenizers trained in the test: a byte-level BPE saved as a Hugging Face folder, and a sentencepiece model."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SENTENCES = (
    "Below is an instruction that describes a task.",
    "Write a response that appropriately completes the request.",
    "How many clips did Natalia sell altogether in April and May?",
    "The quick brown fox jumps over the lazy dog.",
    "### Instruction: Response: Input: system user assistant",
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_hf_tokenizer(
    folder: Path,
    *,
    sentences: Iterable[str] = SENTENCES,
    vocab_size: int = 400,
    chat_template: str | None = None,
    adds_bos: bool = False,
    eos: str | None = "</s>",
    generation_eos: int | list[int] | None = None,
) -> Path:
    """Ids 0-3 are <s>, </s>, <|im_start|>, <|im_end|>; <|extra|> is added at the end of the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    tokenizer.add_special_tokens([AddedToken("<|extra|>", special=True)])
    if adds_bos:
        # Also an EOS at the end, as T5-like tokenizers do: a prompt must not get it.
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": eos}
    # Shorter than the prompts of the tests: the library's warning about it must not reach the terminal.
    settings |= {"model_max_length": 8, "chat_template": chat_template}
    settings = {name: value for name, value in settings.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if generation_eos is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation_eos}))
    return folder


def make_sentencepiece(file: Path, *, bos: bool = True, eos: bool = True) -> Path:
    """Ids 0, 1, 2 are <unk>, <s>, </s>, as in Llama's model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        bos_id=1 if bos else -1,
        eos_id=2 if eos else -1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    file.write_bytes(model.getvalue())
    return file
