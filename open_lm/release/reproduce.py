"""Write reproduce.sh, which goes from raw text to the same weights and compares their SHA-256."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from open_lm import storage
from open_lm.release import layout
from open_lm.release.datasets import DataFolder
from open_lm.release.run_facts import RunFacts
from open_lm.release.weights import sha256_of, weight_files
from open_lm.storage.strict_json import to_json
from open_lm.system.names import split_joined

RAW_FILES, RAW_HASHES = "raw_files.txt", "raw_files.sha256"
MIXTURE = "mixture.yaml"  # the raw files of each source, and how often they are used
_RUN_NAME = "reproduction"
# Sections and flags that do not change the weights, or that reproduce.sh sets itself.
_OTHER_SECTIONS = frozenset({"checkpoint", "logging", "validation", "live_evaluation"})
_OTHER_FLAGS = frozenset({
    "config", "recipe", "name", "debug", "train_data", "dataset_manifest", "batch_size", "workers", "cache_dir",
    "cache_limit", "read_timeout", "allow_changed_data", "allow_other_tokenizer", "model", "dist_url", "dist_timeout",
    "no_set_device_rank", "preset_world_size", "hang_timeout",
})  # fmt: skip
# Flags that need weights from outside of the run.
_OTHER_WEIGHTS = ("pretrained", "average", "distill_model", "distill_pretrained", "distill_cache", "hf_model")


@dataclass(frozen=True)
class Preprocessing:
    """The command that makes a folder of shards from raw files.

    Attributes:
        module: to run with `python -m`.
        flags: without inputs, output and tokenizer.
        shards: folder of the shards below the output folder.
        input_flag, output_flag: flags of the list of inputs and of the output folder.
        inputs: name of the file that lists the raw files, in the folder of the data set.
    """

    module: str
    flags: tuple[str, ...]
    shards: str
    input_flag: str
    output_flag: str
    inputs: str = RAW_FILES

    def input_words(self, folder: str) -> str:
        """Return the flag of the inputs and its value; `folder`, that of the data set, is a word of the shell."""
        return f"{self.input_flag} {'@' if self.inputs == RAW_FILES else ''}{folder}/{self.inputs}"


def obstacles(facts: RunFacts, folders: Sequence[DataFolder]) -> list[str]:
    """Return the reasons why reproduce.sh cannot train the run again; empty if it can."""
    reasons = []
    for name in _OTHER_WEIGHTS:
        value = facts.params.get(name, "None")
        if value not in ("None", ""):
            reasons.append(f"--{name.replace('_', '-')}: the run started from other weights or used them")
    resume, own = facts.params.get("resume", "None"), f"/{facts.params.get('name')}/checkpoints/"
    if resume not in ("None", "latest", "") and own not in f"/{resume}":  # a resumed run names its own checkpoint
        reasons.append("--resume: the run started from the checkpoint of another run")
    if not folders:
        reasons.append("data: the run has no data.json, so its training data are unknown")
    for folder in folders:
        if not folder.included and (reason := raw_obstacle(folder)):
            reasons.append(f"data set {folder.number}: {reason}")
    return reasons


def raw_obstacle(folder: DataFolder) -> str | None:
    """Return why the shards of a folder cannot be made from raw text; None if they can."""
    if folder.record is None:
        return "its folder has no readable dataset.json, which records how the shards were made"
    settings, inputs = folder.record["settings"], folder.record.get("inputs") or ()
    reasons = {
        "the run tokenized its raw text itself (--train-text), which this script cannot do again; train on shards that "
        "open-lm preprocess writes":
            settings.get("raw_text"),
        "it was made by another command than make_2048 and tokenize_shuffle, or with --output-per-source":
            settings.get("loss_mask") or settings.get("per_source"),
        "its dataset.json does not say to which source each raw file belongs":
            _has_sources(folder.record) and not all("source" in item for item in inputs),
        "it leaves out a source (factor 0), whose files dataset.json does not list":
            not all(_factors(folder.record).values()),
        "its dataset.json has no checksums of the raw files": not folder.has_hashes_of_inputs,
        "it has no manifest.jsonl, with which rebuilt shards could be compared": not folder.has_manifest,
    }  # fmt: skip
    return next((reason for reason, holds in reasons.items() if holds), None)


def _has_sources(record: Mapping[str, Any]) -> bool:
    sampling = record["settings"].get("sampling") or {}
    return any(sampling.get(key) for key in ("markers", "files"))


def _factors(record: Mapping[str, Any]) -> Mapping[str, float]:
    """Return how often a mixture uses the documents of each source; 1 for other sources."""
    return (record["settings"].get("sampling") or {}).get("factors") or {}


def preprocessing(folder: DataFolder) -> Preprocessing:
    """Return the command that made a folder, from its dataset.json; `raw_obstacle` is None for it."""
    assert folder.record is not None
    settings = folder.record["settings"]
    names = list(settings["folders"])
    is_single = names == [""]  # the layout of tokenize_shuffle
    flags = ["--seqlen", str(settings["seq_len"]), "--seed", str(settings["seed"]), "--format", settings["format"],
             "--content-key", str(settings["content_key"]), "--vocab-size", str(settings["vocab_size"])]  # fmt: skip
    if settings["separator"] is not None:
        flags += ["--separator", settings["separator"].encode("unicode_escape").decode("ascii")]
    switches = {"split_documents": "--split-documents", "drop_tail": "--drop-tail"}
    flags += [flag for key, flag in switches.items() if settings[key]]
    flags += [] if settings["shuffle"] else ["--no-shuffle"]
    flags += ["--add-bos"] if settings.get("bos_id") is not None else []
    if settings.get("special_tokens_in_text") == "ids":
        flags.append("--allow-special-tokens-in-text")
    size = settings["shard_sequences"]
    mixture = ("--mixture", MIXTURE) if _has_sources(folder.record) else None
    if is_single:
        flags += ["--wds_chunk_size", str(size)]
        module = "open_lm.datapreprocess.ray.tokenize_shuffle"
        input_flag, inputs = mixture or ("--input", RAW_FILES)
        return Preprocessing(module, tuple(flags), "", input_flag, "--output", inputs)
    flags += ["--num-consumers", str(len(names))] + ([] if size is None else ["--shard-size", str(size)])
    place = PurePosixPath(folder.location).name
    shards = f"{settings['seq_len']}-v1/{place if place in names else names[0]}"
    input_flag, inputs = mixture or ("--input-files", RAW_FILES)
    module = "open_lm.datapreprocess.make_2048"
    return Preprocessing(module, tuple(flags), shards, input_flag, "--output-dir", inputs)


def training_settings(facts: RunFacts) -> dict[str, Any]:
    """Return the flags that determine the weights and differ from their defaults, for --config."""
    from open_lm.config.sections import sections

    values: dict[str, Any] = {}
    for section, config in sections().items():
        for spec in config.specs():
            is_other = section in _OTHER_SECTIONS or spec.name in _OTHER_FLAGS or spec.no_effect
            if is_other or spec.name not in facts.params:
                continue
            value = facts.setting(spec.name)
            if value != spec.default and value is not None:
                values[spec.name] = value
    if facts.setting("train_num_samples") is not None:  # params.txt counts sequences, the flag tokens
        values["train_num_samples"] = facts.setting("train_num_samples") * int(facts.params["seq_len"])
    return values


# ------------------------------------------------------------------------------------------------------------ script
def write_reproduce(facts: RunFacts, folders: Sequence[DataFolder], code: Mapping[str, Any], bundle: Path) -> list[str]:
    """Write reproduce.sh and its files; return the reasons why the run cannot be reproduced, without writing it then.

    Args:
        code: content of code/contents.json.
    """
    reasons = obstacles(facts, folders)
    if reasons:
        return reasons
    storage.write_text(bundle / layout.TRAINING_SETTINGS, to_json(training_settings(facts), indent=2) + "\n")
    from_raw = [folder for folder in folders if raw_obstacle(folder) is None]
    root = _common_folder([str(item["url"]) for folder in from_raw for item in (folder.record or {})["inputs"]])
    for folder in from_raw:
        _write_raw_lists(folder, root, bundle / folder.place)
    script = bundle / layout.REPRODUCE
    storage.write_text(script, _script(facts, folders, from_raw, code, bundle))
    script.chmod(0o755)
    return []


def _common_folder(urls: Sequence[str]) -> str:
    """Return the longest folder that contains all files, with a "/" at its end; "" without one."""
    parts = [url.split("/")[:-1] for url in urls]
    common = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    return "/".join(common) + "/" if common else ""


def _write_raw_lists(folder: DataFolder, root: str, target: Path) -> None:
    """Write the names of the raw files relative to `root`, and the checksums of those that were read in one piece."""
    assert folder.record is not None
    inputs = folder.record["inputs"]
    names = [item["url"].removeprefix(root) for item in inputs]
    hashes = [f"{item['sha256']}  {name}" for item, name in zip(inputs, names, strict=True) if "sha256" in item]
    storage.write_text(target / RAW_FILES, "".join(f"{name}\n" for name in names))
    if hashes:
        storage.write_text(target / RAW_HASHES, "".join(f"{line}\n" for line in hashes))
    if _has_sources(folder.record):
        storage.write_text(target / MIXTURE, _mixture(folder.record, names))


def _mixture(record: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return a mixture for --mixture, with the raw files of each source."""
    files: dict[str, list[str]] = {}
    for item, name in zip(record["inputs"], names, strict=True):
        files.setdefault(item["source"], []).append(name)
    sources = [{"source": source, "inputs": files[source]} for source in sorted(files)]
    factors = {source: factor for source, factor in _factors(record).items() if source in files}
    content = {"sources": sources, **({"sampling_frequencies": factors} if factors else {})}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _script(
    facts: RunFacts,
    folders: Sequence[DataFolder],
    from_raw: Sequence[DataFolder],
    code: Mapping[str, Any],
    bundle: Path,
) -> str:
    hashes = [f"{sha256_of(path)}  {path.name}" for path in weight_files(bundle / layout.FINAL_WEIGHTS)]
    device = "cuda" if facts.params.get("device", "cpu").startswith("cuda") else "cpu"
    world_size = int(facts.params.get("world_size", "1"))
    launcher = '"$python" -m'
    if world_size > 1:
        launcher = f'"$python" -m open_lm.utils.torchrun --standalone --nproc-per-node {world_size} -m'
    data = [line for folder in folders for line in _data_lines(folder, folder in from_raw, bundle)]
    model = f"{layout.METADATA}/model.json"
    model = model if (bundle / model).exists() else f"{layout.FINAL_WEIGHTS}/model.json"
    return _TEMPLATE.format(
        name=_one_line(facts.name),
        processes="one process" if world_size == 1 else f"{world_size} processes",
        device=device,
        raw="" if from_raw else " (not used: the shards are in the bundle)",
        needs_raw="true" if from_raw else "false",
        archive=layout.ARCHIVE,
        top=shlex.quote(str(code["top_folder"])),
        requirements=layout.REQUIREMENTS,
        data="\n".join(data),
        launcher=launcher,
        settings=layout.TRAINING_SETTINGS,
        model=model,
        data_flags=_data_flags(facts, folders, from_raw),
        run=_RUN_NAME,
        hashes="\n".join(hashes),
    )


