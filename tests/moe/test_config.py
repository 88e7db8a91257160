"""Sizes that fit are taken, others refused; the presets have as many parameters as their table says."""

import inspect
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from counterflow import CounterflowError
from counterflow.moe import PRESETS, MixtureBlock, ModelConfig, config, stage


def test_v3_layer_has_the_published_widths() -> None:
    assert PRESETS["v3-layer"] == ModelConfig(
        vocabulary=129280, layers=1, hidden=7168, heads=128, query_rank=1536, latent=512, nope=128, rope=64, value=128,
        intermediate=2048, experts=256, groups=8, top_groups=4, top_k=8, shared_experts=1, routed_scaling=2.5,
    )  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_the_tables_of_parameters_are_true(name: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "model.md").read_text("utf-8")
    row = re.compile(rf"^\| {name} \| (\S+) million \| (\S+) million \|", re.MULTILINE)
    (table,) = row.findall(inspect.getsource(config))
    assert row.findall(page) == [table]
    model = stage(PRESETS[name], 0, 1, device="meta")
    block = next(item for item in model if isinstance(item, MixtureBlock))
    counted = [sum(parameter.numel() for parameter in module.parameters()) for module in (block, model)]
    stated = [text.replace(",", "") for text in table]
    assert stated == [f"{count / 1e6:.{2 if '.' in text else 0}f}" for count, text in zip(counted, stated, strict=True)]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"heads": 0}, "heads is 0; it has to be a whole number of at least 1"),
        ({"hidden": 64.0}, "hidden is 64.0; it has to be a whole number of at least 1"),
        ({"layers": True}, "layers is True; it has to be a whole number of at least 1"),
        ({"rope": 7}, "rope is 7; it has to be even, for features are turned in pairs"),
        ({"groups": 3}, "16 experts do not divide into 3 groups; give a divisor"),
        ({"top_groups": 5}, "top_groups is 5 of 4 groups; give at most 4"),
        ({"top_k": 9}, "top_k is 9, and 2 groups have 8 experts; give at most those"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CounterflowError) as refused:
        replace(PRESETS["tiny"], **change)
    assert str(refused.value) == sentence
