"""The adapter between vLLM's public extension points and layerkv. It makes no decision and keeps no books.

:func:`register` is the entry point of group ``vllm.general_plugins``: vLLM calls it in every process, possibly
more than once. It is cheap, and inert until somebody asks for ``LayerKVConnector``.
"""


def register() -> None:
    """Make ``LayerKVConnector`` known to vLLM. Never raises: vLLM would only log it; problems surface at start-up."""
    from layerkv.vllm_plugin.activate import install, register_connector

    register_connector()
    install()
