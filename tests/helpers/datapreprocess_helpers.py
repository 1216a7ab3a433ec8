"""Helpers and fixtures of the preprocessing tests: Ray, a tokenizer, corpora, independent readers of the output."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

EOT, EOT_ID = "<|endoftext|>", 3  # of `small_tokenizer`
WORDS = ["the", "a", "of", "model", "token", "shard", "river", "stone", "quick", "brown", "fox", "jumps"]
WORDS += ["über", "naïve", "数据", "🙂", "def", "return", "42", "3.14"]


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """Start one Ray session with four workers for all tests of a process; the commands join it and do not stop it."""
    import ray

    ray.init(
        address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20,
        logging_level="ERROR",
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run small jobs in threads of this process, even if the Ray session of other tests is running."""
    from open_lm.datapreprocess import cluster

    monkeypatch.setattr(cluster, "_initialized", lambda: False)


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use one unit per small file and several units per larger file."""
    from open_lm.datapreprocess import inputs

    monkeypatch.setattr(inputs, "_MIN_UNIT_BYTES", 1 << 13)


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Train a byte-level BPE tokenizer with 400 ids and end-of-text id 3, and return its path."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<a>", "<b>", EOT], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(documents(300, seed=5), trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


@pytest.fixture
def raw(tmp_path: Path) -> tuple[Path, list[str]]:
    """Write a folder of raw files, and return its path and all texts."""
    return tmp_path / "raw", write_corpus(tmp_path / "raw")


def make(sources: Iterable[object] | Path, out: Path, tokenizer: str, *flags: str) -> Path:
    """Run make_2048 with sequences of 33 ids, and return the folder that contains the folders of the consumers."""
    from open_lm.datapreprocess.make_2048 import main

    inputs = [str(source) for source in ([sources] if isinstance(sources, Path) else sources)]
    input_flags = ["--input-files", *inputs] if inputs else []
    main([*input_flags, "--output-dir", str(out), "--tokenizer", tokenizer, "--seqlen", "32", *flags])
    return out / "32-v1"


def record_of(folder: Path) -> dict[str, Any]:
    """Return the dataset.json of a folder."""
    return dict(json.loads((folder / "dataset.json").read_text()))


def write_bad_jsonl(folder: Path, good: int, bad: int) -> Path:
    """Write a JSON-lines file with `bad` invalid lines followed by `good` documents."""
    path = write_jsonl(folder / "a.jsonl", [f"the {number}" for number in range(good)])
    path.write_text("{\n" * bad + path.read_text())
    return path


def rejects_of(folder: Path) -> list[tuple[str, int, str]]:
    """Return (file name, line, kind) of every entry of a rejects.jsonl."""
    lines = [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]
    return [(Path(line["url"]).name, line["line"], line["kind"]) for line in lines]


def documents(count: int, seed: int = 0, words: int = 120) -> list[str]:
    """Return `count` random texts of 0 to `words` - 1 words."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randrange(words))) for _ in range(count)]


def write_jsonl(path: Path, texts: Iterable[str], key: str = "text") -> Path:
    """Write texts to a JSON-lines file, compressed if its suffix is .gz or .zst."""
    data = "".join(json.dumps({"id": number, key: text}) + "\n" for number, text in enumerate(texts)).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        data = zstandard.compress(data)
    path.write_bytes(data)
    return path


def write_corpus(folder: Path) -> list[str]:
    """Write a plain, a zstd and a gzip file to `folder`, and return all their texts."""
    texts = [documents(150, seed=1), documents(90, seed=2), documents(40, seed=3)]
    for name, part in zip(("a.jsonl", "b.jsonl.zst", "deep/c.jsonl.gz"), texts, strict=True):
        write_jsonl(folder / name, part)
    return [text for part in texts for text in part]


def expected_tokens(texts: Sequence[str], tokenizer: str, eot_id: int, split_special: bool = False) -> Counter[int]:
    """Return the count of each id in all texts, encoded with `tokenizers`, and in one end-of-text id per text."""
    from tokenizers import Tokenizer

    fast = Tokenizer.from_file(tokenizer)
    fast.encode_special_tokens = split_special
    counts: Counter[int] = Counter()
    for text in texts:
        counts.update(fast.encode(text, add_special_tokens=False).ids)
        counts[eot_id] += 1
    return counts


def read_shards(folder: Path) -> list[tuple[str, str, list[int]]]:
    """Return (shard file, member name, ids) of every member below a folder, without using open_lm."""
    members = []
    for path in sorted(folder.rglob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                data = tar.extractfile(member).read()  # type: ignore[union-attr]
                members.append((path.name, member.name, _ids(member.name, data)))
    return members


def _ids(name: str, data: bytes) -> list[int]:
    if name.endswith(".npy"):
        values: Any = np.load(io.BytesIO(data)).tolist()
    elif name.endswith(".gz"):
        values = json.loads(gzip.decompress(data))
    else:
        values = json.loads(data)
    return list(values)


def tokens_of(members: Iterable[tuple[str, str, list[int]]]) -> Counter[int]:
    """Return the count of each id in the members, without padding (-1)."""
    counts: Counter[int] = Counter()
    for _, _, ids in members:
        counts.update(value for value in ids if value != -1)
    return counts


def tree(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
