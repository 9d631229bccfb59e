from __future__ import annotations

import os
import random
import socket
import stat
import threading
import time
from collections.abc import Callable, Collection, Iterator
from mmap import mmap
from pathlib import Path

import msgspec
import pytest

from layerkv.broker import server
from layerkv.broker.messages import (
    MOST_BYTES,
    UNDIVIDED,
    Bye,
    Failed,
    FromBroker,
    Limit,
    State,
    Terms,
    Usage,
    encode,
    from_broker,
)
from layerkv.broker.server import Broker
from layerkv.broker.watch import read_roster
from layerkv.core.sharing_ledger import GivenLimit
from layerkv.errors import BrokerError
from layerkv.runtime import start_ticks
from tests.fakes.forked_engine import (
    SLOT,
    connect,
    engine_of_two_memories,
    fork,
    forked,
    greedy_engine,
    hello,
    lone_broker,
    quiet_engine,
    talking_engine,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "broker.sock"


@pytest.fixture
def broker(path: Path) -> Iterator[Broker]:
    broker = Broker(path, 100, 50)
    yield broker
    broker.close()


def step_until(broker: Broker, is_so: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not is_so():
        broker.step(0.01)
        assert time.monotonic() < end


def heard(broker: Broker, connection: socket.socket) -> FromBroker:
    """The next message of the broker to that connection."""
    connection.setblocking(False)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        broker.step(0.01)
        try:
            packet = connection.recv(MOST_BYTES)
        except BlockingIOError:
            continue
        return from_broker(packet)
    raise AssertionError("heard nothing")


def refusal(broker: Broker, packet: bytes, before: bytes | None = None) -> str:
    """Why the broker ends the connection on which that packet comes."""
    with connect(broker._path) as connection:
        if before is not None:
            connection.send(before)
            assert isinstance(heard(broker, connection), Limit)
        connection.send(packet)
        while isinstance(message := heard(broker, connection), Limit):
            pass
        assert connection.recv(MOST_BYTES) == b"", "the connection is closed"
    return message.reason


def test_an_engine_is_given_its_floor_and_then_what_it_needs(broker: Broker, path: Path) -> None:
    with connect(path) as connection:
        terms = Terms(segment_bytes=10, floor=20, ceiling=1000)
        connection.send(encode(hello("a", device=terms, host=terms)))
        limits = [heard(broker, connection) for _ in range(4)]
        assert limits[:2] == [
            Limit(resource="device", revision=1, num_bytes=0),
            Limit(resource="host", revision=1, num_bytes=0),
        ]
        assert {limit.resource: limit.num_bytes for limit in limits[2:]} == {"device": 20, "host": 20}
        usage = Usage(revision=2, held=20, need=75, like=0)
        connection.send(encode(State(device=usage, host=usage)))
        limits = [heard(broker, connection), heard(broker, connection)]
        assert {limit.resource: limit.num_bytes for limit in limits} == {"device": 80, "host": 50}
        connection.send(encode(Failed(resource="device", num_bytes=30)))
        assert heard(broker, connection) == Limit(resource="device", revision=4, num_bytes=70)


def test_a_memory_that_the_broker_does_not_divide_is_each_engines_own(path: Path) -> None:
    broker = Broker(path, 100)
    terms = Terms(segment_bytes=10, floor=20, ceiling=1000)
    with connect(path) as connection:
        connection.send(encode(hello("a", device=terms, host=terms)))
        limits = [heard(broker, connection) for _ in range(3)]
        assert Limit(resource="host", revision=1, num_bytes=UNDIVIDED) in limits
        usage = Usage(revision=1, held=0, need=900, like=900)
        connection.send(encode(State(device=usage, host=usage)))
        assert heard(broker, connection) == Limit(resource="device", revision=3, num_bytes=100), (
            "and of the other nothing"
        )
    broker.close()


def test_a_floor_that_does_not_fit_is_told_with_the_memory_that_it_is_of(broker: Broker) -> None:
    fits = Terms(segment_bytes=10, floor=20, ceiling=1000)
    assert "host memory: a floor of 60 bytes, beside 0 of others, where 50 are shared" in refusal(
        broker, encode(hello("a", device=fits, host=Terms(segment_bytes=10, floor=60, ceiling=1000)))
    )
    assert not broker.ledgers["device"].limits


def test_only_its_user_may_speak_to_it(broker: Broker, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for peer, reason in (((os.getpid(), 12345), "and not 12345"), ((0, os.getuid()), "another PID namespace")):
        monkeypatch.setattr(server, "peer", lambda _, peer=peer: peer)
        with connect(path) as connection:
            message = heard(broker, connection)
            assert isinstance(message, Bye)
            assert reason in message.reason


def test_what_is_wrong_ends_one_connection_and_nothing_else(broker: Broker, path: Path) -> None:
    state = encode(State(device=Usage(revision=0, held=0, need=0, like=0)))
    with forked(quiet_engine, path, "other"):
        step_until(broker, lambda: "other" in broker.ledgers["device"].limits)
        assert "not a message" in refusal(broker, b"\xc1\x00 nonsense")
        assert refusal(broker, b"x" * (MOST_BYTES + 1)) == f"a message has at most {MOST_BYTES} bytes"
        assert "version 7" in refusal(broker, msgspec.msgpack.encode({"type": "hello", "version": 7, "more": 1}))
        assert refusal(broker, state) == "an engine says hello first"
        assert "is none of those" in refusal(broker, encode(hello("a", os.getppid())))
        assert refusal(broker, encode(hello("other"))) == "an engine named other is here already"
        assert "beside 0 of others, where 100 are shared" in refusal(
            broker, encode(hello("a", device=Terms(segment_bytes=10, floor=101, ceiling=200)))
        )
        assert "below the floor of 9" in refusal(
            broker, encode(hello("a", device=Terms(segment_bytes=10, floor=9, ceiling=9)))
        )
        assert "a" not in broker.ledgers["device"].limits
        assert "an engine says hello once" in refusal(broker, encode(hello("a")), before=encode(hello("a")))
        assert set(broker.ledgers["device"].limits) == {"a", "other"}, "a holds what it held: its process lives"


def test_a_second_broker_at_the_same_place_is_refused_and_one_that_was_killed_is_no_obstacle(path: Path) -> None:
    def listen() -> None:
        Broker(path, 1)
        os.write(told, b"x")
        time.sleep(600)

    heard_it, told = os.pipe()
    with forked(listen):
        os.read(heard_it, 1)
        with pytest.raises(BrokerError, match=r"listens at .* already"):
            Broker(path, 1)
    assert path.exists()
    Broker(path, 1).close()
    assert not path.exists()
    with pytest.raises(BrokerError, match="cannot listen"):
        Broker(Path("/proc/nothing/broker.sock"), 1)


def test_a_broker_that_starts_again_gives_nothing_until_all_are_back_or_dead(path: Path) -> None:
    first = Broker(path, 100)
    with forked(quiet_engine, path, "silent") as silent, forked(quiet_engine, path, "gone") as gone:
        step_until(first, lambda: {"silent", "gone"} <= first.ledgers["device"].limits.keys())
        with connect(path) as connection:
            connection.send(encode(hello("back")))
            heard(first, connection)
        first.close()
        os.kill(gone, 9)
        os.waitpid(gone, 0)
        again = Broker(path, 100)
        terms = Terms(segment_bytes=10, floor=50, ceiling=100, held=20, limit=30)
        with connect(path) as connection:
            connection.send(encode(hello("back", device=terms)))
            assert heard(again, connection) == Limit(resource="device", revision=1, num_bytes=30)
            for _ in range(5):
                again.step(0.01)
            assert again.ledgers["device"].limits == {"back": 30}, "silent may hold the rest"
            os.kill(silent, 9)
            assert heard(again, connection) == Limit(resource="device", revision=2, num_bytes=50)
        again.close()


def test_what_an_engine_holds_is_its_own_until_the_last_of_its_processes_has_ended(broker: Broker, path: Path) -> None:
    with forked(time.sleep, 600) as worker, connect(path) as connection:
        reader, writer = os.pipe()

        def engine() -> None:
            os.read(reader, 1)
            with connect(path) as mine:
                terms = Terms(segment_bytes=10, floor=60, ceiling=100)
                mine.send(encode(hello("a", os.getpid(), worker, device=terms)))
                time.sleep(600)

        with forked(engine):
            os.write(writer, b"x")
            step_until(broker, lambda: broker.ledgers["device"].limits.get("a") == 60)
        connection.send(encode(hello("b", device=Terms(segment_bytes=10, floor=40, ceiling=100))))
        connection.send(encode(State(device=Usage(revision=0, held=0, need=90, like=0))))
        step_until(broker, lambda: broker.ledgers["device"].limits.get("b") == 40)
        for _ in range(5):
            broker.step(0.01)
        assert broker.ledgers["device"].limits["b"] == 40
        os.kill(worker, 9)
        step_until(broker, lambda: broker.ledgers["device"].limits.get("b") == 90)
        assert "a" not in broker.ledgers["device"].limits


def test_whether_an_engine_has_requests_is_in_its_wish(broker: Broker, path: Path) -> None:
    with connect(path) as connection:
        connection.send(encode(hello("a", device=Terms(segment_bytes=10, floor=40, ceiling=100))))
        for has_requests in (False, True):
            usage = Usage(revision=0, held=0, need=0, like=0)
            connection.send(encode(State(device=usage, has_requests=has_requests)))
            step_until(
                broker,
                lambda has_requests=has_requests: (
                    (wish := broker.ledgers["device"].wish("a")) is not None and wish.has_requests == has_requests
                ),
            )


def test_an_engine_that_has_ended_before_its_hello_is_read_is_nobody(broker: Broker, path: Path) -> None:
    def engine() -> None:
        with connect(path) as connection:
            connection.send(encode(hello("a")))

    os.waitpid(fork(engine), 0)
    for _ in range(5):
        broker.step(0.01)
    assert broker.ledgers["device"].limits == {}


def test_a_process_that_cannot_be_watched_ends_one_connection(broker: Broker) -> None:
    """A thread's number; the kernel says the same way that there are no descriptors left."""
    is_over = threading.Event()
    thread = threading.Thread(target=is_over.wait)
    thread.start()
    num_open = len(os.listdir("/proc/self/fd"))
    try:
        assert thread.native_id is not None
        reason = refusal(broker, encode(hello("a", os.getpid(), thread.native_id)))
    finally:
        is_over.set()
        thread.join()
    assert f"process {thread.native_id} cannot be watched" in reason
    assert broker.ledgers["device"].limits == {}
    step_until(broker, lambda: len(os.listdir("/proc/self/fd")) <= num_open)


def test_an_engine_of_tiny_segments_keeps_nobody_waiting(path: Path) -> None:
    broker = Broker(path, 1 << 40)
    tiny = Terms(segment_bytes=1, floor=0, ceiling=1 << 60)
    assert "segments of 1 bytes, where 4096 are the most" in refusal(broker, encode(hello("a", device=tiny)))
    broker.close()


def test_an_engine_that_reads_nothing_is_let_go_and_others_are_served(broker: Broker, path: Path) -> None:
    with forked(quiet_engine, path, "silent"), connect(path) as connection:
        step_until(broker, lambda: "silent" in broker._connections)
        for revision in range(2000):
            broker._tell("silent", "device", GivenLimit(revision, 0))
        assert "silent" not in broker._connections
        assert "silent" in broker.ledgers["device"].limits, "it holds what it holds"
        connection.send(encode(hello("a")))
        assert isinstance(heard(broker, connection), Limit)


def test_a_hello_that_is_refused_changes_nothing(broker: Broker, path: Path) -> None:
    terms = Terms(segment_bytes=10, floor=20, ceiling=100)
    with connect(path) as connection:
        connection.send(encode(hello("a", device=terms)))
        step_until(broker, lambda: broker.ledgers["device"].limits == {"a": 20})
    ledgers = {name: ledger.limit("a") for name, ledger in broker.ledgers.items()}
    wrong = Terms(segment_bytes=10, floor=20, ceiling=10)
    assert "below the floor" in refusal(broker, encode(hello("a", device=terms, host=wrong)))
    assert {name: ledger.limit("a") for name, ledger in broker.ledgers.items()} == ledgers


def test_of_two_engines_with_one_name_the_first_stays(broker: Broker, path: Path) -> None:
    """Both may take what the one was given."""
    with connect(path) as connection:
        connection.send(encode(hello("a", device=Terms(segment_bytes=10, floor=20, ceiling=100))))
        step_until(broker, lambda: broker.ledgers["device"].limits == {"a": 20})
        assert refusal(broker, encode(hello("a"))) == "an engine named a is connected already"
        assert broker.ledgers["device"].limits == {"a": 20}


def test_an_engine_that_comes_back_and_names_fewer_processes_holds_until_the_last_has_ended(
    broker: Broker, path: Path
) -> None:
    with forked(time.sleep, 600) as worker:
        with connect(path) as connection:
            connection.send(encode(hello("a", os.getpid(), worker)))
            step_until(broker, lambda: "a" in broker._connections)
        reader, writer = os.pipe()

        def engine() -> None:
            with connect(path) as mine:
                mine.send(encode(hello("b", os.getpid(), worker)))
                os.read(reader, 1)
            with connect(path) as mine:
                mine.send(encode(hello("b")))
                os.read(reader, 1)

        with forked(engine) as front:
            step_until(broker, lambda: "b" in broker._connections)
            first = broker._connections["b"]
            os.write(writer, b"x")
            step_until(broker, lambda: broker._connections.get("b") not in (None, first))
            os.kill(front, 9)
            os.waitpid(front, 0)
            for _ in range(5):
                broker.step(0.01)
            assert "b" in broker.ledgers["device"].limits
        os.kill(worker, 9)
        step_until(broker, lambda: "b" not in broker.ledgers["device"].limits)


@pytest.mark.parametrize(
    "text",
    ["", '{"format":1,"boot":"x","engi', '{"format":0,"boot":"x","engines":[]}'],
    ids=["empty", "half", "format"],
)
def test_a_broker_that_cannot_know_who_has_memory_does_not_start(path: Path, text: str) -> None:
    state = path.with_name(path.name + ".state")
    state.write_text(text)
    for _ in range(2):
        with pytest.raises(BrokerError, match=r"\.state says which engines have memory, and cannot be read"):
            Broker(path, 1)
    state.unlink()
    state.symlink_to("/dev/null")
    with pytest.raises(BrokerError, match="cannot be read"):
        Broker(path, 1)


def test_processes_of_before_the_machine_started_have_ended(path: Path) -> None:
    mine = f"[{os.getpid()},{start_ticks(os.getpid())}]"
    path.with_name(path.name + ".state").write_text(
        f'{{"format":1,"boot":"an earlier one","engines":[{{"engine":"a","processes":[{mine}]}}]}}'
    )
    broker = Broker(path, 100)
    assert list(broker._members) == []
    broker.close()


def test_an_engine_that_cannot_be_written_down_is_refused_and_nobody_else(broker: Broker, path: Path) -> None:
    with forked(quiet_engine, path, "other") as other:
        step_until(broker, lambda: "other" in broker.ledgers["device"].limits)
        path.with_name(path.name + ".state.new").mkdir()
        assert "cannot write it down" in refusal(broker, encode(hello("a")))
        assert broker.ledgers["device"].limits.keys() == {"other"}
        os.kill(other, 9)
        step_until(broker, lambda: not broker.ledgers["device"].limits)


def test_what_is_no_socket_stays(path: Path) -> None:
    path.write_text("a letter")
    with pytest.raises(BrokerError, match="there is something that is no socket; set --socket"):
        Broker(path, 1)
    assert path.read_text() == "a letter"
    path.unlink()
    Broker(path, 1).close()
    assert stat.S_IMODE(path.with_name(path.name + ".lock").stat().st_mode) == 0o600


def test_a_folder_that_others_may_change_is_no_place_for_a_broker(path: Path) -> None:
    path.parent.chmod(0o777)
    with pytest.raises(BrokerError, match="other users may change that folder; set --socket"):
        Broker(path, 1)
    path.parent.chmod(0o1777)
    Broker(path, 1).close()


@pytest.mark.parametrize("total", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_engines_are_killed_at_any_moment_and_nothing_is_held_twice_or_lost(path: Path, total: int) -> None:
    """Real processes, that hold whatever they may at once; of some the memory is another process's too, and theirs
    until both have been killed, in whatever order."""
    rng, capacity, slots = random.Random(0), 1000, 40
    held = mmap(-1, slots * SLOT.size)
    broker = Broker(path, capacity)
    ledger = broker.ledgers["device"]
    living: dict[int, list[int]] = {}  # slot -> processes
    num_started = num_waves_of_much = num_outlived = 0

    def start(slot: int) -> None:
        workers = [fork(time.sleep, 600)] if rng.random() < 0.4 else []
        living[slot] = [fork(greedy_engine, path, f"engine {num_started}", held, slot, *workers), *workers]

    def num_held(slot: int) -> int:
        return int(SLOT.unpack_from(held, slot * SLOT.size)[0])

    def kill_one_of(slot: int) -> None:
        pid = living[slot].pop(rng.randrange(len(living[slot])))
        os.kill(pid, 9)
        _, status = os.waitpid(pid, 0)
        assert os.WTERMSIG(status) == 9, "it had not ended before"
        if not living[slot]:
            del living[slot]
            held[slot * SLOT.size : (slot + 1) * SLOT.size] = bytes(SLOT.size)

    try:
        while num_started < total or living:
            for slot in sorted(set(range(slots)) - living.keys()):
                if num_started < total:
                    start(slot)
                    num_started += 1
            for _ in range(100):
                broker.step(0.002)
                ledger.check()
                all_held = sum(map(num_held, living))
                assert all_held <= capacity
                if all_held > capacity / 2:
                    num_waves_of_much += 1
                    break
            holders = [slot for slot in sorted(living) if num_held(slot)]
            others = [slot for slot in sorted(living) if slot not in holders]
            chosen = [*rng.sample(holders, min(6, len(holders))), *rng.sample(others, min(6, len(others)))]
            for slot in chosen:
                kill_one_of(slot)
                num_outlived += slot in living and num_held(slot) > 0
        step_until(broker, lambda: not ledger.limits)
        assert ledger.committed == 0
        assert num_waves_of_much > total // 100, "they did use it"
        assert num_outlived >= total // 100, "one process held what another had taken"
    finally:
        for pid in (pid for pids in living.values() for pid in pids):
            os.kill(pid, 9)
            os.waitpid(pid, 0)
        broker.close()


def test_engines_that_share_two_memories_are_killed_and_neither_is_held_twice_or_lost(path: Path) -> None:
    rng, capacities, slots, total = random.Random(0), {"device": 700, "host": 400}, 6, 60
    held = mmap(-1, 2 * slots * SLOT.size)
    broker = Broker(path, capacities["device"], capacities["host"])
    living: dict[int, int] = {}  # slot -> process
    num_started, num_full = 0, dict.fromkeys(capacities, 0)
    try:
        while num_started < total or living:
            for slot in set(range(slots)) - living.keys():
                if num_started < total:
                    living[slot] = fork(engine_of_two_memories, path, f"engine {num_started}", held, slot)
                    num_started += 1
            for _ in range(rng.randint(20, 60)):
                broker.step(0.002)
                for place, (resource, capacity) in enumerate(capacities.items()):
                    broker.ledgers[resource].check()  # type: ignore[index]
                    all_held = sum(SLOT.unpack_from(held, (2 * slot + place) * SLOT.size)[0] for slot in living)
                    assert all_held <= capacity
                    num_full[resource] += all_held > capacity / 2
            for slot in rng.sample(sorted(living), min(2, len(living))):
                os.kill(living[slot], 9)
                os.waitpid(living.pop(slot), 0)
                held[2 * slot * SLOT.size : 2 * (slot + 1) * SLOT.size] = bytes(2 * SLOT.size)
        step_until(broker, lambda: not any(ledger.committed for ledger in broker.ledgers.values()))
        assert min(num_full.values()) > 10, "they did use both"
    finally:
        for pid in living.values():
            os.kill(pid, 9)
            os.waitpid(pid, 0)
        broker.close()


@pytest.mark.slow
def test_brokers_and_engines_are_killed_and_nothing_is_held_twice(path: Path) -> None:
    """Real engines' clients, that come back to one broker after the other."""
    rng, capacity, slots, total = random.Random(0), 1000, 12, 200
    held = mmap(-1, slots * SLOT.size)
    living: dict[int, int] = {}  # slot -> process
    num_started = num_brokers = num_full = 0
    broker = fork(lone_broker, path, capacity)
    try:
        while num_started < total:
            for slot in set(range(slots)) - living.keys():
                living[slot] = fork(talking_engine, path, f"engine {num_started}", held, slot)
                num_started += 1
            for _ in range(rng.randint(20, 100)):
                time.sleep(0.002)
                # Read at once: while this process is held up between two slots, memory may change hands.
                all_held = sum(num_bytes for (num_bytes,) in SLOT.iter_unpack(held[:]))
                assert all_held <= capacity
                num_full += all_held > capacity / 2
            for slot in rng.sample(sorted(living), rng.randint(0, 4)):
                os.kill(living[slot], 9)
                os.waitpid(living.pop(slot), 0)
                held[slot * SLOT.size : (slot + 1) * SLOT.size] = bytes(SLOT.size)
            if rng.random() < 0.2:
                os.kill(broker, 9)
                os.waitpid(broker, 0)
                broker = fork(lone_broker, path, capacity)
                num_brokers += 1
        assert num_brokers > 10
        end = time.monotonic() + 60
        while not _all_are_back(path, living.values()):
            assert time.monotonic() < end
            time.sleep(0.01)
        assert num_full > 100, "they did use it"
    finally:
        for pid in [broker, *living.values()]:
            os.kill(pid, 9)
            os.waitpid(pid, 0)


def _all_are_back(path: Path, pids: Collection[int]) -> bool:
    try:
        engines = read_roster(path, 60).engines
    except BrokerError:
        return False
    return sorted(pids) == sorted(pid for engine in engines if engine.is_connected for pid in engine.pids)
