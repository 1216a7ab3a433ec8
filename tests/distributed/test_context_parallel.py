"""Rows shared by several ranks give what one rank computes."""

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
from open_lm.distributed.context_parallel import check_sequence_length, local_shard, context_parallel_documents
from open_lm.errors import ConfigError


def test_every_token_is_one_ranks_and_work_is_even() -> None:
    parts = [local_shard(torch.arange(12)[None], MeshLayout(context=3, rank=rank))[0].tolist() for rank in range(3)]
    assert parts == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    seen = [sum(position + 1 for position in part) for part in parts]  # keys that a rank's queries attend to
    assert len(set(seen)) == 1


def test_positions_start_anew_in_documents_that_other_ranks_began() -> None:
    ids = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1]])
    documents = context_parallel_documents(MeshLayout(context=2, rank=1), 8, torch.device("cpu"), ids)
    assert documents.positions.tolist() == [[2, 3, 4, 0]]
    assert context_parallel_documents(MeshLayout(context=2, rank=0), 8, torch.device("cpu")).positions.tolist() == [[0, 1, 6, 7]]


def test_lengths_that_do_not_divide_are_refused() -> None:
    check_sequence_length(12, 3)
    with pytest.raises(
        ConfigError, match="--context-parallel 4: the model's sequences of 12 tokens do not divide into 8"
    ):
        check_sequence_length(12, 4)


def test_ranks_exchange_and_attend_in_the_type_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where norms have made queries and keys float32."""
    sent = []
    monkeypatch.setattr(context_parallel, "whole_rows", lambda part, layout: sent.append(part.dtype) or part)
    documents = context_parallel_documents(MeshLayout(), 8, torch.device("cpu"))
    wide = torch.randn(1, 8, 2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert context_parallel._attend(wide, wide, wide.bfloat16(), documents).dtype == torch.bfloat16
    assert sent == [torch.bfloat16]


def test_heads_reach_the_kernels_without_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else CUDA's fused kernels leave them to one that holds all scores."""
    strides = []
    kernel = context_parallel.F.scaled_dot_product_attention

    def look(*heads: Tensor, **options: Any) -> Tensor:
        strides.extend(x.stride(-1) for x in heads)
        return kernel(*heads, **options)

    monkeypatch.setattr(context_parallel.F, "scaled_dot_product_attention", look)
    x = torch.randn(1, 8, 2, 4)
    context_parallel._attend(x, x, x, context_parallel_documents(MeshLayout(), 8, torch.device("cpu")))
    assert strides and set(strides) == {1}


class Masks(TorchDispatchMode):
    """Counts the masks of documents that are made."""

    made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made += func.overloadpacket is torch.ops.aten.tril
        return func(*args, **(kwargs or {}))


def test_masks_of_documents_are_made_once_for_all_layers() -> None:
    model, ids = small_model(), random_ids(2, 8)
    document_ids = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1], [0, 1, 1, 2, 2, 2, 2, 2]])
    with Masks() as masks:
        documents = context_parallel_documents(MeshLayout(), 8, ids.device, document_ids)
        found = model(ids, attention_mask=documents)[0]
    assert masks.made == 2, "one for each chunk"
    torch.testing.assert_close(found, model(ids, document_ids=document_ids)[0])


def test_losses_and_gradients_equal_those_of_one_process(
    torchrun: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(context_worker.__file__).parent))
    torchrun(3, "context_worker", str(tmp_path / "out.json"))
    found = json.loads((tmp_path / "out.json").read_text())
    assert set(found) == set(context_worker.CASES)
    for name, end_of_text_id in context_worker.CASES.items():
        for what, wanted in context_worker.numbers(1, end_of_text_id).items():
            assert found[name][what] == pytest.approx(wanted, rel=1e-5, abs=1e-5), (name, what)
