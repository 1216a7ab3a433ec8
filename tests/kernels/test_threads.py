"""The number of threads of short forward passes: chosen by their work, restored, and left alone on request."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from model_helpers import random_ids, small_model

from open_lm.config.layout import MeshLayout
from open_lm.config.sections import OptimConfig
from open_lm.distributed.precision import get_autocast
from open_lm.distributed.processes import Runtime
from open_lm.generate import Sampling, generate_ids
from open_lm.hf import OpenLMForCausalLM
from open_lm.kernels import threads
from open_lm.kernels.threads import MIN_WORK_PER_THREAD, limit_threads, threads_for_work
from open_lm.model.transformer import Transformer
from open_lm.optim.build import build_optimizer
from open_lm.training.step import StepOptions, train_step

CPU = torch.device("cpu")


@pytest.fixture
def four_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let torch use 4 threads by default, without the variables by which a user chooses them."""
    for name in threads._VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_INITIAL_THREADS", 4)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def used_threads(model: Transformer) -> list[int]:
    """Return the list to which each forward pass of the model appends its number of threads."""
    used: list[int] = []
    model.register_forward_pre_hook(lambda *_: used.append(torch.get_num_threads()))
    return used


def in_block(model: Transformer, num_tokens: int, device: torch.device = CPU) -> int:
    with limit_threads(model, num_tokens, device):
        return torch.get_num_threads()


def test_threads_depend_on_the_work_and_not_on_the_machine() -> None:
    of_work = [threads_for_work(work * MIN_WORK_PER_THREAD, max_threads=8) for work in (0, 1, 2, 5, 8, 1000)]
    assert of_work == [1, 1, 2, 5, 8, 8]
    assert threads_for_work(MIN_WORK_PER_THREAD - 1, max_threads=64) == 1
    assert threads_for_work(1 << 40, max_threads=1) == 1


def test_small_steps_use_one_thread_and_large_ones_all(four_threads: None) -> None:
    model = small_model()
    assert [in_block(model, tokens) for tokens in (1, 16, 1 << 20)] == [1, 1, 4]
    assert torch.get_num_threads() == 4


def test_number_of_threads_is_restored_after_an_error(four_threads: None) -> None:
    with pytest.raises(ValueError, match="stop"), limit_threads(small_model(), 1, CPU):
        raise ValueError("stop")
    assert torch.get_num_threads() == 4


def test_threads_chosen_by_the_user_are_kept(four_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    torch.set_num_threads(3)
    assert in_block(model, 1) == 3
    torch.set_num_threads(4)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert in_block(model, 1) == 4


def test_other_devices_keep_their_threads(four_threads: None) -> None:
    assert in_block(small_model(), 1, torch.device("cuda")) == 4


def test_generation_uses_one_thread_per_step_and_restores_the_number_between_steps(four_threads: None) -> None:
    model = small_model()
    used = used_threads(model)
    between = [torch.get_num_threads() for _ in generate_ids(model, [[1, 2, 3]], Sampling(max_new_tokens=4))]
    assert (used, between) == ([1] * 4, [4] * 4)
    wrapper = OpenLMForCausalLM.from_open_lm(model)
    used.clear()
    wrapper.generate(random_ids(1, 3), max_new_tokens=4, do_sample=False)
    assert used == [1] * 4
    assert torch.get_num_threads() == 4


def test_training_uses_one_thread_for_small_micro_batches(four_threads: None) -> None:
    model = small_model().train()
    used = used_threads(model)
    options = StepOptions(Runtime(), MeshLayout(), get_autocast("fp32"), accum_freq=2)
    ids = random_ids(4, 8)
    train_step(model, ids, ids, build_optimizer(model, OptimConfig()), options)
    assert (used, torch.get_num_threads()) == ([1, 1], 4)


def test_generation_is_identical_with_any_number_of_threads() -> None:
    model = small_model(dim=128, n_layers=3, seq_len=96)
    prompts = [[1, 2, 3], list(range(40))]
    before, results = torch.get_num_threads(), []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        steps = [
            list(generate_ids(model, prompts, Sampling(max_new_tokens=24, temperature=temperature, seed=3)))
            for temperature in (0.0, 0.8)
        ]
        results.append(steps)
    torch.set_num_threads(before)
    assert results[1:] == results[:1] * 2
