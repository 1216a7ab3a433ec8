"""Every flag that takes a path, of every program, is read by a function of open_lm/system/names.py."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from open_lm.config.command_line import all_specs, parse_args

ROOT = Path(__file__).resolve().parents[2]
TYPES = {"user_path", "weights_path", "user_file", "shard_pattern", "input_pattern", "input_list", "source_pattern"}
LOOKS_LIKE_PATH = re.compile(
    r"path|folder|\bfiles?\b|url|\bcheckpoints?\b|\bshards?\b|manifest|\btokenizer\b|directory|\.json|\.yaml|s3://|"
    r"\bconfig\b|\bdir\b|\bdata\b|glob|python|output|\blogs\b|script",
    re.IGNORECASE,
)
# Flags of text that mention a path or a shard but hold something else.
OTHER_TEXT = {
    "--eot-token", "--matmul-tflops", "--sample-shards", "--manifest-filename", "--separator", "--content-key",
    "--content_key", "--suffixes", "-m", "script", "--name", "--train-data-upsampling-factors", "--data-key",
    "--cache-limit", "--hf-fsdp-block", "--mesh-dim", "--dist-url", "--report-to", "--val-data-key", "--tasks",
    "--only", "--license", "--oidc-issuer", "--profile-steps",
}  # fmt: skip
# A program for other environments, which cannot import open_lm.
STANDALONE = ROOT / "scripts" / "bench" / "bench_loader_peers.py"


def looks_like_path(flag: str, description: str) -> bool:
    text = f"{flag} {description}".replace("-", " ").replace("_", " ")
    return flag not in OTHER_TEXT and LOOKS_LIKE_PATH.search(text) is not None


def arguments(path: Path) -> Iterator[tuple[str, dict[str, ast.expr]]]:
    """Yield the name and the options of each argument that a program adds to a parser and that takes text."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)):
            continue
        options = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
        flag, action = node.args[0].value, options.get("action")
        takes_value = action is None or (isinstance(action, ast.Constant) and action.value == "append")
        is_argument = isinstance(flag, str) and re.fullmatch(r"--?[A-Za-z][\w-]*|[a-z_]+", flag) and "help" in options
        if is_argument and takes_value and "choices" not in options and "register" not in ast.unparse(node.func):
            yield flag, options


def test_path_flags_of_every_program_have_a_path_type() -> None:
    checked, problems = set(), []
    for folder in ("open_lm", "datapreprocess", "scripts", "eval"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.is_symlink() or "open_lm/datapreprocess" in str(path) or path == STANDALONE:
                continue
            for flag, options in arguments(path):
                kind = ast.unparse(options["type"]) if "type" in options else "none"
                described = " ".join(ast.unparse(options[name]) for name in ("help", "metavar") if name in options)
                if kind in ("int", "float") or not looks_like_path(flag, described):
                    continue
                checked.add(path)
                if kind not in TYPES:
                    problems.append(f"{path.relative_to(ROOT)}: {flag} has the type {kind}")
    assert len(checked) > 15, checked
    assert not problems, f"give these arguments one of the types {sorted(TYPES)} of open_lm/system/names.py: {problems}"


def test_path_flags_of_the_trainer_are_marked() -> None:
    specs = [spec for spec in all_specs().values() if spec.kind is str and spec.choices is None and not spec.no_effect]
    unmarked = [spec.flag for spec in specs if looks_like_path(spec.flag, spec.help) and spec.path is None]
    assert not unmarked, f"declare these flags with path=user_path or another type of system/names.py: {unmarked}"
    assert {spec.path.__name__ for spec in specs if spec.path} <= TYPES
    assert sum(spec.path is not None for spec in specs) >= 13


@pytest.mark.parametrize("spec", [spec for spec in all_specs().values() if spec.path], ids=lambda spec: spec.name)
def test_trainer_replaces_the_home_folder_and_passes_urls_on(
    spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "settings.yaml").write_text("lr: 0.001\n")
    if spec.name in ("config", "recipe"):
        assert parse_args([spec.flag, "~/settings.yaml"]).lr == 0.001
        return
    for value, expected in [
        ("~/a {b}", f"{tmp_path}/a {{b}}"), ("s3://bucket/~/x", "s3://bucket/~/x"),
        ("https://host/a?b=~", "https://host/a?b=~"), ("org/name", "org/name"), ("./~/x", "./~/x"),
    ]:  # fmt: skip
        file = tmp_path / "config.json"
        file.write_text(json.dumps({spec.name: [value] if spec.many else value}))
        for words in (["--config", str(file)], [spec.flag, value]):
            settings = parse_args([*words, "--hf-seq-len", "8", "--remote-sync-protocol", "fsspec"])
            assert getattr(settings, spec.name) in (expected, [expected]), words
