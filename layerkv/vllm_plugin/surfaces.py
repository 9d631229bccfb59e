"""What layerkv uses of vLLM. Written by ``tools/vllm_uses.py --write``: change that, or what uses it."""

NAMES: dict[str, str] = {}

MEMBERS: dict[str, str] = {}

PARAMETERS: dict[str, str] = {}
