"""From the rows of the sources to the micro-batches of a step.

`read_corpus` -> `tokenize_corpus` -> `Plan` and `collate`.
"""

from __future__ import annotations

from mlx_distributed.data.files import Place
from mlx_distributed.data.formats import ConcreteFormat, detect_format, normalise
from mlx_distributed.data.messages import Conversation, Invalid, Message, Role, ToolCall
from mlx_distributed.data.plan import Plan
from mlx_distributed.data.sources import Corpus, DataReport, read_corpus
from mlx_distributed.data.tokenize import Row, TokenizedCorpus, collate, prompt_and_reference, tokenize_corpus

__all__ = [
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
    "prompt_and_reference",
    "read_corpus",
    "tokenize_corpus",
]
