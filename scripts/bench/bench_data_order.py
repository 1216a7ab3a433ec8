"""Count the bytes that all ranks fetch in one pass of the data order, and the distinct shards of each batch.

    python scripts/bench/bench_data_order.py                        # 100,000 shards in three sources
    python scripts/bench/bench_data_order.py --shards 2000 --ranks 1 8 64

The rows come from `DataOrder`, as in training; only the reading is simulated. A rank fetches the shard of a row unless
it still holds it, and holds as many shards as it has lanes, and a few more, dropping the one that was not used for the
longest time. "shards" counts whole shards; "ranges" counts, for shards whose manifest has checksums of blocks, the
blocks of the pieces that the rank reads. Both in data sets: 1 means that every byte is fetched once. A sequence takes
part in the pass as often as the upsampling factor of its shard says. "nodes" counts whole shards if the --node-ranks
ranks of a node share what they hold.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from open_lm.data.order import DataOrder, OrderSettings, Source, choose_lanes, copies_in_pass, rows_of_rank

# Name, share of the shards, weight, upsampling factor.
MIXTURE = (("web", 0.70, 74, "1"), ("code", 0.20, 18, "3/2"), ("wiki", 0.10, 8, "2"))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=100_000, help="number of shards of all sources")
    parser.add_argument("--sequences", type=int, default=24, help="sequences of a shard on average (half to 1.5 times)")
    parser.add_argument("--blocks", type=int, default=10, help="blocks of a shard, at most its sequences")
    parser.add_argument("--global-batch-size", type=int, default=3072)
    parser.add_argument("--lanes", type=int, help="number of lanes (default: as in training)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 64, 256, 1024, 3, 12, 48])
    parser.add_argument("--node-ranks", type=int, default=8, help="ranks of a node")
    parser.add_argument("--single", action="store_true", help="simulate one source instead of three with weights")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def make_sources(shards: int, sequences: int, single: bool, seed: int = 0) -> list[Source]:
    """Return sources of shards of different sizes; their weights are near their sizes, so that they end together."""
    random, sources = np.random.default_rng(seed), []
    for name, share, weight, factor in MIXTURE[:1] if single else MIXTURE:
        count = shards if single else round(shards * share)
        sizes = random.integers(max(1, sequences // 2), sequences + -(-sequences // 2), count).tolist()
        urls = tuple(f"{name}/{number:06d}.tar" for number in range(count))
        repeats = (Fraction(factor),) * count
        sources.append(Source(name, urls, tuple(sizes), Fraction(weight), repeats))
    return sources


class Rows(NamedTuple):
    """The rows of a run, in the columns of `rows_of_rank` for one rank: int64 (steps, global batch)."""

    shard: np.ndarray  # number over all sources
    member: np.ndarray
    lanes: int


def take_rows(sources: Sequence[Source], batch: int, lanes: int, steps: int, seed: int = 0) -> Rows:
    """Return the rows of the first `steps` batches."""
    order, columns = DataOrder(sources, seed, OrderSettings(lanes=lanes)), rows_of_rank(lanes, batch, 0, 1)
    first = np.cumsum([0, *(len(source.shards) for source in sources)])
    rows = Rows(np.empty((steps, batch), np.int64), np.empty((steps, batch), np.int64), lanes)
    for step in range(steps):
        samples = order.take(batch, columns)
        rows.shard[step], rows.member[step] = first[samples.source] + samples.shard, samples.member
    return rows


def steps_of_pass(sources: Sequence[Source], batch: int) -> int:
    """Return the steps after which no source has ended its first pass."""
    total = sum(source.weight for source in sources)
    lengths = (
        int(np.dot(np.array(source.sizes, np.int64), copies_in_pass(source, 0))) * total / source.weight
        for source in sources
    )
    return int(min(lengths) / batch)


def fetches(shard: np.ndarray, held: int) -> Iterator[int]:
    """Yield the shards that a reader of the rows (steps, n) fetches, if it holds `held` shards."""
    cache: OrderedDict[int, None] = OrderedDict()
    changed = np.ones(shard.shape, bool)
    changed[1:] = shard[1:] != shard[:-1]
    for step in np.flatnonzero(changed.any(axis=1)).tolist():
        for number in np.unique(shard[step]).tolist():
            if number not in cache:
                yield number
            cache[number] = None
            cache.move_to_end(number)
        while len(cache) > held:
            cache.popitem(last=False)


def blocks_read(rows: Rows, sizes: np.ndarray, blocks: int, columns: slice) -> float:
    """Return the blocks (in shards) that a rank reads, if it fetches each block of a piece once."""
    batch = rows.shard.shape[1]
    slot = np.arange(batch) // (batch // rows.lanes)
    shard, member = rows.shard[:, columns], rows.member[:, columns]
    piece = slot[columns] * len(sizes) + shard
    first, last = member * blocks // sizes[shard], ((member + 1) * blocks - 1) // sizes[shard]
    return len(np.unique(np.append(piece * blocks + first, piece * blocks + last))) / blocks


def traffic(rows: Rows, sizes: np.ndarray, world_size: int, node_ranks: int, blocks: int) -> tuple[float, float, float]:
    """Return the shards fetched by all ranks: whole ones, whole ones with shared nodes, and by ranges."""
    batch = rows.shard.shape[1]
    size = batch // world_size
    used = float(np.sum(1 / sizes[rows.shard]))  # shards that one pass over the rows amounts to

    def whole(ranks: int) -> float:
        readers = (rows.shard[:, start : start + ranks * size] for start in range(0, batch, ranks * size))
        weights = [sizes[list(fetches(part, 2 * min(part.shape[1], rows.lanes) + 8))].sum() for part in readers]
        return float(np.sum(weights) / rows.shard.size)

    nodes = whole(min(node_ranks, world_size)) if world_size % min(node_ranks, world_size) == 0 else float("nan")
    ranges = sum(blocks_read(rows, sizes, blocks, slice(rank * size, (rank + 1) * size)) for rank in range(world_size))
    return whole(1), nodes, ranges / used


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    sources = make_sources(args.shards, args.sequences, args.single, args.seed)
    steps = steps_of_pass(sources, args.global_batch_size)
    lanes = args.lanes or choose_lanes(args.global_batch_size)
    rows = take_rows(sources, args.global_batch_size, lanes, steps, args.seed)
    sizes = np.concatenate([np.array(source.sizes) for source in sources])
    distinct = [len(np.unique(row)) for row in rows.shard]
    print(
        f"{args.shards} shards in {len(sources)} sources, {rows.shard.size} sequences in {steps} global batches of "
        f"{args.global_batch_size}, {lanes} lanes; distinct shards of a batch: {min(distinct)} to {max(distinct)}"
    )
    print(f"{'ranks':>6}{'divides the lanes':>20}{'shards':>10}{'nodes':>10}{'ranges':>10}")
    for world_size in args.ranks:
        if args.global_batch_size % world_size:
            print(f"{world_size:6} does not divide the global batch")
            continue
        values = traffic(rows, sizes, world_size, args.node_ranks, args.blocks)
        columns = "".join(f"{value:10.3f}" for value in values)
        print(f"{world_size:6}{'yes' if lanes % world_size == 0 else 'no':>20}{columns}", flush=True)


if __name__ == "__main__":
    main()
