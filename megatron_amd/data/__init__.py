"""Prompts from files or the hub: tokenizers, templates, data sets and the resumable loader."""

from megatron_amd.data.dataset import PromptDataset, load_rows
from megatron_amd.data.loader import PromptLoader, first_prompts
from megatron_amd.data.response_files import ResponseFiles, open_response_files
from megatron_amd.data.templates import PromptTemplate, make_template
from megatron_amd.data.tokenizer import Tokenizer, check_same_vocabulary, load_tokenizer

__all__ = [
    "PromptDataset",
    "PromptLoader",
    "PromptTemplate",
    "ResponseFiles",
    "Tokenizer",
    "check_same_vocabulary",
    "first_prompts",
    "load_rows",
    "load_tokenizer",
    "make_template",
    "open_response_files",
]
