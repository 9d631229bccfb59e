"""Short lives of a few requests, each built so that some pair of copies, or copy and compute, would collide.

A scenario takes a `TinyServer` and ends with every request gone. Blocks have four tokens; pool 15 usable blocks, zone
12 blocks, host memory 18 blocks, so that all of them are reused all the time.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.fakes.tiny_server import TinyServer

Scenario = Callable[[TinyServer], None]


def whole_prompt_parked_and_fetched(server: TinyServer) -> None:
    server.arrive("a", 21, layered=True)
    server.step(a=21)
    server.park("a")
    server.step()
    server.fetch("a")
    server.await_fetch("a")
    for _ in range(5):
        server.step(a=1)
    server.end()


def prompt_in_chunks_that_end_inside_blocks(server: TinyServer) -> None:
    server.arrive("a", 30, layered=True)
    for num_tokens in (5, 1, 9, 8, 7):
        server.step(a=num_tokens)
    server.park("a")
    server.step()
    server.fetch("a")
    server.await_fetch("a")
    server.step(a=3)
    server.end()


def two_layered_requests_in_a_step(server: TinyServer) -> None:
    server.arrive("a", 20, layered=True)
    server.arrive("b", 17, layered=True)
    server.step(a=11)
    server.step(a=9, b=6)
    server.park("a")
    server.arrive("c", 7, layered=True)
    server.step(b=11, c=7)
    server.park("b")
    server.park("c")
    server.fetch("a")
    server.step()
    server.fetch("c")
    server.fetch("b")
    for request_id in "abc":
        server.await_fetch(request_id)
    server.step(a=2, b=1, c=1)
    server.end()


def layered_beside_resident(server: TinyServer) -> None:
    server.arrive("r", 9, layered=False)
    server.step(r=9)
    server.arrive("a", 18, layered=True)
    server.step(r=1, a=10)
    server.step(r=1, a=8)
    server.park("a")
    server.step(r=1)
    server.fetch("a")
    server.step(r=1)
    server.await_fetch("a")
    server.step(r=1, a=1)
    server.end()


def streamed_decode(server: TinyServer) -> None:
    server.arrive("a", 14, layered=True)
    server.step(a=14)
    for _ in range(6):
        server.step(a=1)
    server.arrive("b", 9, layered=True)
    server.step(a=1, b=9)
    server.step(a=1, b=1)
    server.park("a")
    server.step(b=1)
    server.fetch("a")
    server.await_fetch("a")
    server.step(a=1, b=1)
    server.end()


def same_zone_blocks_in_the_next_step(server: TinyServer) -> None:
    """The zone holds one of these prompts: each next one takes the blocks that the last one has just left."""
    parked = []
    server.arrive("aborted", 48, layered=True)
    server.step(aborted=40)
    server.finish("aborted")
    for name in ("a", "b"):
        server.arrive(name, 24, layered=True)
        server.arrive(f"{name}-other", 23, layered=True)
        server.step(**{name: 24, f"{name}-other": 20})
        server.finish(f"{name}-other")
        server.park(name)
        parked.append(name)
    server.step()
    for name in parked:
        server.fetch(name)
        server.await_fetch(name)
        server.step(**{name: 1})
        server.finish(name)
    server.end()


def chunks_of_one_over_the_zone_blocks_of_another(server: TinyServer) -> None:
    """The second prompt's chunk loads into blocks that the first one's last layers are still stored from."""
    server.arrive("a", 22, layered=True)
    server.arrive("b", 24, layered=True)
    server.step(b=7)
    server.step(a=22)
    server.park("a")
    server.step(b=9)
    server.arrive("c", 21, layered=True)
    server.step(b=8, c=5)
    server.finish("b")
    server.step(c=16)
    server.park("c")
    for name in ("a", "c"):
        server.fetch(name)
    for name in ("a", "c"):
        server.await_fetch(name)
    server.step(a=1, c=1)
    server.end()


def parked_prefix_overwritten_in_the_same_step(server: TinyServer) -> None:
    """The parked request was the last user of its prefix-cache hits: a resident prompt takes those blocks at once."""
    server.arrive("donor", 20, layered=False)
    server.step(donor=20)
    server.arrive("a", 26, layered=True, prefix_of="donor", num_shared=4)
    server.finish("donor")
    server.step(a=7)
    server.step(a=3)
    server.park("a")
    server.arrive("thief", 60, layered=False)
    server.step(thief=60)
    server.finish("thief")
    server.fetch("a")
    server.await_fetch("a")
    server.step(a=2)
    server.end()


def parked_resident_overwritten_in_the_same_step(server: TinyServer) -> None:
    server.arrive("r", 33, layered=False)
    server.step(r=33)
    server.step(r=1)
    server.park("r")
    server.arrive("thief", 60, layered=False)
    server.step(thief=60)
    server.finish("thief")
    server.fetch("r")
    server.await_fetch("r")
    server.step(r=2)
    server.end()


def fetched_right_after_the_park(server: TinyServer) -> None:
    server.arrive("a", 19, layered=True)
    server.step(a=19)
    server.park("a")
    server.fetch("a")
    server.step()
    server.await_fetch("a")
    server.step(a=1)
    server.park("a")
    server.step()
    server.fetch("a")
    server.await_fetch("a")
    server.step(a=1)
    server.end()


def fetched_into_blocks_parked_in_the_same_step(server: TinyServer) -> None:
    server.arrive("a", 21, layered=True)
    server.step(a=21)
    server.park("a")
    server.arrive("r", 22, layered=False)
    server.arrive("full", 36, layered=False)
    server.step(r=22, full=36)
    server.park("r")
    server.fetch("a")
    server.step()
    server.await_fetch("a")
    server.step(a=1)
    server.park("a")
    server.fetch("r")
    server.step()
    server.await_fetch("r")
    server.step(r=1)
    server.end()


def fetched_into_blocks_finished_in_the_same_step(server: TinyServer) -> None:
    """The finished request's last token may still be on its way to these very blocks."""
    server.arrive("a", 22, layered=True)
    server.step(a=22)
    server.park("a")
    server.arrive("r", 60, layered=False)
    server.step(r=60)
    server.finish("r")
    server.fetch("a")
    server.step()
    server.await_fetch("a")
    server.step(a=1)
    server.end()


