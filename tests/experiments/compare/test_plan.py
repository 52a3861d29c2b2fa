"""Plans: from files to cells, and what is said of bad ones."""

import math
from pathlib import Path

import pytest

from omninorm.errors import ConfigError
from omninorm.experiments.compare import PRESETS, Cell, parse_plan, preset, read_plan

YAML = """
title: norms
studies:
  - name: a
    protocol: train
    normalization: [rmsnorm, layernorm]
    depth: [2, 3]
    seeds: 2
    vary: {qk_norm: [true, false]}
    settings: {d_model: 16, n_heads: 2, steps: 3, seq_len: 16}
"""
TOML = """
title = "norms"
[[studies]]
name = "a"
protocol = "train"
normalization = ["rmsnorm", "layernorm"]
depth = [2, 3]
seeds = 2
vary = {qk_norm = [true, false]}
settings = {d_model = 16, n_heads = 2, steps = 3, seq_len = 16}
"""


def study(**changes: object) -> dict[str, object]:
    return {"studies": [{"name": "a", "protocol": "train", **changes}]}


def test_yaml_and_toml_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(YAML)
    (tmp_path / "p.toml").write_text(TOML)
    plan = read_plan(tmp_path / "p.yaml")
    assert plan == read_plan(tmp_path / "p.toml")
    cells = plan.cells()
    assert len(cells) == 2 * 2 * 2 * 2
    assert {cell.norm.qk_norm for cell in cells.values()} == {True, False}
    assert all(cell.plan.model.d_model == 16 and cell.plan.train.steps == 3 for cell in cells.values())


def test_cells_survive_json_and_equal_ones_share_an_id() -> None:
    cells = list(parse_plan(study(seeds=2, settings={"steps": 5}), "here").cells().values())
    assert [Cell.from_dict(cell.to_dict()) for cell in cells] == cells
    twice = {"studies": [*study(seeds=2)["studies"], {"name": "b", "protocol": "train", "seeds": 3}]}  # type: ignore[misc]
    assert len(parse_plan(twice, "here").cells()) == 3


def test_without_a_norm_there_is_nothing_to_place() -> None:
    plan = parse_plan(study(normalization=["rmsnorm", "none"], placement=["pre", "post", "none"], seeds=1), "here")
    pairs = {(cell.norm.normalization, cell.norm.norm_placement) for cell in plan.cells().values()}
    assert pairs == {("rmsnorm", "pre"), ("rmsnorm", "post"), ("none", "none")}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "studies"),
        ({"studies": []}, "studies"),
        (study(normalization=["rmsnrom"]), "'rmsnrom' is none of rmsnorm"),
        (study(placement=["none"]), "an empty grid"),
        (study(vary={"qk_norm": []}), "an empty grid"),
        (study(seeds=0), "studies.0.seeds"),
        (study(margin=math.inf), "studies.0.margin"),
        (study(lr=[math.nan]), "studies.0.lr"),
        (study(depths=[3]), "studies.0.depths"),
        (study(depths=[3]), "did you mean 'depth'?"),
        ({**study(), "titel": "x"}, "did you mean 'title'?"),
        (study(protocol="guess"), "studies.0.protocol"),
        ({"studies": [*study()["studies"], *study()["studies"]]}, "names of their own"),  # type: ignore[misc]
        ([1], "the plan"),
    ],
)
def test_a_bad_plan_is_refused_with_its_key(values: object, said: str) -> None:
    with pytest.raises(ConfigError, match="plan must be valid") as caught:
        parse_plan(values, "p.yaml")
    assert said in str(caught.value)
    assert "p.yaml" in str(caught.value)


def test_settings_are_checked_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match="d_modell"):
        parse_plan(study(settings={"d_modell": 3}), "here").cells()
    with pytest.raises(ConfigError, match="steps"):
        parse_plan(study(settings={"steps": 0}), "here").cells()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.yaml", "a: [1", "well-formed"),
        ("p.toml", "a = ", "well-formed"),
        ("p.json", "{", "well-formed"),
        ("p.json", "[" * 100_000, "well-formed"),
        ("p.yaml", "[" * 100_000, "well-formed"),
        ("p.yaml", "!!python/object/apply:os.system ['true']", "well-formed"),
        ("p.txt", "", "a plan ends in"),
    ],
)
def test_a_bad_file(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=said):
        read_plan(tmp_path / name)
    with pytest.raises(ConfigError, match=r"readable|ends in"):
        read_plan(tmp_path / f"missing-{name}")


def test_presets_are_plans() -> None:
    for name in PRESETS:
        cells = preset(name).cells()
        assert cells
    assert {cell.norm.norm_placement for cell in preset("placements").cells().values()} >= {"pre", "keel", "residual"}
    with pytest.raises(ConfigError, match="quick, chapter, placements, C1"):
        preset("qiuck")
