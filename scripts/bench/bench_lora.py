"""Compare the memory and speed of adapters (--lora, --qlora) with those of full fine-tuning.

    python scripts/bench/bench_lora.py --model open_lm_160m --precision fp32

Each kind runs in its own process: the model with random weights, AdamW and the trainer's step on the same tokens. The
peak is that of the device's allocator on CUDA, and on a CPU the growth of the resident memory of the process (Linux).
"weights" are the bytes of parameters and buffers, "gradients + state" those of gradients and optimizer state after the
last step; the rest of the peak are activations and temporary tensors.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

KINDS = ("full", "lora", "dora", "qlora")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Train one kind in this process; return its sizes in bytes, tokens per second and last loss."""
    import torch
    from resident_memory import peak_resident_bytes, reset_peak, resident_bytes

    from open_lm.config.sections import ModelConfig, OptimConfig, ParallelConfig
    from open_lm.distributed.precision import get_autocast, parameter_dtype
    from open_lm.distributed.processes import build_layout, init_runtime, shutdown
    from open_lm.model.adapters import add_adapters, reset_magnitudes
    from open_lm.model.initialization import init_weights
    from open_lm.model.transformer import create_model
    from open_lm.optim.build import build_optimizer
    from open_lm.parallel.parallelize import parallelize
    from open_lm.training.step import StepOptions, train_step

    runtime = init_runtime(ParallelConfig())
    is_cuda = runtime.device.type == "cuda"
    if args.kind == "qlora":
        import bitsandbytes.functional  # noqa: F401 - its code is not part of the model's memory
    before = 0 if is_cuda else resident_bytes()
    layout = build_layout(runtime, ParallelConfig())
    with torch.device("meta"):
        model: Any = create_model(ModelConfig(model=args.model))
    if args.kind != "full":
        add_adapters(model, _settings(args), quantize=args.kind == "qlora")
    model = parallelize(
        model,
        layout,
        ParallelConfig(),
        device=runtime.device,
        model_cfg=ModelConfig(activation_checkpointing=args.activation_checkpointing),
        dtype=parameter_dtype(args.precision),
        initialise=lambda module: init_weights(module, 0),
    )
    _fill_quantized(model)
    reset_magnitudes(model)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-4))
    options = StepOptions(runtime, layout, get_autocast(args.precision, runtime.device.type))
    ids = torch.randint(0, model.vocab_size, (args.batch_size, args.seq_len + 1), device=runtime.device)
    if not is_cuda:
        reset_peak()
    seconds, loss = float("inf"), 0.0
    for _ in range(args.steps + 1):
        start = time.perf_counter()
        result = train_step(model, ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), optimizer, options)
        loss = float(result.values["loss"])
        seconds = min(seconds, time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if is_cuda else peak_resident_bytes() - before
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    moments = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    sizes = {
        "weights": sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        "state": sum(p.grad.nbytes for p in trained if p.grad is not None) + sum(value.nbytes for value in moments),
    }
    shutdown(runtime)
    return {
        "trained": sum(p.numel() for p in trained),
        "peak": peak,
        **sizes,
        "tokens_per_s": ids[:, 1:].numel() / seconds,
        "loss": loss,
    }


def _settings(args: argparse.Namespace) -> Any:
    from open_lm.config.adapters import parse_lora

    return parse_lora(f"{args.lora},dora=true" if args.kind == "dora" else args.lora)


def _fill_quantized(model: Any) -> None:
    """Quantize random weights, one layer at a time, as loading a checkpoint does."""
    import torch

    from open_lm.model.quantization import quantized_layers

    for layer in quantized_layers(model).values():
        layer.set_weight(torch.randn(layer.out_features, layer.in_features) * layer.in_features**-0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="open_lm_160m", help="name of a model configuration")
    add("--lora", default="r=16,targets=all-linear", help="settings of the adapters, as for --lora of the trainer")
    add("--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="what to compare")
    add("--precision", default="fp32", help="--precision of the trainer")
    add("--activation-checkpointing", default="none", help="--activation-checkpointing of the trainer")
    add("--seq-len", type=int, default=512, help="tokens of a sequence")
    add("--batch-size", type=int, default=1, help="sequences of a step")
    add("--steps", type=int, default=2, help="measured steps, after one for warmup")
    add("--kind", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kind is not None:
        print(json.dumps(measure(args), allow_nan=False))
        return
    print(f"{args.model}, {args.batch_size} x {args.seq_len} tokens, {args.precision}, {args.lora}")
    columns = ("trained parameters", "peak GB", "weights GB", "gradients + state GB", "tokens/s")
    print(f"{'kind':<8}" + "".join(f"{name:>22}" for name in columns))
    for kind in args.kinds:
        command = [sys.executable, __file__, *sys.argv[1:], "--kind", kind]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found = json.loads(output.rstrip("\n").rpartition("\n")[2])
        sizes = (f"{found[key] / 1e9:.3f}" for key in ("peak", "weights", "state"))
        cells = (f"{found['trained']:,}", *sizes, f"{found['tokens_per_s']:.0f}")
        print(f"{kind:<8}" + "".join(f"{cell:>22}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
