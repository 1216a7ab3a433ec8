"""Mixtures: built-in ones, YAML files, --source, and the factors and flags that follow from their rates."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from open_lm.config.command_line import parse_args
from open_lm.datapreprocess.mixtures import (
    MIXTURES,
    MixtureSource,
    choose_mixture,
    factors_for_rates,
    find_mixture,
    load_mixture,
    parse_sources,
    training_flags,
)
from open_lm.datapreprocess.sampling import selection_mask
from open_lm.errors import ConfigError

RED_PAJAMA_YAML = Path(__file__).resolve().parents[2] / "datapreprocess" / "metadata" / "rpj_lm_data.yaml"
# Billions of tokens on the card of togethercomputer/RedPajama-Data-1T.
RED_PAJAMA_TOKENS = {
    "common_crawl": 878, "c4": 175, "github": 59, "books": 26, "arxiv": 28, "wikipedia": 24, "stackexchange": 20
}  # fmt: skip


# --- built-in ---------------------------------------------------------------------------------------------------------
def test_built_in_mixtures() -> None:
    assert MIXTURES["wikipedia_mixture"].rates == {"cc_en": 9.09, "wiki": 90.91}
    assert set(MIXTURES) == {"wikipedia_mixture", "dolma_mixture", "redpajama", "slimpajama"}
    for name, mixture in MIXTURES.items():
        assert mixture.name == name and find_mixture(name) is mixture
        assert sum(mixture.rates.values()) == pytest.approx(100, abs=0.05)
        assert all(source.markers and source.rate for source in mixture.sources)
        json.dumps(mixture.record())


def test_markers_of_built_in_mixtures() -> None:
    dolma, red_pajama = MIXTURES["dolma_mixture"].sampling(), MIXTURES["redpajama"].sampling()
    for folder, source in {
        "cc_en_head": "cc_en", "cc_en_tail": "cc_en", "c4": "c4", "stack": "stack", "reddit": "reddit",
        "pes2o": "peS2o", "books": "books", "wiki": "wiki",
    }.items():  # fmt: skip
        assert dolma.source_of(f"s3://bucket/dolma-v1_6/{folder}/{folder}-0000.json.gz") == source
    for path, source in {
        "common_crawl/2023-06/en_head_0000.jsonl.zst": "common_crawl", "c4/c4-train.00000-of-01024.jsonl": "c4",
        "book/book.jsonl": "books", "wikipedia/wiki.jsonl": "wikipedia", "arxiv/arxiv_0.jsonl": "arxiv",
        "github/filtered_0.jsonl": "github", "stackexchange/stackexchange.jsonl": "stackexchange",
    }.items():  # fmt: skip
        assert red_pajama.source_of(f"/data/RedPajama/{path}") == source


def test_unknown_name_lists_the_valid_names() -> None:
    with pytest.raises(ConfigError) as caught:
        find_mixture("Wikipedia_mixtur")
    for part in ("did you mean wikipedia_mixture", "dolma_mixture", "redpajama", "slimpajama", ".yaml"):
        assert part in str(caught.value)


# --- YAML -------------------------------------------------------------------------------------------------------------
def test_mixture_from_a_yaml_file(tmp_path: Path) -> None:
    path = tmp_path / "mix.yml"
    path.write_text(
        "sources:\n- {source: wiki, markers: [wikipedia], rate: 90.91}\n"
        '- {source: web, inputs: ["s3://bucket/web/*.jsonl.zst"], rate: 9}\nsampling_frequencies: {wiki: 2.5}\n'
    )
    mixture = find_mixture(str(path))
    assert mixture.sources == (
        MixtureSource("wiki", 90.91, ("wikipedia",)),
        MixtureSource("web", 9, inputs=("s3://bucket/web/*.jsonl.zst",)),
    )
    assert mixture.inputs == {"web": ("s3://bucket/web/*.jsonl.zst",)}
    sampling = mixture.sampling({"web": ["s3://bucket/web/0.jsonl.zst"]})
    assert sampling.source_of("s3://bucket/web/0.jsonl.zst") == "web" and sampling.factor("wiki") == 2.5
    assert json.loads(json.dumps(mixture.record()))["sources"][0]["rate"] == 90.91


def test_default_sampling_file_gives_the_rates_of_redpajama() -> None:
    mixture = load_mixture(str(RED_PAJAMA_YAML))
    factors = {name.lower(): factor for name, factor in mixture.factors.items() if name != "UNKNOWN"}
    named = MIXTURES["redpajama"]
    assert factors == pytest.approx(factors_for_rates(RED_PAJAMA_TOKENS, named.rates, 1210), rel=1e-9)
    markers = {source.name.lower(): source.markers for source in mixture.sources if source.markers}
    assert markers == {source.name: source.markers for source in named.sources}


def test_all_problems_of_a_file_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        "sources:\n- {source: A, markers: [a], rat: 1}\n- {source: A, markers: b}\n- {name: C}\n"
        "- {source: D/E, inputs: [1], rate: .nan}\n- {source: wiki, rate: 5}\n"
        "sampling_frequencies: {wki: 1, A: -2, wiki: .inf, D/E: yes}\nsource: x\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_mixture(str(path))
    text = str(caught.value)
    for part in (
        "(13)",
        "unknown key 'rat' (did you mean rate?)",
        "source A is defined twice",
        "source A: markers must be a list of strings, found 'b'",
        "found {'name': 'C'}",
        "'D/E' is not a valid source name",
        "source D/E: inputs must be a list of strings, found [1]",
        "source D/E: rate must be a number of at least 0, found nan",
        "no rate for A, A; set rates for all sources or for none",
        'sampling_frequencies contains wki, which is not one of the "sources" (did you mean wiki?)',
        "the factor of A must be at least 0 and below 1000, found -2",
        "the factor of wiki must be at least 0 and below 1000, found inf",
        "the factor of D/E must be at least 0 and below 1000, found True",
        "unknown key 'source' (did you mean sources?)",
    ):
        assert part in text
    assert text.count(f"{path}: ") == 13


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("sources: [", "not valid YAML"),
        ("- {source: A}", 'expected "sources"'),
        ("", "found None"),
        ("sources: []", "must be a list"),
        ("sources: {A: [a]}", "must be a list"),
        ("sources: [{source: A, rate: 0}]", "every rate is 0"),
        ("sources: [{source: no}]", "found {'source': False}"),
        ("sources: [{source: A}]\nsampling_frequencies: [1]", "must map sources to factors"),
    ],
)
def test_invalid_files(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_mixture(str(path))
    assert expected in str(caught.value) and str(path) in str(caught.value)


# --- --source ---------------------------------------------------------------------------------------------------------
def test_parse_sources() -> None:
    values = ["wiki=a/*.jsonl", "web=s3://b/lang=en/*.zst", "wiki=hf://x", "stack exchange=c"]
    assert parse_sources(values) == {
        "wiki": ("a/*.jsonl", "hf://x"), "web": ("s3://b/lang=en/*.zst",), "stack exchange": ("c",)
    }  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        parse_sources(["a.jsonl", "x=", "=a", "s3://b/lang=en", "../x=a", "ok=a", " x=a"])
    text = str(caught.value)
    assert (
        "(6)" in text
        and "--source a.jsonl: expected NAME=PATTERN" in text
        and "'../x' is not a valid source name" in text
    )


def test_mixture_and_sources_together() -> None:
    assert choose_mixture(None, []) is None
    assert choose_mixture("wikipedia_mixture", []) == MIXTURES["wikipedia_mixture"]
    sources_only = choose_mixture(None, ["a=x/*", "b=y/*"])
    assert (
        sources_only is not None and sources_only.inputs == {"a": ("x/*",), "b": ("y/*",)} and sources_only.rates == {}
    )
    assert sources_only.sampling({"a": ["x/1"], "b": ["y/1"]}).source_of("y/1") == "b"
    both = choose_mixture("wikipedia_mixture", ["wiki=x/*"])
    assert both is not None and both.inputs == {"wiki": ("x/*",)}
    assert both.rates == MIXTURES["wikipedia_mixture"].rates and not MIXTURES["wikipedia_mixture"].inputs
    with pytest.raises(ConfigError, match=r"wikis is not a source of wikipedia_mixture \(did you mean wiki\?\).*cc_en"):
        choose_mixture("wikipedia_mixture", ["wikis=x/*"])


# --- rates ------------------------------------------------------------------------------------------------------------
def test_by_default_no_document_is_repeated() -> None:
    factors = factors_for_rates(
        {"web": 1000, "wiki": 30, "code": 500, "rest": 7}, _rates(web=50, wiki=10, code=40, rest=0)
    )
    assert factors == {"web": 0.15, "wiki": 1.0, "code": 0.24, "rest": 0.0}
    assert factors_for_rates({"a": 10}, {"a": 0.1}) == {"a": 1.0}


def test_factors_for_a_number_of_tokens() -> None:
    factors = factors_for_rates({"web": 1000, "wiki": 30}, _rates(web=3, wiki=1), total_tokens=400)
    assert factors == {"web": 0.3, "wiki": pytest.approx(100 / 30)}


@given(
    st.dictionaries(
        st.text(min_size=1),
        st.tuples(st.integers(1, 10**13), st.integers(1, 10**6).map(lambda n: n / 1000)),
        min_size=1,
    ),
    st.none() | st.integers(1, 10**13),
)
def test_token_shares_are_exact(sources: dict[str, tuple[int, float]], total_tokens: int | None) -> None:
    tokens = {name: count for name, (count, _) in sources.items()}
    rates = {name: rate for name, (_, rate) in sources.items()}
    try:
        factors = factors_for_rates(tokens, rates, total_tokens)
    except ConfigError:
        shares = [Fraction(str(rate)) / sum(Fraction(str(r)) for r in rates.values()) for rate in rates.values()]
        assert total_tokens and max(total_tokens * s / t for s, t in zip(shares, tokens.values(), strict=True)) >= 1000
        return
    sampled = {name: tokens[name] * factors[name] for name in tokens}
    total, rate_sum = sum(sampled.values()), sum(rates.values())
    assert all(sampled[name] / total == pytest.approx(rates[name] / rate_sum, rel=1e-12) for name in tokens)
    if total_tokens is None:
        assert max(factors.values()) == 1.0
    else:
        assert total == pytest.approx(total_tokens, rel=1e-12)


def test_documents_sampled_by_the_factors_reach_the_rates() -> None:
    lengths = {name: 1 + np.arange(20_000) * step % 997 for name, step in (("a", 7), ("b", 31), ("c", 101))}
    tokens = {name: int(part.sum()) for name, part in lengths.items()}
    rates = {"a": 60.0, "b": 10.0, "c": 30.0}
    total = 3 * tokens["a"]
    factors = factors_for_rates(tokens, rates, total)
    for group, (name, part) in enumerate(lengths.items()):
        masks = [selection_mask(1, group, 0, len(part), factors[name], copy) for copy in range(2)]
        taken = sum(int(part[mask].sum()) for mask in masks[: int(np.ceil(factors[name]))])
        chance = factors[name] % 1
        deviation = np.sqrt(chance * (1 - chance) * float((part.astype(float) ** 2).sum()))
        assert abs(taken - total * rates[name] / 100) < 4 * deviation + 1


def test_rates_that_do_not_match_the_sources() -> None:
    with pytest.raises(ConfigError) as caught:
        factors_for_rates({"a": 10, "UNKNOWN": 3, "d": 0}, _rates(a=1, b=2, d=1, e=0), total_tokens=0)
    text = str(caught.value)
    for part in ("(4)", "UNKNOWN: its files contain 3 tokens", "b: has rate 2", "d: has rate 1", "at least 1, found 0"):
        assert part in text
    with pytest.raises(ConfigError, match="repeat the 2 tokens of b 2500 times"):
        factors_for_rates({"a": 10**6, "b": 2}, _rates(a=1, b=1), total_tokens=10_000)


def test_training_flags() -> None:
    rates = {"cc_en": 9.09, "wiki": 90.91, "none": 0}
    manifests = {"wiki": "out/wiki/manifest.jsonl", "cc_en": "s3://b/cc_en/manifest.jsonl"}
    flags = training_flags(manifests, rates)
    args = parse_args(["--model", "open_lm_11m", "--train-num-samples", "1000", *flags])
    assert args.dataset_manifest == ["s3://b/cc_en/manifest.jsonl", "out/wiki/manifest.jsonl"]
    assert args.train_data_mix_weights == [9.09, 90.91]
    with pytest.raises(ConfigError) as caught:
        training_flags({"wiki": "w", "UNKNOWN": "u"}, rates)
    assert "UNKNOWN: has a data set, but no rate" in str(caught.value)
    assert "cc_en: has rate 9.09, but no data set" in str(caught.value)


def _rates(**rates: float) -> dict[str, float]:
    return rates
