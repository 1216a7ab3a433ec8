"""The benchmark of text generation: equal weights in both contenders, and its table."""

from __future__ import annotations

import json
from pathlib import Path

import bench_generate
import pytest


@pytest.mark.processes
def test_both_contenders_generate_the_same_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = {"hidden_dim": 32, "n_layers": 2, "n_heads": 4, "seq_len": 64, "vocab_size": 300, "weight_tying": False}
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps({**shape, "post_embed_norm": False}))
    bench_generate.main(["--model", str(config), "--batch-size", "2", "--new-tokens", "8", "--rounds", "1"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[3:]]
    assert [(row[0], row[1], row[3]) for row in rows] == [
        ("2", busy, name) for busy in ("0", "1") for name in ("open_lm", "transformers")
    ]
    assert all(float(value) > 0 for row in rows for value in row[4:])


def test_different_tokens_are_an_error() -> None:
    contenders = {"open_lm": lambda prompts, count: [[1]], "transformers": lambda prompts, count: [[2]]}
    with pytest.raises(RuntimeError, match="different tokens"):
        bench_generate.measure(contenders, [[1]], 1, rounds=1)