def fetched_beside_a_layered_step(server: TinyServer) -> None:
    server.arrive("a", 15, layered=True)
    server.step(a=15)
    server.park("a")
    server.arrive("b", 29, layered=True)
    server.step(b=10)
    server.fetch("a")
    server.step(b=10)
    server.step(b=9)
    server.await_fetch("a")
    server.step(a=1)
    server.end()


def fetched_onto_a_prefix_that_stayed(server: TinyServer) -> None:
    """Another request kept the prefix in the pool, so only the rest is fetched; that one goes on decoding."""
    server.arrive("donor", 17, layered=False)
    server.step(donor=17)
    server.arrive("a", 25, layered=True, prefix_of="donor", num_shared=4)
    server.step(a=9, donor=1)
    server.park("a")
    server.step(donor=1)
    server.fetch("a", prefix_of="donor", num_shared=4)
    server.step(donor=1)
    server.await_fetch("a")
    server.step(a=1, donor=1)
    server.end()


def aborted_while_fetching(server: TinyServer) -> None:
    """Its host blocks are read until the fetch is reported; what comes next must not write them before."""
    server.arrive("a", 24, layered=True)
    server.step(a=24)
    server.park("a")
    server.step()
    server.fetch("a")
    server.step()
    server.finish("a")
    server.arrive("b", 24, layered=True)
    server.step(b=24)
    server.park("b")
    server.poll(wait_s=5.0)
    server.fetch("b")
    server.await_fetch("b")
    server.step(b=1)
    server.end()


def host_blocks_of_an_aborted_prompt_reused(server: TinyServer) -> None:
    """The second prompt stores into the host blocks that the first, aborted, is still stored to and loaded from."""
    server.arrive("a", 44, layered=True)
    server.step(a=21)
    server.step(a=18)
    server.finish("a")
    server.arrive("b", 43, layered=True)
    server.step(b=22)
    server.step(b=21)
    server.park("b")
    server.step()
    server.fetch("b")
    server.await_fetch("b")
    server.step(b=1)
    server.park("b")
    server.finish("b")
    server.arrive("r", 30, layered=False)
    server.step(r=30)
    server.park("r")
    server.fetch("r")
    server.await_fetch("r")
    server.step(r=1)
    server.end()


