"""Warnings about settings that are valid but probably not meant."""

from __future__ import annotations

import pytest

from open_lm.config.architecture import read_architecture
from open_lm.config.command_line import parse_args
from open_lm.config.doubts import doubtful_settings
from open_lm.config.sections import Config


def doubts(argv: str, **architecture: int) -> list[str]:
    return doubtful_settings(Config.from_namespace(parse_args(argv.split())), architecture)


@pytest.mark.parametrize(("flag", "kind"), [("--train-data", "source"), ("--val-data", "validation set")])
def test_unquoted_glob_that_makes_each_shard_a_source_is_reported(flag: str, kind: str) -> None:
    shards = " ".join(f"data/0/shard-{number:07}.tar" for number in range(4))
    (found,) = doubts(f"{flag} {shards} other/a.tar")
    assert found.startswith(f"{flag}: 4 of 5 values are shards that differ only in their number (shard-0000000.tar, ")
    assert f"each is a separate {kind}" in found and found.endswith(f"{flag} 'data/0/shard-*.tar'")
    (remote,) = doubts(f"{flag} s3://b/x/1.tar s3://b/x/2.tar")
    assert remote.endswith("'s3://b/x/*.tar'")


@pytest.mark.parametrize(
    "values",
    [
        "data/0/shard-*.tar",
        "wiki/{1..4}.tar web/{1..4}.tar",
        "wiki/1.tar web/1.tar",
        "data/wiki.tar data/web.tar",
        "data/1.tar::data/2.tar data/3.tar::data/4.tar",
        "data/1.tar data/2.tar --train-data-mix-weights 1 2",
    ],
)
def test_sources_that_are_meant_are_not_reported(values: str) -> None:
    assert doubts(f"--train-data {values}") == []


def test_hidden_dim_that_the_heads_do_not_divide_is_reported() -> None:
    (found,) = doubts("--model x.json", hidden_dim=100, n_heads=12)
    assert "hidden_dim 100 is not divisible by n_heads 12: a head is 8 wide, so attention is 96 wide, not 100" in found
    assert doubts("", hidden_dim=96, n_heads=12) == []
    assert len(doubts("", **read_architecture("open_lm_87m"))) == 1


@pytest.mark.parametrize(("flags", "number"), [("--fp8", 1), ("--fp8 --torchcompile", 0), ("", 0)])
def test_fp8_without_compilation_is_reported(flags: str, number: int) -> None:
    assert len(doubts(flags)) == number


def test_the_assumed_head_width_of_the_base_model_is_reported() -> None:
    flags, shape = "--mup --mup-base-width 256", {"hidden_dim": 2048, "n_heads": 32}
    (found,) = doubts(flags, **shape)
    assert "base model of width 256 to have 32 heads of 8" in found and found.endswith("set --mup-base-head-dim 64")
    assert len(doubts("", **shape, mup=True, mup_base_width=256)) == 1
    assert doubts(f"{flags} --mup-base-head-dim 64", **shape) == doubts(flags, **shape, head_dim=64) == []
    assert doubts(flags, hidden_dim=256, n_heads=4) == doubts("", **shape) == []
