"""The settings of the training data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from open_lm.config.fields import Section, flag, no_effect
from open_lm.system.names import shard_pattern, user_path


@dataclass(frozen=True)
class DataConfig(Section):
    title: ClassVar[str] = "training data"

    train_data: list[str] | None = flag(
        None,
        "training shards, one value per source: a path, an s3:// URL, a brace range, a glob, several of these joined "
        "by '::', or a 'pipe:' command; a name that exists is used literally",
        path=shard_pattern,
    )
    dataset_manifest: list[str] | None = flag(
        None, "manifest.jsonl files, one per source; each pass reads every sequence exactly once", path=user_path
    )
    train_text: list[str] | None = flag(
        None,
        "raw text, one value per source: files that preprocessing reads, by path, s3:// URL, glob, folder or @FILE, "
        "several of them joined by '::'; the run tokenizes them with --tokenizer",
        path=shard_pattern,
    )
    text_key: str = flag("text", "with --train-text, key or column of the text of a document; dots reach nested fields")
    text_separator: str | None = flag(
        None, r"with --train-text, text between documents of plain text, such as '\n\n'; default: one each"
    )
    text_split_documents: bool = flag(
        False, "with --train-text, pack complete documents into sequences and pad the rest, instead of cutting them"
    )
    text_add_bos: bool = flag(False, "with --train-text, put the tokenizer's begin-of-text token before each document")
    text_index: str | None = flag(
        None,
        "with --train-text, local folder of the index of the text, which several runs can use; default: in the run's "
        "folder",
        path=user_path,
    )
    train_data_mix_weights: list[float] | None = flag(
        None, "sampling weight of each source, on any scale; default: equal weights"
    )
    train_data_upsampling_factors: str | None = flag(
        None, "number of visits to each shard per pass, one factor per source, joined by '::'; default: 1"
    )
    dataset_type: str = flag(
        "auto",
        "type of the training data: synthetic generates random tokens and needs no data; auto and webdataset read "
        "shards",
        choices=("webdataset", "auto", "synthetic"),
    )
    dataset_resampled: bool = flag(False, "sample the shards of --train-data with replacement")
    multiple_data_passes: bool = flag(
        False, "start another pass when the sources of --dataset-manifest are exhausted, instead of failing"
    )
    data_key: str = flag(
        "txt", "format of the samples in a shard: npy, json.gz, json or txt; another of these in a shard is detected"
    )
    train_num_samples: int | None = flag(None, "number of tokens per epoch, that is, per checkpoint interval")
    epochs: int = flag(32, "number of epochs of --train-num-samples tokens")
    global_batch_size: int = flag(64, "sequences per optimizer step, over all devices")
    batch_size: int | None = flag(
        None,
        "sequences per device and micro-batch; replaces --global-batch-size, which becomes --batch-size x devices x "
        "--accum-freq",
    )
    workers: int = flag(1, "data-loading worker processes per device; 0: load in the training process")
    disable_buffer: bool = flag(False, "read the sequences of each shard in stored order, without shuffling")
    target_mask_left: int | None = flag(
        None, "token id; only the tokens after its last occurrence in a sequence are targets; default: no such mask"
    )
    squash_mask_left: bool = flag(False, "with --target-mask-left, also remove that token from the sequence")
    target_mask_individual: int | None = flag(
        None, "token id that is never a target, such as a padding token; default: no such mask"
    )
    document_mask: bool = flag(
        False, "let each token attend to its own document only, and restart positions at each document"
    )
    end_of_text_id: int | None = flag(
        None, "with --document-mask, id that ends a document; default: that of the shards' dataset.json"
    )
    cache_dir: str | None = flag(
        None, "local folder in which to cache remote shards; default: no cache", path=user_path
    )
    cache_limit: str = flag("100GB", "maximum size of --cache-dir, such as 500MB or 2TB")
    read_timeout: float = flag(60.0, "seconds without any data after which the read of a shard is retried")
    allow_changed_data: bool = flag(
        False, "resume even if the training data differ from those that the checkpoint was trained on"
    )
    allow_other_tokenizer: bool = flag(
        False, "accept data whose tokenizers, or that of the loaded checkpoint's run, give different ids"
    )
    ignore_parse_errors: bool = flag(
        False, "skip and count corrupt samples and shards, up to the fraction --data-tolerate-error-p"
    )
    data_tolerate_error_p: float = flag(
        0.09, "with --ignore-parse-errors, maximum fraction of corrupt sequences, from 0 to 1"
    )
    data_tolerate_num_ckpts: int = no_effect(
        0, "every epoch has exactly its number of tokens, so there are no missing tokens to tolerate"
    )

    def text_problems(self) -> list[str]:
        """Return what is wrong with --train-text; its files are checked when the index is made."""
        names, problems = self.train_text or [], []
        if self.text_separator == "" and names:
            problems.append("--text-separator must not be empty; leave it out to read each text file as one document")
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            problems.append(f"--train-text: {', '.join(repeated)} is given twice; use --train-data-mix-weights instead")
        return problems
