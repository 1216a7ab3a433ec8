"""Data for supervised fine-tuning: forms, packing, masks, bad records, and shards that do not depend on the run."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sft_helpers import CHAT, PAD, make_data, stored_conversations, stored_sequences, write_chat_tokenizer, write_jsonl

from open_lm import storage
from open_lm.config.sections import DataConfig
from open_lm.data.loader import build_train_loader
from open_lm.data.masking import IGNORE_INDEX
from open_lm.errors import ConfigError, DataError
from open_lm.finetune.chat_templates import find_template
from open_lm.finetune.chat_tokens import ChatEncoding, ChatTokenizer
from open_lm.finetune.conversations import Message, parse_conversation
from open_lm.finetune.sft_data import main as make_sft
from open_lm.tokenizer import load_tokenizer
from open_lm.utils import inspect_shards

QUESTION, ANSWER = "what is it?", "a test"
SAME = [Message("user", QUESTION), Message("assistant", ANSWER)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def random_chats(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return different conversations of one to three turns."""
    source = random.Random(seed)

    def text(length: int) -> str:
        return "".join(source.choices("abc dé", k=length)) + "x"

    chats = []
    for number in range(count):
        messages = [{"role": "system", "content": text(4)}] if source.random() < 0.5 else []
        for _ in range(source.randint(1, 3)):
            messages += [{"role": "user", "content": f"{number} {text(source.randint(0, 6))}"}]
            messages += [{"role": "assistant", "content": text(source.randint(0, 9))}]
        chats.append({"messages": messages})
    return chats


def expected_conversations(tokenizer: Path, chats: list[dict[str, Any]]) -> list[tuple[list[int], list[bool]]]:
    loaded = load_tokenizer(str(tokenizer))
    chat = ChatTokenizer(loaded, find_template("chatml", loaded))
    encodings = chat.encode([parse_conversation(record) for record in chats])
    assert all(isinstance(encoding, ChatEncoding) for encoding in encodings)
    return sorted((e.ids.tolist(), e.is_trained.tolist()) for e in encodings if isinstance(e, ChatEncoding))


