"""layerkv: a vLLM plugin that gives a request its first token as soon as the compute for it is free.

Importing this package reads no environment, imports neither torch nor vLLM, and changes nothing; vLLM itself
calls the plugin's entry point (`layerkv.vllm_plugin`).
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