def prefix_found_in_host_memory(server: TinyServer) -> None:
    """A conversation: each turn begins with all that was said before, whose device blocks others have taken."""
    server.arrive("a", 14, layered=False)
    server.step(a=14)
    server.step(a=1)
    said = server.finish("a", keeps=True)
    server.arrive("x", 40, layered=False)
    server.step(x=40)
    server.finish("x")
    assert server.arrive_again("b", said, 21) == 3
    server.step(b=9)
    server.step(b=1)
    said = server.finish("b", keeps=True)
    server.step()
    assert server.arrive_again("c", said, 30) == 5
    server.step(c=10)
    server.end()


def prefix_overwritten_in_the_step_after_its_store(server: TinyServer) -> None:
    server.arrive("a", 14, layered=False)
    server.step(a=14)
    said = server.finish("a", keeps=True)
    server.step()
    server.arrive("x", 40, layered=False)
    server.step(x=40)
    server.finish("x")
    assert server.arrive_again("b", said, 21) == 3
    server.step(b=9)
    server.end()


def prefix_found_in_the_step_that_stores_it(server: TinyServer) -> None:
    server.arrive("a", 17, layered=False)
    server.step(a=17)
    said = server.finish("a", keeps=True)
    assert server.arrive_again("b", said, 20) == 4
    server.step(b=4)
    server.end()


def prefix_loaded_into_blocks_finished_in_the_same_step(server: TinyServer) -> None:
    server.arrive("a", 21, layered=False)
    server.step(a=21)
    said = server.finish("a", keeps=True)
    server.arrive("x", 55, layered=False)
    server.step(x=55)
    server.finish("x")
    assert server.arrive_again("b", said, 22) == 5
    server.step(b=2)
    server.end()


def prefix_of_parked_and_fetched_requests(server: TinyServer) -> None:
    server.keeps_fetched = True
    server.arrive("a", 22, layered=True)
    server.step(a=22)
    server.park("a")
    server.step()
    server.fetch("a")
    server.await_fetch("a")
    server.step(a=1)
    said = server.finish("a", keeps=True)
    assert server.arrive_again("b", said, 24) == 5
    server.step(b=4)
    server.store_ahead("b")
    server.step(b=1)
    server.park("b")
    said = server.finish("b", keeps=True)
    server.arrive("y", 30, layered=True)
    server.step(y=30)
    found = server.arrive_again("c", said, 30)
    assert 0 < found <= 6
    server.step(y=1, c=30 - 4 * found)
    server.end()


def prefix_stored_ahead_and_finished_at_once(server: TinyServer) -> None:
    server.arrive("a", 18, layered=False)
    server.step(a=18)
    server.store_ahead("a")
    said = server.finish("a", keeps=True)
    assert server.arrive_again("b", said, 19) == 4
    server.step(b=3)
    server.store_ahead("b")
    server.step(b=1)
    server.finish("b", keeps=True)
    assert server.arrive_again("c", said, 19) == 4
    server.step(c=3)
    server.end()


def prefix_found_by_a_layered_prompt(server: TinyServer) -> None:
    """Loaded layer by layer, also into layers that have a lane for themselves, and again with each later chunk."""
    server.arrive("a", 14, layered=False)
    server.step(a=14)
    server.step(a=1)
    said = server.finish("a", keeps=True)
    server.step()
    assert server.arrive_again("b", said, 27, layered=True) == 3
    server.step(b=7)
    server.step(b=8)
    server.step(b=1)
    server.park("b")
    server.step()
    server.fetch("b")
    server.await_fetch("b")
    server.step(b=1)
    server.end()


def prefix_found_by_a_layered_prompt_in_the_step_that_stores_it(server: TinyServer) -> None:
    server.arrive("a", 17, layered=False)
    server.step(a=17)
    said = server.finish("a", keeps=True)
    assert server.arrive_again("b", said, 20, layered=True) == 4
    server.step(b=4)
    server.end()


