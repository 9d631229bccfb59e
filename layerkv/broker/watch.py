"""An observer's side of the broker: who has how much, without taking part."""

from __future__ import annotations

from pathlib import Path

import msgspec

from layerkv.broker.messages import MOST_BYTES, VERSION, Bye, Entry, Roster, Watch, encode, to_observer
from layerkv.broker.sockets import connect
from layerkv.errors import BrokerError


def read_roster(path: Path, timeout_s: float) -> Roster:
    """All engines that the broker at that path knows, by name.

    Raises:
        BrokerError: nobody answers there in time, or not as a broker does.
    """
    try:
        connection = connect(path)
    except OSError as error:
        raise BrokerError(f"no memory broker at {path} ({error.strerror or error}); start `layerkv broker`") from None
    except BrokerError as error:
        raise BrokerError(f"the memory broker at {path}: {error}") from None
    engines: list[Entry] = []
    with connection:
        connection.settimeout(timeout_s)
        while True:
            try:
                connection.send(encode(Watch(version=VERSION, after=engines[-1].engine if engines else "")))
                packet = connection.recv(MOST_BYTES)
            except TimeoutError:
                raise BrokerError(f"the memory broker at {path} has not answered for {timeout_s:g} s") from None
            except OSError as error:
                raise BrokerError(f"the memory broker at {path} has gone: {error.strerror}") from None
            if not packet:
                raise BrokerError(f"the memory broker at {path} has gone")
            answer = to_observer(packet)
            if isinstance(answer, Bye):
                raise BrokerError(f"the memory broker at {path} has refused: {answer.reason}")
            engines += answer.engines
            if answer.is_last:
                return msgspec.structs.replace(answer, engines=engines)
