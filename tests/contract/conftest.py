"""What the contract tests share with those of real engines."""

from tests.vllm.conftest import tiny_model

__all__ = ["tiny_model"]
