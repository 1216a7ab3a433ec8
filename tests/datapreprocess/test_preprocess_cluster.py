"""The preprocessor on a Ray cluster of several nodes: the bytes of one process, also where a node dies under it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datapreprocess_helpers import documents, small_tokenizer, tree, write_jsonl

__all__ = ["small_tokenizer"]

# The command with small units and stretches; the feed of a streamed file runs on the node named by the first argument.
# After as many results as the second says, it tells so and waits for a line (0: it goes through).
DRIVER = """
import sys
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from open_lm.datapreprocess import cluster, engine, inputs, make_2048
node, left = sys.argv.pop(1), [int(sys.argv.pop(1))]

def placed(**options):
    if options.get("num_returns") == "streaming":
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=True)
    return remote(**options)

def counted(self, *arguments, **options):
    for result in run(self, *arguments, **options):
        yield result
        left[0] -= 1
        if not left[0]:
            print("waiting", flush=True)
            sys.stdin.readline()

engine._MIN_CHUNK_BYTES = engine._MAX_CHUNK_BYTES = 60_000
inputs._MIN_UNIT_BYTES = 8_000
remote, ray.remote = ray.remote, placed
run, cluster.Cluster.run = cluster.Cluster.run, counted
make_2048.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head and two more nodes, a processor each."""
    from ray.cluster_utils import Cluster

    quick = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 300, "health_check_failure_threshold": 3}
    size = {"num_cpus": 1, "object_store_memory": 80 << 20}
    nodes = Cluster(initialize_head=True, head_node_args={**size, "include_dashboard": False, "_system_config": quick})
    for _ in range(2):
        nodes.add_node(**size)
    yield nodes
    nodes.shutdown()


class Command:
    """The command on files to be cut, to be streamed and to share a unit."""

    def __init__(self, folder: Path, tokenizer: str) -> None:
        self.folder = folder
        raw = folder / "raw"
        write_jsonl(raw / "a" / "cut.jsonl", documents(700, seed=1))
        write_jsonl(raw / "a" / "streamed.jsonl.gz", documents(5000, seed=2))
        for number in range(3):
            write_jsonl(raw / "b" / f"small{number}.jsonl.zst", documents(200, seed=3 + number))
        self.arguments = ["--source", f"a={raw / 'a'}", "--source", f"b={raw / 'b'}", "--tokenizer", tokenizer]
        self.arguments += ["--seqlen", "32"]

    def run(self, name: str, *more: str, feed: str = "", wait_after: int = 0) -> subprocess.Popen[str]:
        """The running command with an output of its own name."""
        command = [sys.executable, "-c", DRIVER, feed, str(wait_after), *self.arguments, *more]
        command += ["--output-dir", str(self.folder / name)]
        return subprocess.Popen(
            command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def finished(self, process: subprocess.Popen[str], name: str) -> dict[str, bytes]:
        """What it made, once it is done."""
        _, told = process.communicate("\n", timeout=120)
        assert process.returncode == 0, told
        found = tree(self.folder / name)
        shutil.rmtree(self.folder / name)
        return found


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: str) -> Command:
    return Command(tmp_path_factory.mktemp("command"), small_tokenizer)


@pytest.mark.parametrize("results", [0, 8])
def test_a_cluster_makes_the_bytes_of_one_process_also_where_a_node_dies(
    cluster: Any, command: Command, results: int
) -> None:
    """After 8 results the feed has given at most 17 of its 28 stretches: it and some of them die with its node."""
    flags = "--num-consumers 2" if results else "--output-per-source --split-documents"
    expected = command.finished(command.run("alone", *flags.split()), "alone")
    node = next(iter(cluster.worker_nodes))
    joined = [*flags.split(), "--ray-address", cluster.address]
    process = command.run("cluster", *joined, feed=node.node_id, wait_after=results)
    if results:
        assert process.stdout is not None and process.stdout.readline() == "waiting\n", process.communicate()[1]
        cluster.remove_node(node, allow_graceful=False)
    assert command.finished(process, "cluster") == expected and len(expected) > 10
