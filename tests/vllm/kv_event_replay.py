"""A subscriber that asks vLLM's publisher for everything from the beginning, as one that connects late does."""

from __future__ import annotations

from typing import Any

import msgspec
import zmq

MOST_TRIES = 100


def heard(replay_endpoint: str, *, expected: set[Any]) -> dict[str, Any]:
    """What all events together say of host memory, once the publisher's thread has sent the last ones."""
    told: dict[str, Any] = {}
    for _ in range(MOST_TRIES):
        told = _told(replay_endpoint, expected)
        if told["is_right"]:
            break
    return told


def _told(replay_endpoint: str, expected: set[Any]) -> dict[str, Any]:
    from vllm.distributed.kv_events import AllBlocksCleared, BlockStored

    on_host: set[Any] = set()
    tokens_of: dict[str, dict[Any, tuple[Any, list[int]]]] = {"GPU": {}, "CPU": {}}
    num_removed = 0
    for batch in _replay(replay_endpoint):
        for event in batch.events:
            if isinstance(event, AllBlocksCleared):
                on_host.clear()
            elif isinstance(event, BlockStored):
                tokens_of[event.medium] |= _tokens_by_block(event)
                if event.medium == "CPU":
                    on_host |= set(event.block_hashes)
            elif event.medium == "CPU":
                on_host -= set(event.block_hashes)
                num_removed += len(event.block_hashes)
    on_device = tokens_of["GPU"]
    return {
        "is_right": on_host == expected,
        "num_on_host": len(on_host),
        "num_removed": num_removed,
        "num_told": len(tokens_of["CPU"]),
        "num_like_on_device": sum(on_device.get(h) == block for h, block in tokens_of["CPU"].items()),
    }


def _tokens_by_block(event: Any) -> dict[Any, tuple[Any, list[int]]]:
    parents = [event.parent_block_hash, *event.block_hashes[:-1]]
    size = event.block_size
    return {
        block_hash: (parents[i], event.token_ids[i * size : (i + 1) * size])
        for i, block_hash in enumerate(event.block_hashes)
    }


def _replay(endpoint: str) -> list[Any]:
    from vllm.distributed.kv_events import KVEventBatch, ZmqEventPublisher

    decoder = msgspec.msgpack.Decoder(KVEventBatch)
    batches: list[Any] = []
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.connect(endpoint)
        socket.send_multipart((b"", (0).to_bytes(8, "big")))
        while True:
            assert socket.poll(10_000), "the publisher does not answer"
            _, _, sequence, payload = socket.recv_multipart()
            if sequence == ZmqEventPublisher.END_SEQ:
                return batches
            batches.append(decoder.decode(payload))
