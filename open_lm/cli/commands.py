"""The subcommands of `open-lm`. Each runs a module that `python -m` runs as well."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        module: module (or package with `__main__`) below open_lm; its `main(argv)` reads the arguments.
        help: one line for the list of commands.
        also: another command whose flags it accepts in addition to its own.
        wraps: whether another command and its arguments follow its own flags.
    """

    name: str
    module: str
    help: str
    also: str | None = None
    wraps: bool = False

    @property
    def full_module(self) -> str:
        return f"open_lm.{self.module}"


GROUPS: dict[str, tuple[Command, ...]] = {
    "data": (
        Command("preprocess", "datapreprocess.make_2048", "tokenize, shuffle and pack raw text into shards"),
        Command("preprocess-ray", "datapreprocess.ray.tokenize_shuffle", "the same with the flags for Ray clusters"),
        Command("preprocess-sft", "datapreprocess.make_sft", "render and tokenize conversations for fine-tuning"),
        Command("inspect", "utils.inspect_shards", "summarize, show and verify shards, manifests and data sets"),
        Command("manifest", "utils.make_wds_manifest", "write the manifest of a folder of shards"),
    ),
    "training": (
        Command("plan", "plan", "predict memory, time, disk space and cost of a run, and print its command", "train"),
        Command("train", "main", "train a model, or compute its validation loss, in this process"),
        Command("launch", "cli.launch", "run `train` or another program on several devices or machines", wraps=True),
        Command("scaling", "scaling", "train ladders of models and predict larger ones from them"),
    ),
    "fine-tuning": (
        Command("dpo", "finetune.dpo", "train on preferences (DPO)"),
        Command("grpo", "finetune.grpo", "train with verifiable rewards (GRPO)"),
        Command("cache-teacher", "finetune.cache_teacher", "store a teacher's distributions for distillation"),
        Command("prune", "finetune.prune", "make a smaller student model from a teacher"),
        Command("merge", "finetune.merge", "merge LoRA adapters into their model"),
    ),
    "evaluation and use": (
        Command("evaluate", "evaluate.command", "evaluate checkpoints on in-context-learning tasks"),
        Command("download-tasks", "evaluate.icl.download", "download the data of evaluation tasks"),
        Command("compare", "evaluate.compare", "compare evaluation results, with tests of the differences"),
        Command("export-results", "evaluate.export", "write evaluation results in the formats of other programs"),
        Command("generate", "cli.generate", "continue prompts"),
        Command("chat", "cli.chat", "chat with a fine-tuned model in a terminal or a browser"),
    ),
    "checkpoints and releases": (
        Command("convert", "cli.convert", "convert models from and to the format of transformers"),
        Command("convert-checkpoint", "utils.convert_checkpoint", "write a sharded checkpoint as epoch_N.pt files"),
        Command("report", "report", "write the report of one or several runs as one HTML file"),
        Command("release", "release", "build, verify and rate an open release of a run"),
    ),
    "this program": (
        Command("doctor", "cli.doctor", "check packages, devices, kernels, disks and network of this machine"),
        Command("completion", "cli.completion", "print the shell's completion of open-lm for bash, zsh or fish"),
    ),
}

COMMANDS = {command.name: command for commands in GROUPS.values() for command in commands}
