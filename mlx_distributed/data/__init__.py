"""From the rows of the sources to the micro-batches of a step.

`read_corpus` -> `tokenize_corpus` -> `Plan` -> `collate` or `pack`. With `data.streaming`, `read_corpus` reads the
first rows alone, and `stream.StreamPlan` takes the place of `Plan`.
"""

from __future__ import annotations

from mlx_distributed.data.batch import Batch, collate, pack
from mlx_distributed.data.files import Place
from mlx_distributed.data.formats import ConcreteFormat, detect_format, normalise
from mlx_distributed.data.messages import Conversation, Invalid, Message, Role, ToolCall
from mlx_distributed.data.plan import Plan
from mlx_distributed.data.sources import Corpus, DataReport, read_corpus
from mlx_distributed.data.tokenize import Row, TokenizedCorpus, prompt_and_reference, tokenize_corpus

__all__ = [
    "Batch",
    "ConcreteFormat",
    "Conversation",
    "Corpus",
    "DataReport",
    "Invalid",
    "Message",
    "Place",
    "Plan",
    "Role",
    "Row",
    "TokenizedCorpus",
    "ToolCall",
    "collate",
    "detect_format",
    "normalise",
    "pack",
    "prompt_and_reference",
    "read_corpus",
    "tokenize_corpus",
]
