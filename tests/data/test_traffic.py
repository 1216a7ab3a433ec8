"""The bytes that all ranks together fetch from an S3 server in one pass, counted by the server."""

from __future__ import annotations

import json
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import bench_s3
import pytest
import torch
from data_helpers import SEQ_LEN, VOCAB_SIZE, write_block_source, write_source

pytestmark = pytest.mark.processes


class CountingServer:
    """The lean S3 server of bench_s3.py, with the bytes sent by file name in `sent` and the number of ranges sent."""

    def __init__(self, root: Path) -> None:
        self.sent: Counter[str] = Counter()
        self.num_ranges = 0
        counter = self
        sent, lock = self.sent, threading.Lock()

        class Handler(bench_s3._Handler):
            bandwidth = bench_s3._Bandwidth(float("inf"))

            def _answer(self, status: int, headers: dict[str, str]) -> None:
                if self.command == "GET" and status in (200, 206):
                    with lock:
                        sent[self.path.rpartition("/")[2]] += int(headers["Content-Length"])
                        counter.num_ranges += status == 206
                super()._answer(status, headers)

        Handler.root = root
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def shard_bytes(self) -> int:
        return sum(count for name, count in self.sent.items() if name.endswith(".tar"))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CountingServer]:
    root = tmp_path / "store"
    (root / "bucket").mkdir(parents=True)
    server = CountingServer(root)
    variables = {"ACCESS_KEY_ID": "testing", "SECRET_ACCESS_KEY": "testing", "DEFAULT_REGION": "us-east-1"}
    for name, value in {**variables, "ENDPOINT_URL": f"http://127.0.0.1:{server.server.server_address[1]}"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    yield server
    server.server.shutdown()
    server.server.server_close()


def read_pass(
    ranks: Callable[..., Any], tmp_path: Path, world_size: int, workers: int, *args: str, nodes: int = 1
) -> list[list[tuple[int, ...]]]:
    """Read all batches on `world_size` ranks, each in its own node if `nodes` > 1; return the rows by step."""
    folder = tmp_path / "rows"
    folder.mkdir(exist_ok=True)
    env = {"LOCAL_WORLD_SIZE": "1"} if nodes > 1 else {}
    ranks(world_size, "order_worker", str(folder), *args, str(workers), env=env)
    parts = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)]
    return [sorted(tuple(row) for part in step for row in part) for step in zip(*parts, strict=True)]


@pytest.mark.parametrize("has_blocks", [True, False])
def test_all_ranks_together_fetch_each_byte_about_once(
    server: CountingServer, tmp_path: Path, ranks: Callable[..., Any], has_blocks: bool
) -> None:
    """Each rank is its own node. Whole shards are cut at 11 places, so they are fetched more than once there."""
    folder = tmp_path / "store/bucket/d"
    sizes = [40] * 30 if has_blocks else [12] * 100
    if has_blocks:
        write_block_source(folder, sizes)
    else:
        write_source(folder, sizes)
    stored = 1200 * 1024 if has_blocks else 100 * (folder / "00000.tar").stat().st_size
    batches = None
    for world_size, workers in ((1, 0), (2, 1), (3, 2), (4, 0)) if has_blocks else ((1, 2), (4, 1)):
        server.sent.clear()
        rows = read_pass(ranks, tmp_path, world_size, workers, "s3://bucket/d/manifest.jsonl", "12", "100", nodes=2)
        assert batches in (None, rows)
        batches = rows
        taken = [row for step in rows for row in step]
        assert len(taken) == len(set(taken)) == 1200 == sum(sizes)
        ratio = server.shard_bytes / stored
        assert ratio <= (1.1 if has_blocks else 1.2), (world_size, workers, ratio)


def test_the_trainer_under_torchrun_fetches_each_block_once(
    server: CountingServer, tmp_path: Path, torchrun: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Two ranks of one node train on one pass, each with a worker that reads ranges."""
    write_block_source(tmp_path / "store/bucket/d", [40] * 10)
    model = {"hidden_dim": 8, "n_layers": 1, "n_heads": 1, "seq_len": SEQ_LEN, "vocab_size": VOCAB_SIZE}
    (tmp_path / "model.json").write_text(json.dumps(model))
    flags = f"--model {tmp_path}/model.json --dataset-manifest s3://bucket/d/manifest.jsonl --data-key npy --workers 1"
    flags += (
        f" --global-batch-size 20 --train-num-samples {400 * SEQ_LEN} --epochs 1 --precision fp32 --name run --seed 3"
    )
    torchrun(2, "open_lm.main", *flags.split())
    (stats,) = (tmp_path / "logs/run/checkpoints").glob("stats_1.pt")
    (source,) = torch.load(stats, weights_only=True)["data_state"]["sources"]
    assert source["samples"] == 400
    assert server.shard_bytes == 10 * 40 * 1024 and all(
        server.sent[f"{shard:05d}.tar"] == 40 << 10 for shard in range(10)
    )
    assert server.num_ranges >= 20


def test_ranks_that_do_not_divide_the_lanes_and_ranks_of_one_node(
    server: CountingServer, tmp_path: Path, ranks: Callable[..., Any]
) -> None:
    """513 lanes on 2 ranks: one lane belongs to both. On one node, they fetch their common blocks once."""
    folder = tmp_path / "store/bucket/d"
    write_block_source(folder, [342] * 12)
    found = []
    for nodes, limit in ((2, 1.5), (1, 1.05)):
        server.sent.clear()
        found.append(read_pass(ranks, tmp_path, 2, 1, "s3://bucket/d/manifest.jsonl", "1026", "4", nodes=nodes))
        assert server.shard_bytes <= limit * 12 * 342 * 1024
    assert found[0] == found[1]
    assert sorted(row for step in found[0] for row in step) == [(0, s, m) for s in range(12) for m in range(342)]
