"""Replicas as Ray actors: a placement group with one bundle per replica."""

from __future__ import annotations

import atexit
import json
import logging
import threading
from collections.abc import Sequence
from typing import Any

from nanovllm import env
from nanovllm.config import EngineConfig
from nanovllm.parallel.channel import unpack
from nanovllm.parallel.serve import ERROR
from nanovllm.replicas import child_config, cluster
from nanovllm.replicas.ray_actor import NUM_THREADS, ReplicaActor
from nanovllm.replicas.replica import Event, Inbox, Replica, ReplicaFailed
from nanovllm.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

USER = "distributed_executor_backend='ray'"
PLACE_S = 60.0  # to wait for the placement group while others use its resources
# An actor that does not respond for this long is lost; Ray starts its process before any call.
SILENT_S, SILENT_AT_START_S = 8, 120
CLOSE_S = 10.0  # for a replica to exit
# Replicas do not communicate, so one node has no advantage. On several nodes, a lost node costs
# fewer of them, and each has more of a host's memory bandwidth.
STRATEGY = "SPREAD"


class RayReplica(Replica):
    """An engine on a node of a Ray cluster, behind an actor (`ReplicaActor`)."""

    def __init__(self, index: int, setup: dict[str, Any], inbox: Inbox, ray: Any, actor: Any):
        """actor: the actor's class with its options, including its place in the cluster."""
        super().__init__(index, setup)
        self._ray, self._inbox = ray, inbox
        self._num_told = 0
        self._has_begun = self._has_failed = self._is_closing = self._is_closed = False
        self._closing: Any = None  # the call of the actor's `close`
        self._actor = actor.remote(index, json.dumps(setup).encode())
        self._thread = threading.Thread(target=self._receive, name=self.name, daemon=True)
        self._thread.start()

    def send(self, name: str, payload: bytes = b"") -> bool:
        if self._has_failed:
            return False
        try:
            self._check()
            self._actor.send.remote(self._num_told, name, payload)
        except (ReplicaFailed, self._ray.exceptions.RayError):  # the latter if Ray shuts down
            return False
        self._num_told += 1
        return True

    def ask_metrics(self) -> bytes:
        self._check()
        try:
            found: bytes = self._ray.get(self._actor.metrics.remote())
        except self._ray.exceptions.RayError as error:
            raise self._lost(error) from error
        if not found:
            raise ReplicaFailed(f"{self.name} has failed")
        return found

    def begin_close(self) -> None:
        if not self._is_closing:
            self._is_closing = True
            with cluster.closing():
                # an actor that has no place yet would not answer
                if self._ray.is_initialized() and self._has_begun and not self._has_failed:
                    self._closing = self._actor.close.remote()

    def close(self) -> None:
        self.begin_close()
        if self._is_closed:
            return
        self._is_closed = True
        with cluster.closing():
            if self._closing is not None:
                self._ray.wait([self._closing], timeout=CLOSE_S)
        self._kill()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _receive(self) -> None:
        """Turn messages from the actor into events, until its end."""
        limit = SILENT_AT_START_S
        try:
            while not self._is_closing:
                self._check()
                call = self._actor.receive.remote()
                self._wait(call, limit)
                limit, self._has_begun = SILENT_S, True
                received = bytearray(self._ray.get(call))
                while (message := unpack(received)) is not None:
                    self._take(*message)
        except BaseException as error:  # SystemExit if Ray was shut down
            if not self._is_closing:
                self._kill()  # do not leave an unreachable engine running
            self._fail(error if isinstance(error, ReplicaFailed) else self._lost(error))

    def _wait(self, call: Any, seconds: int) -> None:
        """Wait for a call. Raises ReplicaFailed after this time."""
        for _ in range(seconds):  # one by one: this process may be suspended meanwhile
            if self._ray.wait([call], timeout=1.0)[0]:
                return
            self._check()
        raise ReplicaFailed(f"{self.name} has not responded for {seconds} s")

    def _check(self) -> None:
        """Raises ReplicaFailed if the replica or Ray is closed."""
        if self._is_closing:
            raise ReplicaFailed(f"{self.name} is closed")
        if not self._ray.is_initialized():
            raise ReplicaFailed(f"{self.name} is lost: Ray was shut down in this process")

    def _take(self, name: str, payload: bytes) -> None:
        if name != ERROR:
            self._inbox.put(Event(self, name, payload))
            return
        kind, text, is_mistake = json.loads(payload)
        words = f"{kind}: {text}" if text else kind
        self._fail(ValueError(text) if is_mistake else ReplicaFailed(words))

    def _fail(self, failure: Exception) -> None:
        """Report the first failure, unless the router is closing the replica."""
        if not self._has_failed and not self._is_closing:
            self._has_failed = True
            self._inbox.put(Event(self, "", b"", failure))

    def _lost(self, error: BaseException) -> ReplicaFailed:
        return ReplicaFailed(f"{self.name} is lost: {_line(error)}")

    def _kill(self) -> None:
        with cluster.closing():
            if self._ray.is_initialized():
                self._ray.kill(self._actor)


