"""What the preprocessing tests share: a local Ray, a small tokenizer, corpora, readers that owe nothing to ours."""

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

EOT = "<|endoftext|>"
WORDS = ["the", "a", "of", "model", "token", "shard", "river", "stone", "quick", "brown", "fox", "jumps"]
WORDS += ["über", "naïve", "数据", "🙂", "def", "return", "42", "3.14"]


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray with four workers for all tests of a process; the commands use it and leave it running."""
    import ray

    if ray.is_initialized():  # by the fixture of another test file
        yield
        return
    ray.init(
        address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20,
        logging_level="ERROR",
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands do small jobs in this process, also where a Ray of other tests runs."""
    from open_lm.datapreprocess import cluster

    monkeypatch.setattr(cluster, "_initialized", lambda: False)


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file a unit of its own, larger ones several."""
    from open_lm.datapreprocess import inputs

    monkeypatch.setattr(inputs, "_MIN_UNIT_BYTES", 1 << 13)


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A byte-level BPE of 400 ids whose end-of-text id is 3."""
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
    """A folder of raw files and the texts in them."""
    return tmp_path / "raw", corpus(tmp_path / "raw")


def make(sources: Iterable[object] | Path, out: Path, tokenizer: str, *more: str) -> Path:
    """Run make_2048 with sequences of 33 ids; returns the folder above its consumers' folders."""
    from open_lm.datapreprocess.make_2048 import main

    inputs = [str(source) for source in ([sources] if isinstance(sources, Path) else sources)]
    named = ["--input-files", *inputs] if inputs else []
    main([*named, "--output-dir", str(out), "--tokenizer", tokenizer, "--seqlen", "32", *more])
    return out / "32-v1"


def record_of(folder: Path) -> dict[str, Any]:
    """The dataset.json in a folder."""
    return dict(json.loads((folder / "dataset.json").read_text()))


def spoil(folder: Path, good: int, bad: int) -> Path:
    """A JSON-lines file that begins with `bad` lines that are none."""
    path = write_jsonl(folder / "a.jsonl", [f"the {number}" for number in range(good)])
    path.write_text("{\n" * bad + path.read_text())
    return path


def rejects_of(place: Path) -> list[tuple[str, int, str]]:
    """File, line and kind of all that a run rejected."""
    lines = [json.loads(line) for line in (place / "rejects.jsonl").read_text().splitlines()]
    return [(Path(line["url"]).name, line["line"], line["kind"]) for line in lines]


def documents(count: int, seed: int = 0, words: int = 120) -> list[str]:
    """Texts of 0 to `words` words, some of them empty."""
    random_ = random.Random(seed)
    return [" ".join(random_.choices(WORDS, k=random_.randrange(words))) for _ in range(count)]


def write_jsonl(path: Path, texts: Iterable[str], key: str = "text") -> Path:
    """A JSON-lines file, compressed as its name says."""
    data = "".join(json.dumps({"id": number, key: text}) + "\n" for number, text in enumerate(texts)).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        data = zstandard.compress(data)
    path.write_bytes(data)
    return path


def corpus(folder: Path) -> list[str]:
    """Three files of three kinds in `folder`; returns all their texts."""
    texts = [documents(150, seed=1), documents(90, seed=2), documents(40, seed=3)]
    for name, part in zip(("a.jsonl", "b.jsonl.zst", "deep/c.jsonl.gz"), texts, strict=True):
        write_jsonl(folder / name, part)
    return [text for part in texts for text in part]


def expected_tokens(texts: Sequence[str], tokenizer: str, eot_id: int) -> Counter[int]:
    """How often each id must occur: the ids of every text and one end-of-text id for each, by `tokenizers` itself."""
    from tokenizers import Tokenizer

    fast = Tokenizer.from_file(tokenizer)
    counts: Counter[int] = Counter()
    for text in texts:
        counts.update(fast.encode(text, add_special_tokens=False).ids)
        counts[eot_id] += 1
    return counts


def read_shards(folder: Path) -> list[tuple[str, str, list[int]]]:
    """(shard file, member name, ids) of every member below a folder, read with tarfile, gzip, json and numpy alone."""
    found = []
    for path in sorted(folder.rglob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                data = tar.extractfile(member).read()  # type: ignore[union-attr]
                found.append((path.name, member.name, _ids(member.name, data)))
    return found


def _ids(name: str, data: bytes) -> list[int]:
    if name.endswith(".npy"):
        values: Any = np.load(io.BytesIO(data)).tolist()
    elif name.endswith(".gz"):
        values = json.loads(gzip.decompress(data))
    else:
        values = json.loads(data)
    return list(values)


def tokens_of(members: Iterable[tuple[str, str, list[int]]]) -> Counter[int]:
    """How often each id occurs in members, pads (-1) left out."""
    counts: Counter[int] = Counter()
    for _, _, ids in members:
        counts.update(value for value in ids if value != -1)
    return counts


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