def _one_line(text: str) -> str:
    """Return a text for a comment of the script."""
    return " ".join(re.sub(r"[^\w .,:+\-]", "_", text).split())


def _data_lines(folder: DataFolder, is_from_raw: bool, bundle: Path) -> list[str]:
    if not is_from_raw:
        return [f'echo "data set {folder.number}: shards of the bundle"']
    command = preprocessing(folder)
    tokenizer = f"{folder.place}/tokenizer"
    tokenizer = tokenizer if (bundle / tokenizer).is_dir() else f"{layout.METADATA}/tokenizer"
    place, shards = folder.place, f'"$work"/{folder.place}/{shlex.quote(command.shards)}'
    lists = f'"$bundle"/{place}'
    checks = [f'(cd "$raw" && check_sha256 {lists}/{RAW_HASHES})'] if (bundle / place / RAW_HASHES).exists() else []
    return [
        f'echo "data set {folder.number}: checking raw files, then making the shards"',
        *checks,
        f'(cd "$raw" && "$python" -m {command.module} {shlex.join(command.flags)} \\',
        f'    {command.input_words(lists)} {command.output_flag} "$work"/{place} \\',
        f'    --tokenizer "$bundle"/{tokenizer})',
        f"same_file {lists}/manifest.jsonl {shards}/manifest.jsonl",
    ]


