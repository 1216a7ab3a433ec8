"""Tests of the preprocessor on a Ray cluster: the same output as in one process, also if a node dies."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datapreprocess_helpers import documents, tree, write_jsonl

pytestmark = pytest.mark.processes


# Runs the command with small units and chunks. The first argument is the id of the node for the feeds of streamed
# files. The second is the number of results after which the command prints "waiting" and waits for a line of input;
# with 0 it does not wait.
DRIVER = """
import sys
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from open_lm.datapreprocess import cluster, engine, inputs, make_2048
node, remaining = sys.argv.pop(1), int(sys.argv.pop(1))

def remote_on_node(**options):
    if options.get("num_returns") == "streaming":
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=True)
    return remote(**options)

def run_and_wait(self, *arguments, **options):
    global remaining
    for result in run(self, *arguments, **options):
        yield result
        remaining -= 1
        if not remaining:
            print("waiting", flush=True)
            sys.stdin.readline()

engine._MIN_CHUNK_BYTES = engine._MAX_CHUNK_BYTES = 60_000
inputs._MIN_UNIT_BYTES = 8_000
remote, ray.remote = ray.remote, remote_on_node
run, cluster.Cluster.run = cluster.Cluster.run, run_and_wait
make_2048.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Start a cluster of a head node and two more nodes with one CPU each."""
    from ray.cluster_utils import Cluster

    health = {
        "health_check_initial_delay_ms": 500,
        "health_check_period_ms": 300,
        "health_check_failure_threshold": 3,
    }
    size = {"num_cpus": 1, "object_store_memory": 80 << 20}
    nodes = Cluster(initialize_head=True, head_node_args={**size, "include_dashboard": False, "_system_config": health})
    for _ in range(2):
        nodes.add_node(**size)
    yield nodes
    nodes.shutdown()


class Command:
    """Runs the command on one file that is split, one that is streamed, and several that share a unit."""

    def __init__(self, folder: Path, tokenizer: str) -> None:
        self.folder = folder
        raw = folder / "raw"
        write_jsonl(raw / "a" / "split.jsonl", documents(700, seed=1))
        write_jsonl(raw / "a" / "streamed.jsonl.gz", documents(5000, seed=2))
        for number in range(3):
            write_jsonl(raw / "b" / f"small{number}.jsonl.zst", documents(200, seed=3 + number))
        self.arguments = ["--source", f"a={raw / 'a'}", "--source", f"b={raw / 'b'}", "--tokenizer", tokenizer]
        self.arguments += ["--seqlen", "32"]

    def start(self, name: str, *flags: str, feed_node: str = "", wait_after: int = 0) -> subprocess.Popen[str]:
        """Start the command with the output folder `name`."""
        command = [sys.executable, "-c", DRIVER, feed_node, str(wait_after), *self.arguments, *flags]
        command += ["--output-dir", str(self.folder / name)]
        return subprocess.Popen(
            command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def finish(self, process: subprocess.Popen[str], name: str) -> dict[str, bytes]:
        """Wait for the command, and return its output files."""
        _, errors = process.communicate("\n", timeout=120)
        assert process.returncode == 0, errors
        output = tree(self.folder / name)
        shutil.rmtree(self.folder / name)
        return output


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: str) -> Command:
    return Command(tmp_path_factory.mktemp("command"), small_tokenizer)


@pytest.mark.parametrize("results", [0, 8])
def test_a_cluster_gives_the_same_output_as_one_process_also_if_a_node_dies(
    cluster: Any, command: Command, results: int
) -> None:
    """After 8 results the feed has yielded at most 17 of its 28 chunks, so it and some chunks die with the node."""
    flags = "--num-consumers 2" if results else "--output-per-source --split-documents"
    expected = command.finish(command.start("single", *flags.split()), "single")
    node = next(iter(cluster.worker_nodes))
    cluster_flags = [*flags.split(), "--ray-address", cluster.address]
    process = command.start("cluster", *cluster_flags, feed_node=node.node_id, wait_after=results)
    if results:
        assert process.stdout is not None and process.stdout.readline() == "waiting\n", process.communicate()[1]
        cluster.remove_node(node, allow_graceful=False)
    assert command.finish(process, "cluster") == expected and len(expected) > 10
