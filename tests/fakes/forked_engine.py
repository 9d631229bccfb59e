"""Processes that take part in a broker as engines do, and compute nothing: forked, and ended by whoever forked them."""

from __future__ import annotations

import contextlib
import os
import random
import select
import socket
import struct
import time
from collections.abc import Iterator
from mmap import mmap
from pathlib import Path

from layerkv.broker.client import BrokerClient, Introduction
from layerkv.broker.messages import VERSION, Hello, Limit, Resource, State, Terms, Usage, encode, from_broker
from layerkv.broker.server import Broker

SEGMENT = 10
SLOT = struct.Struct("q")


@contextlib.contextmanager
def forked(main: object, *arguments: object) -> Iterator[int]:
    """A process that runs ``main`` as long as this context lasts; its number."""
    pid = fork(main, *arguments)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def fork(main: object, *arguments: object) -> int:
    assert callable(main)
    if pid := os.fork():
        return pid
    try:
        main(*arguments)
    finally:
        os._exit(1)


def hello(engine: str, *pids: int, **others: object) -> Hello:
    fields: dict[str, object] = {
        "version": VERSION,
        "engine": engine,
        "title": "a model",
        "pids": pids or (os.getpid(),),
        "token_bytes": 1,
        "device": Terms(segment_bytes=SEGMENT, floor=0, ceiling=1000),
    }
    return Hello(**(fields | others))  # type: ignore[arg-type]


def connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(str(path))
    return connection


def greedy_engine(path: Path, engine: str, held: mmap, slot: int, *workers: int) -> None:
    """Asks for ever other amounts, takes what it may at once, and writes down what it holds before it does.

    `workers` are other processes that use the same memory.
    """
    rng = random.Random(slot)
    connection = connect(path)
    connection.send(encode(hello(engine, os.getpid(), *workers)))
    revision = limit = holds = 0
    need = 100
    while True:
        if select.select([connection], [], [], 0.005)[0]:
            message = from_broker(connection.recv(1 << 16))
            assert isinstance(message, Limit)
            revision, limit = message.revision, message.num_bytes
        holds = min(limit, need)
        held[slot * SLOT.size : (slot + 1) * SLOT.size] = SLOT.pack(holds)
        usage = Usage(revision=revision, held=holds, need=need, like=holds, can_leave=need)
        connection.send(encode(State(device=usage, token_rate=1.0)))
        need = SEGMENT * rng.randint(1, 40)


def quiet_engine(path: Path, engine: str) -> None:
    """Says hello and no more."""
    connection = connect(path)
    connection.send(encode(hello(engine)))
    time.sleep(600)


def talking_engine(path: Path, engine: str, held: mmap, slot: int) -> None:
    """As greedy as that, by way of the client that real engines have."""
    rng = random.Random(f"{engine} {slot}")
    terms = Terms(segment_bytes=SEGMENT, floor=0, ceiling=1000)
    client = BrokerClient(path, Introduction(engine, "a model", (os.getpid(),), 1, {"device": terms}))
    while True:
        need = SEGMENT * rng.randint(0, 40)
        client.ask(need=need, like=need, can_leave=need, token_rate=1.0)
        goal = min(need, client.limit())
        if goal < client.held():  # first given back, then said
            held[slot * SLOT.size : (slot + 1) * SLOT.size] = SLOT.pack(goal)
        if client.try_hold(goal):
            held[slot * SLOT.size : (slot + 1) * SLOT.size] = SLOT.pack(goal)
        time.sleep(rng.random() * 0.02)


def engine_of_two_memories(path: Path, engine: str, held: mmap, slot: int) -> None:
    """As that one, of device and host memory; it writes both down, one after the other."""
    rng = random.Random(f"{engine} {slot}")
    terms = Terms(segment_bytes=SEGMENT, floor=SEGMENT, ceiling=1000)
    resources: tuple[Resource, ...] = ("device", "host")
    client = BrokerClient(path, Introduction(engine, "a model", (os.getpid(),), 1, dict.fromkeys(resources, terms)))
    while True:
        for place, resource in enumerate(resources):
            need = SEGMENT * rng.randint(0, 40)
            client.ask(need=need, like=need, can_leave=need, token_rate=1.0, resource=resource)
            goal, before, at = min(need, client.limit(resource)), client.held(resource), (2 * slot + place) * SLOT.size
            if goal < before:  # first given back, then said
                held[at : at + SLOT.size] = SLOT.pack(goal)
            if client.try_hold(goal, resource):
                held[at : at + SLOT.size] = SLOT.pack(goal)
        time.sleep(rng.random() * 0.02)


def lone_broker(path: Path, capacity: int) -> None:
    """A broker that is killed with its process."""
    broker = Broker(path, capacity)
    broker.run(lambda: False)
