"""minitune: a hand-written fine-tuner for Llama-shaped models."""

__version__ = "0.1.0"
