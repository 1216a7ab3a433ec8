#!/usr/bin/env python
"""Compare the speed of text generation with that of transformers' generate() on the same weights.

    python scripts/bench_generate.py --model open_lm_11m --batch-size 1 16 --busy 0 1

The model has the shape of --model and the norm and position embedding of Llama, so that a Llama of transformers with
the same weights gives the same tokens (greedy decoding with a KV cache). Rounds of the two alternate, so that other
load on the machine affects both. For each number of busy processes next to it, prints the tokens per second of all
sequences (median and maximum of the rounds), the process's CPU milliseconds per step, and the machine's load average.
Threads are those of a user who sets none: transformers uses torch's default, and we choose them by the work of a step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from open_lm.config.sections import ModelConfig
from open_lm.generate import Sampling, generate_ids
from open_lm.model.transformer import Transformer, create_model
from open_lm.system.names import user_path

Generate = Callable[[list[list[int]], int], list[list[int]]]  # prompts and number of new tokens -> new tokens

# The process ends with its parent, even if that is killed.
BUSY_LOOP = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    pass"


@dataclass(frozen=True)
class Round:
    """One generation: wall and CPU seconds of this process, of all its threads."""

    seconds: float
    cpu_seconds: float


def llama_twin(model: Transformer) -> Any:
    """Return a Llama of transformers with the weights of a model with rms_norm, rotary positions and SwiGLU."""
    params, weights = model.params, model.state_dict()
    config = LlamaConfig(
        vocab_size=params.vocab_size,
        hidden_size=params.dim,
        intermediate_size=weights["layers.0.feed_forward.w3.weight"].shape[1],
        num_hidden_layers=params.n_layers,
        num_attention_heads=params.n_heads,
        max_position_embeddings=params.seq_len,
        rms_norm_eps=params.norm_eps,
        bos_token_id=None,
        eos_token_id=None,
    )
    twin = LlamaForCausalLM(config).eval()
    named = {
        "model.embed_tokens": weights["tok_embeddings.weight"],
        "model.norm": weights["norm.weight"],
        "lm_head": weights["output.weight"],
    }
    for layer in range(params.n_layers):
        source, target = f"layers.{layer}", f"model.layers.{layer}"
        projections = weights[f"{source}.attention.in_proj.weight"].chunk(3)
        named |= {f"{target}.self_attn.{n}_proj": w for n, w in zip("qkv", projections, strict=True)}
        gate_up = weights[f"{source}.feed_forward.w12.weight"].chunk(2)
        named |= {f"{target}.mlp.{n}_proj": w for n, w in zip(("gate", "up"), gate_up, strict=True)}
        named[f"{target}.self_attn.o_proj"] = weights[f"{source}.attention.out_proj.weight"]
        named[f"{target}.mlp.down_proj"] = weights[f"{source}.feed_forward.w3.weight"]
        named[f"{target}.input_layernorm"] = weights[f"{source}.attention_norm.weight"]
        named[f"{target}.post_attention_layernorm"] = weights[f"{source}.ffn_norm.weight"]
    twin.load_state_dict({f"{name}.weight": weight for name, weight in named.items()})
    return twin


def contenders(name: str) -> dict[str, Generate]:
    """Return our generation and that of transformers, for the shape of a model configuration."""
    torch.manual_seed(0)
    cfg = ModelConfig(model=name, model_norm="rms_norm", positional_embedding_type="rotary", ffn_type="swiglu")
    model = create_model(cfg).eval()
    twin = llama_twin(model)

    def ours(prompts: list[list[int]], count: int) -> list[list[int]]:
        steps = generate_ids(model, prompts, Sampling(max_new_tokens=count, temperature=0))
        return [[token for token in row if token is not None] for row in zip(*steps, strict=True)]

    @torch.no_grad()
    def theirs(prompts: list[list[int]], count: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        out = twin.generate(ids, attention_mask=torch.ones_like(ids), **options)
        new_tokens: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return new_tokens

    return {"open_lm": ours, "transformers": theirs}


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keep `count` other processes busy during the `with` block."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY_LOOP]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(
    generators: dict[str, Generate], prompts: list[list[int]], count: int, rounds: int
) -> dict[str, list[Round]]:
    """Return the rounds of each contender, which alternate, after one warm-up each.

    Raises:
        RuntimeError: the contenders gave different tokens.
    """
    tokens = {name: generate(prompts, count) for name, generate in generators.items()}
    if len({str(result) for result in tokens.values()}) > 1:
        raise RuntimeError(f"{' and '.join(tokens)} gave different tokens; the weights must be equal")
    measured: dict[str, list[Round]] = {name: [] for name in generators}
    for _ in range(rounds):
        for name, generate in generators.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            generate(prompts, count)
            measured[name].append(Round(time.perf_counter() - start, time.process_time() - cpu_start))
    return measured


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=user_path, default="open_lm_11m", help="name or .json file that gives the shape"
    )
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1], help="numbers of busy processes next to it")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    generators = contenders(args.model)
    print(f"{args.model}, float32, {args.new_tokens} tokens after {args.prompt_tokens}, torch {torch.__version__}")
    print(f"{os.cpu_count()} CPUs, {torch.get_num_threads()} threads by default; the load includes this program's")
    print(f"{'batch':>5}{'busy':>6}{'load':>7}  {'':14}{'tokens/s':>9}{'max':>9}{'CPU ms/step':>13}")
    for batch_size in args.batch_size:
        generator = torch.Generator().manual_seed(batch_size)
        prompts = torch.randint(0, 256, (batch_size, args.prompt_tokens), generator=generator).tolist()
        for busy in args.busy:
            with busy_processes(busy):
                measured = measure(generators, prompts, args.new_tokens, args.rounds)
            for name, rounds in measured.items():
                rates = [batch_size * args.new_tokens / r.seconds for r in rounds]
                cpu_ms = statistics.median(r.cpu_seconds for r in rounds) / args.new_tokens * 1e3
                print(
                    f"{batch_size:5}{busy:6}{os.getloadavg()[0]:7.1f}  {name:14}{statistics.median(rates):9.1f}"
                    f"{max(rates):9.1f}{cpu_ms:13.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
