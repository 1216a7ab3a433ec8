"""Ids with flags: loss masks and the borders of documents, from the shard to the batch."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import SEQ_LEN, VOCAB_SIZE, sequence, write_source

from open_lm.config.sections import DataConfig
from open_lm.data.batch import Batch
from open_lm.data.loader import build_train_loader
from open_lm.data.masking import IGNORE_INDEX
from open_lm.data.shard_format import MEMBER_KINDS, ManifestEntry, ShardWriter, write_manifest
from open_lm.data.token_flags import NOT_TRAINED, STARTS_DOCUMENT, flag_document
from open_lm.errors import DataError

PAD = 0xFFFFFFFF
CONTEXT = IGNORE_INDEX
# Two conversations "ids 5 6 | 7 8" and "9 10 | 11" with trained ids after the bar, then two pads.
PACKED = np.concatenate([
    flag_document(np.array([5, 6, 7, 8]), np.array([0, 0, 1, 1], bool)),
    flag_document(np.array([9, 10, 11]), np.array([0, 0, 1], bool)),
    np.full(2, PAD, np.uint32),
])  # fmt: skip
TARGETS = [CONTEXT, 7, 8, CONTEXT, CONTEXT, 11, CONTEXT, CONTEXT]
DOCUMENTS = [1, 1, 1, 1, 2, 2, 2, 2]


def write_flagged(folder: Path, count: int, dtype: type = np.uint32, kind: str = "npy") -> str:
    """Write a shard of `count` copies of PACKED with a manifest that has checksums of blocks; return its path."""
    folder.mkdir(parents=True)
    with ShardWriter(folder / "00000.tar", kind, dtype=np.dtype(dtype) if kind == "npy" else None) as writer:
        writer.write_numbered(0, np.tile(PACKED, (count, 1)).astype(dtype))
    info = writer.info
    extra = {"num_bytes": info.num_bytes, "sha256": info.sha256, **info.block_sums}
    assert (info.num_tokens, info.num_masked) == ((count * 7, count * 4) if dtype is np.uint32 else (count * 9, 0))
    write_manifest(folder / "manifest.jsonl", [ManifestEntry("00000", info.num_sequences, extra)])
    return str(folder / "manifest.jsonl")


def batches(manifests: list[str], count: int, batch_size: int = 4, **options: object) -> list[Batch]:
    data = DataConfig(
        dataset_manifest=manifests, multiple_data_passes=True, workers=0, train_num_samples=4096, epochs=1
    )
    loader = build_train_loader(data, seq_len=SEQ_LEN, vocab_size=VOCAB_SIZE, batch_size=batch_size, **options)  # type: ignore[arg-type]
    return [batch for batch, _ in loader.batches(count)]


@pytest.mark.parametrize("kind", MEMBER_KINDS)
def test_flags_become_targets_and_documents(tmp_path: Path, kind: str) -> None:
    dtype = np.uint32 if kind == "npy" else np.int64
    for batch in batches([write_flagged(tmp_path / "a", 8, dtype, kind)], 3):
        assert batch.inputs[:, :7].tolist() == [[5, 6, 7, 8, 9, 10, 11]] * 4
        assert batch.targets.tolist() == [TARGETS] * 4
        documents = batch.documents(end_of_text_id=7)  # the id ends no document where flags mark them
        assert documents is not None and documents.tolist() == [DOCUMENTS] * 4
        assert (batch.inputs < VOCAB_SIZE).all() and batch.num_samples == 4


def test_sequences_without_flags_keep_their_documents_in_a_mixed_batch(tmp_path: Path) -> None:
    plain = write_source(tmp_path / "plain", [4])
    mixed = batches([write_flagged(tmp_path / "sft", 16), plain], 4, seed=3)
    rows = [row for batch in mixed for row in zip(batch.inputs, batch.targets, batch.documents(5), strict=True)]
    flagged = [row for row in rows if row[0][0] == 5]
    others = [row for row in rows if row[0][0] != 5]
    assert flagged and others
    assert all((row[1].tolist(), row[2].tolist()) == (TARGETS, DOCUMENTS) for row in flagged)
    for inputs, targets, documents in others:
        ids = sequence(0, 0, int(inputs[2]))
        assert torch.cat([inputs, targets[-1:]]).tolist() == ids.tolist() and (targets != IGNORE_INDEX).all()
        assert documents.tolist() == [0] * 6 + [1] * 2  # id 5 ends the first document


def test_batches_without_flags_have_no_documents_of_their_own(tmp_path: Path) -> None:
    (batch,) = batches([write_source(tmp_path, [8])], 1)
    assert batch.documents(4) is None and batch.stored_ids.dtype == torch.uint16


@pytest.mark.parametrize("flags", [0, NOT_TRAINED, STARTS_DOCUMENT, NOT_TRAINED | STARTS_DOCUMENT])
def test_ids_outside_the_vocabulary_are_errors_with_and_without_flags(tmp_path: Path, flags: int) -> None:
    bad = PACKED.copy()
    bad[3] = VOCAB_SIZE | flags
    with ShardWriter(tmp_path / "00000.tar", "npy") as writer:
        writer.write_numbered(0, np.tile(bad, (8, 1)))
    write_manifest(tmp_path / "manifest.jsonl", [ManifestEntry("00000", 8)])
    with pytest.raises(DataError, match="npy: found the id 1000, but the model's vocabulary has 1000 ids"):
        batches([str(tmp_path / "manifest.jsonl")], 1)


def test_first_token_of_a_document_is_never_a_target() -> None:
    assert flag_document(np.array([3, 4]), np.array([True, True])).tolist() == [3 | NOT_TRAINED | STARTS_DOCUMENT, 4]


def test_random_masks_and_borders_survive_the_way_through_shards(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    rows, expected = [], []
    for _ in range(40):
        ids, trained, parts = generator.integers(0, VOCAB_SIZE, SEQ_LEN + 1), generator.random(SEQ_LEN + 1) < 0.5, []
        cuts = sorted({0, *generator.integers(1, SEQ_LEN, 2).tolist(), SEQ_LEN + 1})
        for start, stop in pairwise(cuts):
            trained[start] = False
            parts.append(flag_document(ids[start:stop], trained[start:stop]))
        rows.append(np.concatenate(parts))
        numbers = np.searchsorted(cuts, np.arange(SEQ_LEN), side="right")
        expected.append((ids[:-1].tolist(), np.where(trained, ids, CONTEXT)[1:].tolist(), numbers.tolist()))
    with ShardWriter(tmp_path / "00000.tar", "npy") as writer:
        writer.write_numbered(0, np.stack(rows))
    write_manifest(tmp_path / "manifest.jsonl", [ManifestEntry("00000", 40)])
    found = [
        (inputs.tolist(), targets.tolist(), documents.tolist())
        for batch in batches([str(tmp_path / "manifest.jsonl")], 10)
        for inputs, targets, documents in zip(batch.inputs, batch.targets, batch.documents(0), strict=True)
    ]
    assert sorted(found) == sorted(expected)