def prefix_shared_by_layered_prompts_that_come_and_go(server: TinyServer) -> None:
    """What one of them gives back is nobody else's while another reads it, and nothing is stored over it."""
    server.arrive("a", 14, layered=False)
    server.step(a=14)
    said = server.finish("a", keeps=True)
    server.step()
    assert server.arrive_again("b", said, 20, layered=True) == 3
    assert server.arrive_again("c", said, 19, layered=True) == 3
    server.step(b=4, c=3)
    server.finish("b")
    server.step(c=2)
    server.park("c")
    server.arrive("x", 44, layered=True)
    server.step(x=30)
    server.step(x=14)
    server.finish("x")
    assert server.arrive_again("d", said, 16, layered=True) == 3
    server.fetch("c")
    server.step(d=4)
    server.await_fetch("c")
    server.step(c=1)
    server.end()


def prefix_loaded_over_zone_blocks_that_are_still_stored(server: TinyServer) -> None:
    """The prompt starts in zone blocks that the last layers of the step before have not left yet."""
    server.arrive("a", 13, layered=False)
    server.step(a=13)
    said = server.finish("a", keeps=True)
    server.step()
    server.arrive("x", 24, layered=True)
    server.arrive("y", 23, layered=True)
    server.step(x=24, y=20)
    server.park("x")
    server.finish("y")
    assert server.arrive_again("b", said, 22, layered=True) == 3
    server.step(b=10)
    server.fetch("x")
    server.await_fetch("x")
    server.step(x=1)
    server.end()


def stored_ahead_and_overwritten_in_the_step_that_parks(server: TinyServer) -> None:
    """What was stored ahead is not stored by the park, whose pool blocks a prompt takes in the same step."""
    server.arrive("r", 33, layered=False)
    server.step(r=33)
    server.store_ahead("r")
    server.step(r=1)
    server.step(r=1)
    server.park("r")
    server.arrive("thief", 60, layered=False)
    server.step(thief=60)
    server.finish("thief")
    server.fetch("r")
    server.await_fetch("r")
    server.step(r=2)
    server.end()


def host_blocks_stored_ahead_given_to_others(server: TinyServer) -> None:
    """The request ends while it is stored ahead; a layered prompt stores into nearly all of host memory next.

    It is fetched when every store ahead has ended: then nothing is left of the first one, had it come too late.
    """
    server.arrive("r", 33, layered=False)
    server.step(r=33)
    server.store_ahead("r")
    server.step(r=1)
    server.finish("r")
    server.arrive("a", 44, layered=True)
    server.step(a=30)
    server.step(a=14)
    server.park("a")
    server.step()
    server.arrive("b", 4, layered=False)
    server.step(b=4)
    server.store_ahead("b")
    server.step(b=1)
    server.lanes.drain(5.0)
    server.fetch("a")
    server.await_fetch("a")
    server.step(a=1)
    server.end()


SCENARIOS: tuple[Scenario, ...] = (
    whole_prompt_parked_and_fetched,
    prompt_in_chunks_that_end_inside_blocks,
    two_layered_requests_in_a_step,
    layered_beside_resident,
    streamed_decode,
    same_zone_blocks_in_the_next_step,
    chunks_of_one_over_the_zone_blocks_of_another,
    parked_prefix_overwritten_in_the_same_step,
    parked_resident_overwritten_in_the_same_step,
    fetched_right_after_the_park,
    fetched_into_blocks_parked_in_the_same_step,
    fetched_into_blocks_finished_in_the_same_step,
    fetched_beside_a_layered_step,
    fetched_onto_a_prefix_that_stayed,
    aborted_while_fetching,
    host_blocks_of_an_aborted_prompt_reused,
    prefix_found_in_host_memory,
    prefix_overwritten_in_the_step_after_its_store,
    prefix_found_in_the_step_that_stores_it,
    prefix_loaded_into_blocks_finished_in_the_same_step,
    prefix_of_parked_and_fetched_requests,
    prefix_stored_ahead_and_finished_at_once,
    prefix_found_by_a_layered_prompt,
    prefix_found_by_a_layered_prompt_in_the_step_that_stores_it,
    prefix_shared_by_layered_prompts_that_come_and_go,
    prefix_loaded_over_zone_blocks_that_are_still_stored,
    stored_ahead_and_overwritten_in_the_step_that_parks,
    host_blocks_stored_ahead_given_to_others,
)
