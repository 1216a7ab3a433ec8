"""Compare the training speed of a native model with that of transformers (--hf-model), for the same weights.

    python scripts/bench_families.py --family llama --precision fp32 amp_bfloat16

Both train a random model of the family with AdamW on the same tokens: forward pass, loss, backward pass and update,
through the trainer's step and optimizer. Steps alternate, so that other load on the machine affects both; the speed is
that of the fastest step. --clock cpu divides by the CPU time of the process instead of the elapsed time, for a machine
with other load. The difference is that of the losses of the last step.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from open_lm.config.sections import ParallelConfig
from open_lm.distributed.precision import get_autocast
from open_lm.distributed.processes import build_layout, init_runtime, shutdown
from open_lm.hf.families import FAMILIES, architecture, tensor_sources
from open_lm.hf.trainable import HFParams, TrainableHFModel
from open_lm.kernels.cpu_memory import keep_freed_memory
from open_lm.model.params import Params
from open_lm.model.transformer import Transformer
from open_lm.optim.adamw import AdamW
from open_lm.training.step import StepOptions, train_step

SHAPE: dict[str, Any] = {
    **{"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4},
    **{"intermediate_size": 704, "vocab_size": 32000, "max_position_embeddings": 4096},
    **{"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2},
}


def build_models(family: str, seq_len: int, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Return the native model and the model of transformers, with equal weights."""
    config = AutoConfig.for_model(family, **SHAPE)
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config)
    keys = architecture(config.to_dict())
    native = Transformer(Params(dim=keys.pop("hidden_dim"), apply_qk_norm=keys.pop("qk_norm", False), **keys))
    weights = hf.state_dict()
    sources = tensor_sources(config.to_dict(), [name for name, _ in native.named_parameters()])
    with torch.no_grad():
        for name, parameter in native.named_parameters():
            parameter.copy_(sources[name].pack([weights[part] for part in sources[name].names]))
    params = HFParams(config.hidden_size, config.num_hidden_layers, config.vocab_size, seq_len, family)
    return native.to(device), TrainableHFModel(hf, params).to(device)


def stepper(model: nn.Module, options: StepOptions, ids: Tensor) -> Callable[[], float]:
    """Return a function that trains one step on ids (B,T+1) and returns the loss."""
    optimizer = AdamW(model.train().parameters(), lr=1e-5, fused=True)

    def step() -> float:
        result: Any = train_step(model, ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), optimizer, options)
        return float(result.values["loss"])

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    families = sorted(name for name, family in FAMILIES.items() if not family.experts)
    parser.add_argument("--family", default="llama", choices=families, help="model_type of transformers")
    parser.add_argument("--precision", nargs="+", default=["fp32", "amp_bfloat16"], help="one or more --precision")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--batch-size", type=int, default=2, help="sequences of a step")
    parser.add_argument("--steps", type=int, default=5, help="steps of each model, after one for warmup")
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"), help="time to divide by")
    args = parser.parse_args()
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    keep_freed_memory()
    runtime = init_runtime(ParallelConfig())
    layout = build_layout(runtime, ParallelConfig())
    tokens = args.batch_size * args.seq_len
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(SHAPE["vocab_size"], (args.batch_size, args.seq_len + 1), generator=generator)
    setting = f"{args.batch_size} x {args.seq_len} tokens per step, {torch.get_num_threads()} threads, {runtime.device}"
    print(f"{args.family}, {setting}, tokens per second of {args.clock} time")
    print(f"{'precision':<14}{'native':>12}{'transformers':>14}{'ratio':>8}{'difference':>12}")
    for precision in args.precision:
        options = StepOptions(runtime, layout, get_autocast(precision), accum_freq=1)
        models = build_models(args.family, args.seq_len, runtime.device)
        steps = [stepper(model, options, ids.to(runtime.device)) for model in models]
        fastest, losses = [float("inf")] * 2, [0.0] * 2
        for number in range(args.steps + 1):
            for index, step in enumerate(steps):
                start = clock()
                losses[index] = step()
                seconds = clock() - start
                if number:
                    fastest[index] = min(fastest[index], seconds)
        native, reference = (tokens / seconds for seconds in fastest)
        difference = abs(losses[0] - losses[1])
        print(f"{precision:<14}{native:>12.0f}{reference:>14.0f}{native / reference:>8.2f}{difference:>12.1e}")
    shutdown(runtime)


if __name__ == "__main__":
    main()