# --- forms -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]}, SAME),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": QUESTION}]},
                       {"role": "assistant", "content": ANSWER}], "prompt": "unused"}, SAME),
        ({"prompt": QUESTION, "completion": ANSWER}, SAME),
        ({"prompt": QUESTION, "response": ANSWER}, SAME),
        ({"prompt": [{"role": "user", "content": QUESTION}],
          "completion": [{"role": "assistant", "content": ANSWER}]}, SAME),
        ({"instruction": QUESTION, "input": "", "output": ANSWER}, SAME),
        ({"instruction": "what", "input": "is it?", "output": ANSWER}, [Message("user", "what\n\nis it?"), SAME[1]]),
        ({"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]}, SAME),
        ({"system": "be kind", "conversations": [{"from": "human", "value": QUESTION},
                                                 {"from": "gpt", "value": ANSWER}]},
         [Message("system", "be kind"), *SAME]),
        ({"messages": [{"role": "user", "content": QUESTION},
                       {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
                       {"role": "tool", "content": "7"}, {"role": "assistant", "content": ANSWER}],
          "tools": [{"name": "f"}]},
         [Message("system", 'Tools:\n[{"name": "f"}]'), SAME[0], Message("assistant", '{"name": "f"}'),
          Message("tool", "7"), SAME[1]]),
    ],
)  # fmt: skip
def test_forms(record: dict[str, Any], expected: list[Message]) -> None:
    assert list(parse_conversation(record)) == expected


BAD = {
    "unknown role": ({"messages": [{"role": "wizard", "content": "a"}, {"role": "assistant", "content": "b"}]},
                     "'wizard'"),
    "empty assistant turn": ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " \n"}]},
                             "message 2"),
    "no assistant turn": ({"messages": [{"role": "user", "content": "a"}]}, "nothing to train"),
    "unknown form": ({"text": "a"}, "found the keys text"),
    "wrong type": ({"prompt": "a", "completion": 3}, "found int"),
    "missing key": ({"messages": [{"content": "a"}]}, '"role"'),
    "not text": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
    "not an object": ([1], "found list"),
    "invalid JSON": ('{"messages": [', "line 1"),
    "too long": ({"prompt": "a" * 400, "completion": "b"}, "--overlong"),
    "not Unicode": ({"prompt": "a\ud800", "completion": "b"}, r"prompt: found '\ud800', half of a surrogate pair"),
    "wrong tool calls": ({"messages": [{"role": "assistant", "content": "a", "tool_calls": 5}]}, "found int"),
    "two system prompts": ({"system": "a", "prompt": [{"role": "system", "content": "b"}], "completion": "c"},
                           "system"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_records_are_one_error_with_file_and_line(tmp_path: Path, tokenizer: Path, kind: str) -> None:
    record, detail = BAD[kind]
    file = write_jsonl(tmp_path / "chats.jsonl", [{"messages": CHAT}, "", record])
    with pytest.raises(DataError) as caught:
        make_data(tmp_path / "out", tokenizer, [file])
    message = str(caught.value)
    assert f"chats.jsonl line 3: {kind}: " in message and detail in message and "--max-bad-fraction" in message
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_templates_that_raise_are_errors_of_the_record(tmp_path: Path, tokenizer: Path) -> None:
    system = {"role": "system", "content": "s"}
    file = write_jsonl(tmp_path / "chats.jsonl", [{"messages": CHAT}, {"messages": [*CHAT[1:], system]}])
    with pytest.raises(DataError, match=r"line 2: template error: .*the system prompt must be the first message"):
        make_data(tmp_path / "out", tokenizer, [file], "--chat-template", "llama2")


def test_bad_records_are_skipped_and_counted_on_request(tmp_path: Path, tokenizer: Path) -> None:
    records = [{"messages": CHAT}, *(record for record, _ in BAD.values())]
    record = make_data(tmp_path / "out", tokenizer, [write_jsonl(tmp_path / "a.jsonl", records)], "--skip-bad-lines")
    assert record["counts"]["documents"] == 1 and record["bad_documents"] == dict.fromkeys(sorted(BAD), 1)
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [(item["kind"], item["line"]) for item in rejects] == [(kind, n) for n, kind in enumerate(BAD, start=2)]


# --- packing ---------------------------------------------------------------------------------------------------------
def test_packed_shards_hold_every_conversation_with_its_mask(tmp_path: Path, tokenizer: Path) -> None:
    chats = random_chats(150)
    record = make_data(tmp_path / "out", tokenizer, [write_jsonl(tmp_path / "a.jsonl", chats)])
    expected = expected_conversations(tokenizer, chats)
    assert stored_conversations(tmp_path / "out") == expected
    tokens, trained = sum(len(ids) for ids, _ in expected), sum(sum(mask) for _, mask in expected)
    counts = record["counts"]
    assert (counts["documents"], counts["tokens"], counts["trained_tokens"]) == (150, tokens, trained)
    lines = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert sum(line["num_tokens"] for line in lines) == tokens
    assert sum(line["num_masked"] for line in lines) == counts["masked_tokens"] == tokens - trained
    sequences = stored_sequences(tmp_path / "out")
    assert {len(ids) for ids in sequences} == {301}
    assert counts["pads"] == sum(int((ids == PAD).sum()) for ids in sequences) < 0.1 * tokens  # best fit
    assert all("block_sums" in line for line in lines)  # so that parts of shards are read and verified


def test_batches_have_the_packed_masks_and_documents(tmp_path: Path, tokenizer: Path) -> None:
    make_data(tmp_path / "out", tokenizer, [write_jsonl(tmp_path / "a.jsonl", random_chats(60))])
    data = DataConfig(dataset_manifest=[str(tmp_path / "out" / "manifest.jsonl")], workers=0, multiple_data_passes=True)
    stored = {tuple(ids.tolist()) for ids in stored_sequences(tmp_path / "out")}
    loader = build_train_loader(data, seq_len=300, vocab_size=300, batch_size=4)
    for batch, _ in loader.batches(3):
        documents = batch.documents(end_of_text_id=257)
        assert documents is not None
        for row, targets, numbers in zip(batch.stored_ids, batch.targets, documents, strict=True):
            ids = row.numpy().view(np.uint32)
            assert tuple(ids.tolist()) in stored
            is_target = (ids[1:] < 1 << 31) & (ids[1:] != PAD)
            assert (targets != IGNORE_INDEX).tolist() == is_target.tolist() and is_target.any()
            starts = np.flatnonzero((ids[:-1] & 1 << 30 != 0) & (ids[:-1] != PAD))
            assert numbers.tolist() == np.searchsorted(starts, np.arange(300), side="right").tolist()


def test_identical_conversations_are_used_once_and_counted(tmp_path: Path, tokenizer: Path) -> None:
    chats = random_chats(20)
    first = write_jsonl(tmp_path / "a.jsonl", [*chats[:15], chats[3]])
    second = write_jsonl(tmp_path / "b.jsonl", [chats[0], *chats[10:]])
    record = make_data(tmp_path / "out", tokenizer, [first, second])
    assert (record["counts"]["duplicates"], record["counts"]["documents"]) == (7, 20)
    assert stored_conversations(tmp_path / "out") == expected_conversations(tokenizer, chats)
    kept = make_data(tmp_path / "kept", tokenizer, [first, second], "--keep-duplicates")
    assert kept["counts"]["documents"] == 27 and "duplicates" not in kept["counts"]


@pytest.mark.parametrize(
    ("policy", "count", "ids"),
    [
        ("drop", {"too_long_dropped": 2}, None),
        ("cut", {"too_long_cut": 1, "too_long_dropped": 1}, 41),
        ("turns", {"too_long_shortened": 1, "too_long_dropped": 1}, 28),
    ],
)
def test_overlong_conversations(
    tmp_path: Path, tokenizer: Path, policy: str, count: dict[str, int], ids: int | None
) -> None:
    long = {"messages": [*CHAT[1:3], {"role": "user", "content": "m" * 40}, {"role": "assistant", "content": "n"}]}
    nothing_fits = {"prompt": "p" * 50, "completion": "c"}
    short = {"prompt": "a", "completion": "b"}
    file = write_jsonl(tmp_path / "a.jsonl", [long, nothing_fits, short])
    counts = make_data(tmp_path / "out", tokenizer, [file], "--overlong", policy, seq_len=40)["counts"]
    assert {name: number for name, number in counts.items() if name.startswith("too_long")} == count
    (_, *longer) = sorted(stored_conversations(tmp_path / "out"), key=lambda item: len(item[0]))
    assert [len(part) for part, _ in longer] == ([] if ids is None else [ids])
    if policy == "turns":
        assert longer[0] == expected_conversations(tokenizer, [{"messages": CHAT[1:3]}])[0]


# --- the shards do not depend on the run -----------------------------------------------------------------------------
def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def test_shards_do_not_depend_on_format_or_interruption(tmp_path: Path, tokenizer: Path) -> None:
    chats = random_chats(80)
    make_data(tmp_path / "whole", tokenizer, [write_jsonl(tmp_path / "a.jsonl", chats)])
    expected = shard_bytes(tmp_path / "whole")
    array = tmp_path / "b.json"
    array.write_text(json.dumps(chats, indent=1))
    make_data(tmp_path / "array", tokenizer, [array], "--num-workers", "1")
    assert shard_bytes(tmp_path / "array") == expected
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(chats), tmp_path / "c.parquet")
    make_data(tmp_path / "table", tokenizer, [tmp_path / "c.parquet"])
    assert shard_bytes(tmp_path / "table") == expected
    # A run that stops at a bad record keeps its work; once it may skip the record, it writes what a new run writes.
    bad = write_jsonl(tmp_path / "bad.jsonl", [*chats, {"text": "no conversation"}])
    with pytest.raises(DataError, match="line 81: unknown form"):
        make_data(tmp_path / "resumed", tokenizer, [bad])
    assert (tmp_path / "resumed" / ".work" / "plan.json").exists()
    make_data(tmp_path / "resumed", tokenizer, [bad], "--skip-bad-lines")
    assert shard_bytes(tmp_path / "resumed") == expected and not (tmp_path / "resumed" / ".work").exists()