def _data_flags(facts: RunFacts, folders: Sequence[DataFolder], from_raw: Sequence[DataFolder]) -> str:
    """Return --dataset-manifest or --train-data with the rebuilt folders in place of the original ones."""

    def place(folder: DataFolder) -> str:  # as a word of the shell
        if folder not in from_raw:
            return f'"$bundle"/{folder.place}'
        return f'"$work"/{shlex.quote(f"{folder.place}/{preprocessing(folder).shards}".rstrip("/"))}'

    flag = "train_data" if facts.setting("train_data") else "dataset_manifest"
    places = {folder.location: place(folder) for folder in folders}
    names = dict.fromkeys(str(folder.source["name"]) for folder in folders)
    return f"--{flag.replace('_', '-')} {' '.join(_moved(name, places) for name in names)}"


def _moved(name: str, places: Mapping[str, str]) -> str:
    """Return a manifest or a pattern as a word of the shell, with the new places of its folders."""
    words = []
    for part in [name] if name.endswith(".jsonl") else split_joined(name):
        folder, _, file = part.rpartition("/")
        words.append(f"{places[folder or '.']}/{shlex.quote(file)}")
    return "::".join(words)


_TEMPLATE = """#!/usr/bin/env bash
# Train {name} again, from raw text to the weights, and compare the SHA-256 of the weights with those of this bundle.
#
#     ./reproduce.sh --raw DIR [--work DIR] [--python PYTHON]
#
# --raw DIR      folder with the raw files, under the names in data/*/raw_files.txt{raw}
# --work DIR     folder for code, shards, logs and weights (default: reproduction, next to the bundle)
# --python FILE  interpreter of an environment with the packages of {requirements} (default: python3)
#
# Needs {processes} on a device of the kind "{device}". Another kind of device, another version of torch or, on a CPU,
# another number of threads (OMP_NUM_THREADS) may round differently and give other weights. A finished stage is not
# repeated; an interrupted training continues.
set -euo pipefail
unset CDPATH

bundle=$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)
raw="" work="$bundle/../reproduction" python=python3
while [ $# -gt 0 ]; do
    case "$1" in
        --raw | --work | --python)
            [ $# -gt 1 ] || {{ echo "$1: expected a value" >&2; exit 2; }}
            declare "${{1#--}}=$2"
            shift 2 ;;
        *) echo "$1: expected --raw DIR, --work DIR or --python PYTHON" >&2; exit 2 ;;
    esac
done
if {needs_raw} && [ ! -d "$raw" ]; then
    echo "--raw: found no folder \\"$raw\\"; expected the folder with the files of data/*/raw_files.txt" >&2
    exit 2
fi
if ! python=$(command -v -- "$python"); then
    echo "--python: found no such program; expected the Python of an environment with {requirements}" >&2
    exit 2
fi
case "$python" in /*) ;; *) python=$PWD/$python ;; esac # the commands below run in other folders
"$python" - "$bundle/{requirements}" << 'END' || exit 2
import sys
if sys.version_info < (3, 10):
    sys.exit("--python: %s is Python %s, expected 3.10 or newer" % (sys.executable, sys.version.split()[0]))
import importlib.metadata
for line in open(sys.argv[1], encoding="utf-8"):
    name, _, version = line.strip().partition("==")
    if name in ("torch", "numpy", "tokenizers", "fastokens"):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name in ("torch", "numpy"):
                sys.exit(f"--python: {{sys.executable}} has no {{name}}; install the packages of {{sys.argv[1]}}")
            found = "none"
        if found != version:
            print(f"warning: {{name}} {{found}} is installed, the run used {{version}}; the weights may differ")
END
mkdir -p "$work"
work=$(cd "$work" && pwd)
[ -z "$raw" ] || raw=$(cd "$raw" && pwd)

sha256() {{ if command -v sha256sum > /dev/null; then sha256sum "$@"; else shasum -a 256 "$@"; fi; }}
check_sha256() {{ sha256 -c "$1" > "$work/checked.txt" || {{ cat "$work/checked.txt" >&2; return 1; }}; }}
same_file() {{ cmp -s "$1" "$2" || {{ echo "$2: differs from $1, so the shards are other ones" >&2; exit 1; }}; }}

[ -d "$work/code/"{top} ] || {{ mkdir -p "$work/code" && tar -xzf "$bundle/{archive}" -C "$work/code"; }}
export PYTHONPATH="$work/code/"{top} PYTHONSAFEPATH=1 # no modules from the current folder

{data}

cd "$work"
{launcher} open_lm.main --config "$bundle/{settings}" --model "$bundle/{model}" \\
    {data_flags} \\
    --logs "$work/logs" --name {run} --resume latest
rm -rf "$work/weights"
"$python" -m open_lm.hf.convert export "$work/logs/{run}" "$work/weights"

cat > "$work/expected.sha256" << 'END'
{hashes}
END
cd "$work/weights"
if sha256 -c "$work/expected.sha256"; then
    echo "reproduced: the weights are those of the bundle, bit by bit"
else
    echo "not reproduced: the weights differ from those of the bundle; see the notes at the top of this script" >&2
    exit 1
fi
"""
