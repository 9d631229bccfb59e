"""The exceptions that layerkv raises on purpose, for every process.

    Exception
     └─ LayerKVError
         ├─ ConfigError            (also a ValueError) the user's input is wrong; nothing was started
         ├─ CapacityError          no memory right now; transient, must never end a process
         ├─ TransferError          a copy between device and host failed: what it should have written is not there
         │   └─ LostCopyError      it has not ended: nobody knows what it will still read or write, or when
         ├─ BrokerError            the memory broker refused, vanished, or broke its protocol
         └─ IncompatibleVLLMError  this vLLM lacks, or has changed, something layerkv stands on

Invariant: every message says what was found, what was expected, and what to set or do about it.
Broken assumptions of our own are `assert`, never one of these.
"""

__all__ = [
    "BrokerError",
    "CapacityError",
    "ConfigError",
    "IncompatibleVLLMError",
    "LayerKVError",
    "LostCopyError",
    "TransferError",
]


class LayerKVError(Exception):
    """Base of everything that layerkv raises on purpose."""


class ConfigError(LayerKVError, ValueError):
    """The user's configuration or request is wrong. Raised before anything is allocated or changed."""


class CapacityError(LayerKVError):
    """Memory is exhausted for now. Transient: the caller falls back or retries; no process ends."""


class TransferError(LayerKVError):
    """A copy between device and host failed; the destination must not be read."""


class LostCopyError(TransferError):
    """A copy did not end in the time that any takes; it may still read its source and write its destination."""


class BrokerError(LayerKVError):
    """The memory broker refused a request, vanished, or broke its protocol."""


class IncompatibleVLLMError(LayerKVError):
    """The installed vLLM lacks, or has changed, something that layerkv stands on."""