class RayStarter:
    """Places each replica on one node of a cluster."""

    def __init__(self, config: EngineConfig) -> None:
        """Connect to a cluster (`cluster.Shared.open`) and wait for the resources.

        Raises ValueError if Ray is missing or the cluster is too small, RuntimeError if its
        resources are in use.
        """
        self._config = child_config.with_full_paths(config)
        self._replicas: dict[int, RayReplica] = {}
        self._group: Any = None
        self._is_closed = False
        self._ray = cluster.SHARED.open(USER, env.ray_address())
        atexit.register(self.close)  # before Ray's own end, which comes later in the list
        try:
            self._place()
        except BaseException:
            self.close()
            raise

    def start(
        self, index: int, inbox: Inbox, clients: Sequence[int] = (), *, again: bool = False
    ) -> RayReplica:
        """Raises ReplicaFailed, besides, if Ray has been shut down."""
        assert not clients, "sockets end with this machine"
        if not self._ray.is_initialized():
            raise ReplicaFailed("Ray was shut down in this process")
        first = self._node_ids.index(self._node_ids[index])
        setup = child_config.setup(
            self._config,
            f"replica {index}{self._place_of(index)}",
            compile_cache=self._config.compile_cache,
            # a node has its own store
            waits_for=first if first != index and not again else None,
            environment=env.settings(),
        )
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
        actor = self._ray.remote(ReplicaActor).options(
            scheduling_strategy=strategy,
            max_concurrency=NUM_THREADS,
            max_restarts=0,
            max_task_retries=0,
            **self._resources,
        )
        replica = RayReplica(index, setup, inbox, self._ray, actor)
        self._replicas[index] = replica
        return replica

    def _place_of(self, index: int) -> str:
        """The node of a replica, in words; nothing while Ray looks for another one."""
        place = self._nodes()[index]
        for node in self._ray.nodes():
            if node["Alive"] and node["NodeID"] == place:
                return f" on node {node['NodeManagerAddress']}"
        return ""

    def _nodes(self) -> list[str]:
        """The ids of the replicas' nodes."""
        places = self._ray.util.placement_group_table(self._group)["bundles_to_node_id"]
        return [places[index] for index in range(self._config.data_parallel_size)]

    def tokenizer(self) -> Tokenizer | None:
        return child_config.tokenizer(self._config)

    def close(self) -> None:
        """End the replicas and release their resources."""
        if self._is_closed:
            return
        self._is_closed = True
        atexit.unregister(self.close)
        for replica in self._replicas.values():
            replica.begin_close()
        for replica in self._replicas.values():
            replica.close()
        if self._group is not None:
            with cluster.closing():
                if self._ray.is_initialized():
                    self._ray.util.remove_placement_group(self._group)
        cluster.SHARED.close()

    def _place(self) -> None:
        """Reserve the resources of all replicas, or raise."""
        ray, config = self._ray, self._config
        nodes = [node for node in ray.nodes() if node["Alive"]]
        num = config.data_parallel_size
        self._resources = cluster.share(config, num, [node["Resources"] for node in nodes])
        kinds = {"CPU": "num_cpus", "GPU": "num_gpus"}
        bundle = {
            kind: self._resources[name] for kind, name in kinds.items() if self._resources.get(name)
        }
        # a bundle, and thus all ranks of a replica, is on one node
        self._group = ray.util.placement_group([bundle] * num, strategy=STRATEGY)
        ready, _ = ray.wait([self._group.ready()], timeout=PLACE_S)
        if not ready:
            free = {kind: ray.available_resources().get(kind, 0) for kind in bundle}
            raise RuntimeError(
                f"the Ray cluster had no room for {num} × {_counts(bundle)} within "
                f"{PLACE_S:.0f} s: others use it, and {_counts(free)} of all nodes are free"
            )
        self._node_ids = self._nodes()


def _counts(resources: dict[str, float]) -> str:
    return ", ".join(f"{num:g} {kind}(s)" for kind, num in resources.items())


def _line(error: BaseException) -> str:
    """The text of a Ray error, which has many lines, in one line."""
    return " ".join(str(error).split())[:300]
