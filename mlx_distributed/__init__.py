"""Fine-tune a language model on several Macs at once, and get the model that one Mac would have made."""

__version__ = "0.1.0"
