"""Context-parallel ranks compute the same losses and gradients as a single rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import context_worker
import pytest
import torch
from model_helpers import random_ids, small_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from open_lm.config.layout import MeshLayout
from open_lm.distributed import context_parallel
from open_lm.distributed.context_parallel import check_sequence_length, context_parallel_mask, shard_sequences
from open_lm.errors import ConfigError
from open_lm.kernels import general_attention


def test_tokens_are_partitioned_and_work_is_balanced() -> None:
    tokens = torch.arange(12)[None]
    shards = [shard_sequences(tokens, MeshLayout(context=3, rank=rank))[0].tolist() for rank in range(3)]
    assert shards == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    num_keys = [sum(position + 1 for position in shard) for shard in shards]  # keys that a rank's queries attend to
    assert len(set(num_keys)) == 1


def test_positions_restart_in_documents_that_begin_on_other_ranks() -> None:
    ids = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1]])
    documents = context_parallel_mask(MeshLayout(context=2, rank=1), 8, torch.device("cpu"), ids)
    assert documents.positions.tolist() == [[2, 3, 4, 0]]
    documents = context_parallel_mask(MeshLayout(context=2, rank=0), 8, torch.device("cpu"))
    assert documents.positions.tolist() == [[0, 1, 6, 7]]


def test_indivisible_lengths_are_rejected() -> None:
    check_sequence_length(12, 3)
    check_sequence_length(63, 1)
    with pytest.raises(ConfigError, match="--context-parallel 4: the model's sequence length 12 is not divisible by 8"):
        check_sequence_length(12, 4)


def test_ranks_communicate_and_attend_in_the_autocast_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the q and k norms return float32."""
    sent = []
    monkeypatch.setattr(context_parallel, "gather_sequences", lambda shard, layout: sent.append(shard.dtype) or shard)
    documents = context_parallel_mask(MeshLayout(), 8, torch.device("cpu"))
    wide = torch.randn(1, 8, 2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert context_parallel._attend(wide, wide, wide.bfloat16(), documents).dtype == torch.bfloat16
    assert sent == [torch.bfloat16]


def test_heads_passed_to_kernels_are_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise CUDA falls back from the fused kernels to one that materializes all scores."""
    strides = []
    kernel = general_attention.F.scaled_dot_product_attention

    def record(*heads: Tensor, **options: Any) -> Tensor:
        strides.extend(x.stride(-1) for x in heads)
        return kernel(*heads, **options)

    monkeypatch.setattr(general_attention.F, "scaled_dot_product_attention", record)
    x = torch.randn(1, 8, 2, 4)
    context_parallel._attend(x, x, x, context_parallel_mask(MeshLayout(), 8, torch.device("cpu")))
    assert strides and set(strides) == {1}


class MaskCounter(TorchDispatchMode):
    """Counts the document masks that are built."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket is torch.ops.aten.tril
        return func(*args, **(kwargs or {}))


def test_document_masks_are_built_once_for_all_layers() -> None:
    model, ids = small_model(), random_ids(2, 8)
    document_ids = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1], [0, 1, 1, 2, 2, 2, 2, 2]])
    with MaskCounter() as counter:
        documents = context_parallel_mask(MeshLayout(), 8, ids.device, document_ids)
        logits = model(ids, attention_mask=documents)[0]
    assert counter.count == 2, "one for each chunk"
    torch.testing.assert_close(logits, model(ids, document_ids=document_ids)[0])


@pytest.mark.processes
def test_losses_and_gradients_equal_those_of_one_process(ranks: Callable[..., object], tmp_path: Path) -> None:
    ranks(3, "context_worker", str(tmp_path / "out.json"))
    results = json.loads((tmp_path / "out.json").read_text())
    assert set(results) == set(context_worker.CASES)
    for name, end_of_text_id in context_worker.CASES.items():
        for key, expected in context_worker.losses_and_gradients(1, end_of_text_id).items():
            assert results[name][key] == pytest.approx(expected, rel=1e-5, abs=1e-5), (name, key)


def test_ranks_of_a_group_drop_other_features(tmp_path: Path, ranks: Callable[..., object]) -> None:
    shape = {"hidden_dim": 16, "n_layers": 1, "n_heads": 2, "seq_len": 32, "vocab_size": 64, "residual_dropout": 0.5}
    (tmp_path / "model.json").write_text(json.dumps({**shape, "post_embed_norm": False, "weight_tying": False}))
    flags = ["--model", "model.json", "--dataset-type", "synthetic", "--train-num-samples", "64", "--epochs", "1"]
    flags += ["--global-batch-size", "2", "--warmup", "1", "--precision", "fp32", "--workers", "0", "--logs", "none"]
    ranks(2, "dropout_worker", str(tmp_path), *flags, "--context-parallel", "2")
    first, second = (json.loads((tmp_path / f"mask_{rank}.json").read_text()) for rank in range(2))
    assert first != second
