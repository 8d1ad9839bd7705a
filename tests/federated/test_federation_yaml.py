"""The federation's YAML: what it may ask of aggregation, and what it is told where it asks for too much."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from contextlora.errors import ConfigError
from contextlora.federated.federation import Federation, load_federation
from contextlora.federated.settings import Limits
from contextlora.strict import validate

FIVE = {f"d{i}": "a" for i in range(5)}


def given(**more):
    return validate(Federation, {"devices": FIVE, **more}, "f.yaml")


def test_options_of_the_mean_reach_the_strategy():
    assert given().mean.options == {}
    found = given(mean={"liars": 2, "clip": 1.5})
    assert found.mean.options == {"liars": 2, "clip": 1.5}
    assert given(mean={"by_samples": False}).mean.options == {"by_samples": False}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"mean": {"liars": 1}, "aggregate": "lori_cat"}, r"mean\.liars: 'lori_cat' does not take it; ours would"),
        ({"mean": {"by_samples": True}, "aggregate": "local"}, r"mean\.by_samples: 'local' does not take it; .*ours"),
        ({"mean": {"liars": 1, "by_samples": True}}, r"mean\.by_samples: .*own word"),
        ({"mean": {"liars": 3}}, r"fewer than 7 devices, but no task has more than 5"),
        ({"mean": {"clip": 0}}, r"mean\.clip"),
        ({"mean": {"lairs": 1}}, r"unknown key\. Did you mean 'liars'"),
        ({"pack": True, "aggregate": "paper_mean"}, r"pack: 'paper_mean' holds one B"),
        ({"pack": True, "aggregate": "ffa"}, r"pack: 'ffa' holds one adapter for all tasks already"),
        (
            {"mean": {"clip": 2.0}, "aggregate": "fedavg_lora"},
            r"'fedavg_lora' does not take it; ours would",
        ),
        ({"mean": {"liars": 1}, "aggregate": "lori"}, r"mean\.liars: 'lori' does not take it; ours would"),
        (
            {"mean": {"by_samples": True}, "aggregate": "single_cluster"},
            r"does not take it; .*full, lori",
        ),
        ({"pack": 1}, r"pack: should"),
    ],
)
def test_what_cannot_be_asked(more, said):
    with pytest.raises(ConfigError, match=rf"(?s)E103.*{said}"):
        given(**more)


def test_the_yaml_that_the_docs_show(tmp_path):
    """Word for word, with the defaults that they name."""
    docs = (Path(__file__).parents[2] / "docs" / "so-lora.md").read_text()
    block = docs[docs.index("    name: commonsense") :].split("\n\n")[0]
    text = "\n".join(line.removeprefix("    ") for line in block.splitlines())
    (tmp_path / "federation.yaml").write_text(text)
    found = load_federation(tmp_path / "federation.yaml")
    assert found.limits == Limits()
    assert yaml.safe_load(text)["limits"]["collision"] == 0.5
