"""Which replica a request goes to, and the metrics of several."""

from __future__ import annotations

from nanovllm.engine.metrics import Counter, Gauge
from nanovllm.replicas import load_balancer
from nanovllm.replicas.load_balancer import Place, choose
from nanovllm.replicas.metric_aggregation import aggregate


def digests(*names: int) -> list[bytes]:
    return [bytes([name]) for name in names]


def places(num: int, capacity: int = 99) -> list[Place]:
    return [Place(capacity) for _ in range(num)]


def test_without_common_beginnings_loads_stay_equal() -> None:
    several = places(3)
    for _ in range(30):
        several[choose(several, range(3), [], 7)].add([], 7)
    assert [one.load for one in several] == [70, 70, 70]


def test_the_longest_cached_beginning_wins() -> None:
    several = places(3)
    several[1].add(digests(1, 2), 5)
    several[2].add(digests(1, 2, 3), 9)
    assert choose(several, range(3), digests(1, 2, 3, 4), 10) == 2
    assert choose(several, range(3), digests(1, 2, 4), 10) == 1, "the idlest of equal ones"
    assert choose(several, [0, 1], digests(1, 2, 3), 10) == 1


def test_a_much_busier_place_is_left_alone() -> None:
    several = places(2)
    several[0].add(digests(1), 40)
    assert choose(several, range(2), digests(1), 10) == 0
    several[0].add(digests(1), 1)
    assert choose(several, range(2), digests(1), 10) == 1


def test_requests_with_one_beginning_reach_every_place_in_the_end() -> None:
    several = places(4)
    for _ in range(400):
        several[choose(several, range(4), digests(1), 10)].add(digests(1), 10)
    assert {one.load for one in several} == {1000}


def test_the_oldest_blocks_are_forgotten_first_and_ends_before_beginnings() -> None:
    place = Place(3)
    place.add(digests(1, 2), 1)
    place.add(digests(3, 4), 1)
    assert place.num_cached(digests(1, 2)) == 1
    assert place.num_cached(digests(3, 4)) == 2
    place.forget()
    assert place.num_cached(digests(3, 4)) == 0


def test_clients_share_loads_and_blocks() -> None:
    memory = memoryview(bytearray(load_balancer.num_bytes(2)))
    one, other = (Place(3, memory, client=client, num_clients=2) for client in range(2))
    one.add(digests(1, 2), 7)
    assert other.num_cached(digests(1, 2)) == 2 and other.load == 7
    other.add(digests(3, 4), 5)
    assert one.num_cached(digests(1, 2)) == 1 and one.num_cached(digests(3, 4)) == 2
    one.release(7)
    assert one.load == other.load == 5


def test_counts_are_added_and_shares_averaged() -> None:
    first = [Counter("n:steps", 3), Gauge("n:kv_cache_usage_perc", 0.5), Gauge("n:running", 2)]
    second = [Counter("n:steps", 4), Gauge("n:kv_cache_usage_perc", 0.1), Gauge("n:running", 1)]
    labelled = [Counter("n:ends", 1, {"why": "stop"}), Counter("n:ends", 5, {"why": "length"})]
    found = aggregate([first + labelled, second + labelled])
    assert found == [
        Counter("n:steps", 7),
        Gauge("n:kv_cache_usage_perc", 0.3),
        Gauge("n:running", 3),
        Counter("n:ends", 2, {"why": "stop"}),
        Counter("n:ends", 10, {"why": "length"}),
    ]
    assert [type(one) for one in found[:3]] == [Counter, Gauge, Gauge]