def test_finished_data_are_kept_and_other_settings_refused(tmp_path: Path, tokenizer: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", random_chats(5))
    make_data(tmp_path / "out", tokenizer, [file])
    before = (tmp_path / "out" / "manifest.jsonl").stat().st_mtime_ns
    make_data(tmp_path / "out", tokenizer, [file])
    assert (tmp_path / "out" / "manifest.jsonl").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="chat_template was"):
        make_data(tmp_path / "out", tokenizer, [file], "--chat-template", "tulu")


def test_copy_of_the_tokenizer_has_the_template(tmp_path: Path, tokenizer: Path) -> None:
    make_data(tmp_path / "out", tokenizer, [write_jsonl(tmp_path / "a.jsonl", random_chats(5))])
    copy = load_tokenizer(str(tmp_path / "out" / "tokenizer"))
    assert find_template(None, copy).source == find_template("chatml", copy).source
    assert copy.fingerprint == load_tokenizer(str(tokenizer)).fingerprint


def test_hub_data_sets(tmp_path: Path, tokenizer: Path) -> None:
    datasets = pytest.importorskip("datasets")
    chats = random_chats(12)
    datasets.Dataset.from_list(chats).save_to_disk(tmp_path / "saved")
    make_data(tmp_path / "out", tokenizer, [tmp_path / "saved"])
    assert stored_conversations(tmp_path / "out") == expected_conversations(tokenizer, chats)


