"""Settings of every test, made before MLX is imported; worker processes inherit them."""

import os

# On Linux MLX compiles kernels by calling g++ at run time: seconds per kernel, and the same bits.
os.environ.setdefault("MLX_DISABLE_COMPILE", "1")
# Nothing may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
