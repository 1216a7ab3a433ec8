"""Measure the data loaders of other libraries for bench_loader.py. Needs no open_lm: runs in a separate environment.

    python bench_loader_peers.py make  NAME FOLDER
    python bench_loader_peers.py speed NAME FOLDER --workers 1 --batch-size 32 --seconds 5

FOLDER contains tokens.npy (sequences, T), the shards txt/*.tar and npy/*.tar, and the data that `make` writes in a
library's own format. `speed` prints one line of JSON with tokens and seconds, after some warm-up batches. NAME is one
of `PEER_LOADERS`. Each is configured as its documentation recommends for training: shuffled, endless, in batches of
torch tensors.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

SEQUENCES_IN_SHARD = 512


def shards(folder: Path, kind: str) -> list[str]:
    return sorted(str(path) for path in (folder / kind).glob("*.tar"))


# --- the recipe of the original OpenLM ------------------------------------------------------------------------------
def literal_lists(folder: Path, workers: int, batch_size: int) -> Iterator[torch.Tensor]:
    """Yield batches of the original's pipeline.

    It samples shards at random, parses text members as Python literals, shuffles in a buffer of 5,000 and batches lists
    in webdataset; the trainer converts a batch to a tensor.
    """
    import webdataset as wds

    pipeline = wds.DataPipeline(
        wds.ResampledShards(shards(folder, "txt")),
        wds.tarfile_to_samples(),
        wds.shuffle(bufsize=5000, initial=1000),
        wds.map_dict(txt=lambda text: [int(value) for value in ast.literal_eval(text.decode())]),
        wds.to_tuple("txt"),
        wds.batched(batch_size, partial=False),
    )
    loader = wds.WebLoader(pipeline, batch_size=None, shuffle=False, num_workers=workers)
    return (torch.LongTensor(ids) for (ids,) in loader)


# --- webdataset as in its documentation -----------------------------------------------------------------------------
def webdataset_npy(folder: Path, workers: int, batch_size: int) -> Iterator[torch.Tensor]:
    """Yield batches of npy members from webdataset's decoder and its usual shuffle buffer."""
    import webdataset as wds

    urls = shards(folder, "npy")
    data = wds.WebDataset(urls, resampled=True, shardshuffle=False, nodesplitter=None, empty_check=False)
    data = data.shuffle(1000).decode().to_tuple("npy").batched(batch_size, partial=False)
    return (torch.as_tensor(ids) for (ids,) in wds.WebLoader(data, batch_size=None, num_workers=workers))


# --- litdata --------------------------------------------------------------------------------------------------------
def _sequences(piece: tuple[str, int, int]) -> Iterator[torch.Tensor]:
    path, start, stop = piece
    for row in np.load(path, mmap_mode="r")[start:stop]:
        yield torch.from_numpy(np.array(row))


def make_litdata(folder: Path) -> None:
    from litdata import TokensLoader, optimize

    sequences, length = np.load(folder / "tokens.npy", mmap_mode="r").shape
    optimize(
        fn=_sequences,
        inputs=[
            (str(folder / "tokens.npy"), n, n + SEQUENCES_IN_SHARD) for n in range(0, sequences, SEQUENCES_IN_SHARD)
        ],
        output_dir=str(folder / "litdata"),
        chunk_size=SEQUENCES_IN_SHARD * length,
        item_loader=TokensLoader(),
        num_workers=1,
        verbose=False,
    )


def litdata(folder: Path, workers: int, batch_size: int) -> Iterator[torch.Tensor]:
    """Yield batches of litdata's token loader from its chunks, shuffled."""
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

    length = np.load(folder / "tokens.npy", mmap_mode="r").shape[1]
    data = StreamingDataset(str(folder / "litdata"), item_loader=TokensLoader(block_size=length), shuffle=True)
    return endless(StreamingDataLoader(data, batch_size=batch_size, num_workers=workers, drop_last=True))


# --- mosaicml-streaming ---------------------------------------------------------------------------------------------
def make_mosaicml(folder: Path) -> None:
    from streaming import MDSWriter

    tokens = np.load(folder / "tokens.npy", mmap_mode="r")
    columns = {"tokens": f"ndarray:{tokens.dtype}:{tokens.shape[1]}"}
    with MDSWriter(out=str(folder / "mosaicml"), columns=columns) as writer:
        for row in tokens:
            writer.write({"tokens": np.array(row)})


def mosaicml(folder: Path, workers: int, batch_size: int) -> Iterator[torch.Tensor]:
    """Yield batches of mosaicml-streaming's data set from its shards, shuffled, through torch's DataLoader."""
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    data = StreamingDataset(local=str(folder / "mosaicml"), shuffle=True, batch_size=batch_size)
    loader = DataLoader(data, batch_size=batch_size, num_workers=workers, drop_last=True)
    return (batch["tokens"] for batch in endless(loader))


# --- measurement ----------------------------------------------------------------------------------------------------
Open = Callable[[Path, int, int], Iterator[torch.Tensor]]
PEER_LOADERS: dict[str, tuple[Open, Callable[[Path], None] | None]] = {
    "literal lists (original)": (literal_lists, None),
    "webdataset npy": (webdataset_npy, None),
    "litdata": (litdata, make_litdata),
    "mosaicml-streaming": (mosaicml, make_mosaicml),
}


def endless(loader: Iterable[Any]) -> Iterator[Any]:
    return itertools.chain.from_iterable(itertools.repeat(loader))


def measure(batches: Iterator[Any], workers: int, seconds: float, count: Callable[[Any], int]) -> dict[str, float]:
    """Return the tokens and the seconds of a measurement of at least `seconds`.

    Starts after enough batches that all workers have warmed up and their prefetch queues were emptied.
    """
    for _ in range(4 + 8 * workers):
        next(batches)
    tokens, started = 0, time.perf_counter()
    while (elapsed_s := time.perf_counter() - started) < seconds:
        tokens += count(next(batches))
    return {"tokens": tokens, "seconds": elapsed_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["make", "speed"])
    parser.add_argument("name", choices=PEER_LOADERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=5)
    args = parser.parse_args()
    open_peer, make = PEER_LOADERS[args.name]
    if args.task == "make":
        if make is not None:
            make(args.folder)
        return
    batches = open_peer(args.folder, args.workers, args.batch_size)
    print(
        json.dumps(measure(batches, args.workers, args.seconds, lambda batch: batch.numel()), allow_nan=False),
        flush=True,
    )


if __name__ == "__main__":
    main()