def test_files_without_records_are_errors(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.txt").write_text("no conversation")
    with pytest.raises(DataError, match="text files hold no conversations"):
        make_data(tmp_path / "out", tokenizer, [tmp_path / "a.txt"])


def test_preview_shows_the_trained_text(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}])
    words = ["--input-files", str(file), "--output-dir", str(tmp_path / "out"), "--tokenizer", str(tokenizer)]
    make_sft([*words, "--chat-template", "chatml", "--preview", "3"])
    assert "<|im_start|>assistant\n[[hello<|im_end|>]]\n" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_vocabulary_that_is_too_small(tmp_path: Path, tokenizer: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}])
    with pytest.raises(DataError, match="id out of range: found the id 259, but the vocabulary has 258 ids"):
        make_data(tmp_path / "out", tokenizer, [file], "--vocab-size", "258")


def test_torch_reads_the_ids(tmp_path: Path, tokenizer: Path) -> None:
    """Inputs hold no flags, whatever the mask."""
    make_data(tmp_path / "out", tokenizer, [write_jsonl(tmp_path / "a.jsonl", random_chats(30))])
    data = DataConfig(train_data=[str(tmp_path / "out")], workers=0)
    loader = build_train_loader(data, seq_len=300, vocab_size=300, batch_size=2)
    (batch,) = (batch for batch, _ in loader.batches(1))
    assert batch.inputs.dtype == torch.int64 and int(batch.inputs.min()) >= 0 and int(batch.inputs.max()) < 300


def test_inspection_reads_ids_with_flags(tmp_path: Path, tokenizer: Path) -> None:
    counts = make_data(tmp_path / "out", tokenizer, [write_jsonl(tmp_path / "a.jsonl", random_chats(30))])["counts"]
    words = [str(tmp_path / "out"), "--verify", "--num-workers", "1", "--samples", "1"]
    report = inspect_shards.inspect(inspect_shards.make_parser().parse_args(words))
    assert report["problems"] == [] and report["total"]["tokens"] == counts["tokens"]
    text = "".join(piece.get("text", "") for piece in report["samples"][0]["pieces"])
    assert "user\n" in text and "assistant\n" in text


def test_data_on_s3_are_read_in_ranges(tmp_path: Path, tokenizer: Path, s3_bucket: str) -> None:
    make_data(tmp_path / "out", tokenizer, [write_jsonl(tmp_path / "a.jsonl", random_chats(40))])
    for name in storage.list_files(str(tmp_path / "out")):
        storage.copy(name, f"s3://{s3_bucket}/sft/{Path(name).name}")
    batches = []
    for manifest in (f"s3://{s3_bucket}/sft/manifest.jsonl", str(tmp_path / "out" / "manifest.jsonl")):
        data = DataConfig(dataset_manifest=[manifest], workers=0, multiple_data_passes=True)
        loader = build_train_loader(data, seq_len=300, vocab_size=300, batch_size=2)
        batches.append([(batch.stored_ids, batch.documents(257)) for batch, _ in loader.batches(4)])
    for remote, local in zip(*batches, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(remote, local, strict=True))
