"""Helpers for tests of this package and of what is built on it. No other file of the package imports this one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mlx_distributed.comm.grpc_comm import GrpcComm
from mlx_distributed.config.schema import LoraConfig, ModelConfig
from mlx_distributed.models import build_scratch, save_final, train_tokenizer, wrap_tokenizer

T = TypeVar("T")

SENTENCES = (
    "Write 324 in words. three hundred twenty-four",
    "Write 793 as a Roman numeral. DCCXCIII",
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "How many days has a week? A week has 7 days, and a year has 365 or 366.",
    "Translate the word house into German. The German word for house is Haus.",
)


def tiny_model(
    folder: Path,
    *,
    model_type: str = "qwen3",
    tied: bool = True,
    hidden_size: int = 32,
    num_layers: int = 2,
    vocab_size: int = 300,
    seed: int = 0,
) -> Path:
    """Write a whole model folder that `mlx_lm.load` reads, with random weights and 4 attention heads, and return it.

    Needs no network. `model_type` is one of the dense decoders, such as qwen3, llama or qwen2.
    """
    tokenizer = wrap_tokenizer(train_tokenizer(SENTENCES, vocab_size), model_type)
    arch = {
        "model_type": model_type,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": tied,
    }
    model, config = build_scratch(arch, tokenizer, seed)
    save_final(folder, model, tokenizer, config, source=ModelConfig(), method="full", lora=LoraConfig())
    return folder


def run_ranks(size: int, body: Callable[[GrpcComm], T], timeout_s: float = 30.0) -> list[T | BaseException]:
    """Run `body` as every rank of a group over gRPC on loopback, each in a thread of its own.

    Returns:
        What each rank returned, or the exception that ended it.
    """
    comms = [GrpcComm(rank, size, "run-of-a-test", timeout_s=timeout_s) for rank in range(size)]
    results: list[T | BaseException] = [RuntimeError("did not end")] * size

    def be(rank: int) -> None:
        comm = comms[rank]
        try:
            comm.connect([other.address for other in comms])
            results[rank] = body(comm)
        except BaseException as error:  # noqa: BLE001  # handed to the test, which looks at it
            results[rank] = error
            comm.close(error)
        else:
            comm.close()

    threads = [threading.Thread(target=be, args=(rank,), name=f"rank-{rank}") for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
