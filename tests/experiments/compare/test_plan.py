"""Plans: reading them, expanding them to runs, and refusing invalid ones."""

import datetime
import functools
import itertools
import math
from pathlib import Path

import pytest
from helpers.mutations import bounded

from omninorm.errors import ConfigError
from omninorm.experiments.compare import PRESETS, Cell, parse_plan, preset, read_plan
from omninorm.experiments.compare.factory import build_cell
from omninorm.experiments.compare.plan import check_memory, fits_memory

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


def test_yaml_and_toml_give_the_same_plan(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(YAML)
    (tmp_path / "p.toml").write_text(TOML)
    plan = read_plan(tmp_path / "p.yaml")
    assert plan == read_plan(tmp_path / "p.toml")
    cells = plan.cells()
    assert len(cells) == 2 * 2 * 2 * 2
    assert {cell.norm.qk_norm for cell in cells.values()} == {True, False}
    assert all(cell.plan.model.d_model == 16 and cell.plan.train.steps == 3 for cell in cells.values())


def test_runs_survive_json_and_equal_runs_share_an_id() -> None:
    cells = list(parse_plan(study(seeds=2, settings={"steps": 5}), "here").cells().values())
    assert [Cell.from_dict(cell.to_dict()) for cell in cells] == cells
    twice = {"studies": [*study(seeds=2)["studies"], {"name": "b", "protocol": "train", "seeds": 3}]}  # type: ignore[misc]
    assert len(parse_plan(twice, "here").cells()) == 3


def test_none_is_combined_only_with_none() -> None:
    plan = parse_plan(study(normalization=["rmsnorm", "none"], placement=["pre", "post", "none"], seeds=1), "here")
    pairs = {(cell.norm.normalization, cell.norm.norm_placement) for cell in plan.cells().values()}
    assert pairs == {("rmsnorm", "pre"), ("rmsnorm", "post"), ("none", "none")}


@pytest.mark.parametrize(
    ("values", "place", "reason"),
    [
        ({}, "studies", "is missing"),
        ({"studies": []}, "studies", "at least 1"),
        (study(normalization=["rmsnrom"]), "studies.0.normalization", "'rmsnrom' is not one of rmsnorm"),
        (study(placement=["none"]), "studies.0", "an empty grid"),
        (study(vary={"qk_norm": []}), "studies.0", "values of qk_norm, not 0"),
        (study(seeds=0), "studies.0.seeds", "1"),
        (study(margin=math.inf), "studies.0.margin", "finite"),
        (study(lr=[math.nan]), "studies.0.lr", "finite"),
        (study(protocol="guess"), "studies.0.protocol", "'train'"),
        ({"studies": [*study()["studies"], *study()["studies"]]}, "The plan", "two studies are named a"),  # type: ignore[misc]
        ([1], "The plan", "must be a mapping"),
        (study(depth=[10**6]), "studies.0.depth.0", "10000"),
        (study(depth=[0]), "studies.0.depth.0", "1"),
        (study(name="a" * 200), "studies.0.name", "100"),
        (study(settings={"steps": 1 << 20_000}), "studies.0.settings", "too large"),
        (study(vary={"steps": [5, -(2**63)]}), "studies.0.vary", "too large"),
        (study(settings={"lr": math.nan}), "studies.0.settings", "finite"),
        (study(settings={"schedule": datetime.date(2020, 1, 1)}), "studies.0.settings", "not date"),
        (study(settings={"norm": {1: 2}}), "studies.0.settings", "keys must be texts"),
        (study(settings={"norm": functools.reduce(lambda inner, _: [inner], range(500), 1)}), "settings", "too deeply"),
        ({**study(), "text": "a\0b"}, "text", "NUL"),
        ({**study(), "model": "m\0:build"}, "model", "NUL"),
        ({**study(), "claims": ["C99" * 500]}, "The plan", "is not one of C1"),
        ({**study(), "claims": ["C3"]}, "The plan", "claim C3 needs a study named norms"),
    ],
)
def test_an_invalid_plan_is_refused_with_its_key(values: object, place: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_plan(values, "p.yaml")
    assert place in caught.value.invariant
    assert reason in caught.value.invariant
    assert "p.yaml" in caught.value.invariant
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("values", "key", "meant"),
    [(study(depths=[3]), "studies.0.depths", "'depth'"), ({**study(), "titel": "x"}, "titel", "'title'")],
)
def test_an_unknown_key_is_refused_with_the_one_that_was_meant(values: object, key: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_plan(values, "p.yaml")
    assert key in caught.value.invariant
    assert f"did you mean {meant}?" in caught.value.remedy


@pytest.mark.parametrize(
    ("settings", "name"), [({"d_modell": 3}, "d_modell"), ({"steps": 0}, "steps"), ({"d_model": [3]}, "d_model")]
)
def test_settings_are_checked_before_anything_runs(settings: dict[str, object], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        parse_plan(study(settings=settings), "here").cells()


@pytest.mark.parametrize(
    "settings",
    [{"batch_size": 10**12}, {"d_model": 10**7, "n_heads": 1}, {"d_ff": 10**13}, {"seq_len": 10**12, "batch_size": 1}],
)
def test_a_run_larger_than_the_memory_is_refused(settings: dict[str, int]) -> None:
    cell = next(iter(parse_plan(study(settings=settings), "here").cells().values()))
    with bounded(0), pytest.raises(ConfigError, match="GiB") as caught:
        check_memory(cell)
    assert "seq_len" in caught.value.received
    assert not fits_memory(cell)


def test_a_run_that_fits_a_container_exactly_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 bytes per weight; 4 bytes per token for each logit and for each block's activations."""
    settings = {"d_model": 16, "n_heads": 2, "batch_size": 3, "seq_len": 5}
    cell = next(iter(parse_plan(study(settings=settings, depth=[2]), "here").cells().values()))
    weights = sum(each.numel() for each in build_cell(cell).parameters() if each.ndim == 2)
    needed = 16 * weights + 4 * 15 * (256 + 2 * 16)
    monkeypatch.setattr("omninorm.experiments.compare.plan.memory_limit", lambda: needed)
    check_memory(cell)
    monkeypatch.setattr("omninorm.experiments.compare.plan.memory_limit", lambda: needed - 1)
    with pytest.raises(ConfigError, match="2 blocks"):
        check_memory(cell)


@pytest.mark.parametrize(
    ("grid", "runs"),
    [
        ({"lr": [0.1] * 100, "depth": [4] * 100, "seeds": 6}, "60,000"),
        ({"vary": {"steps": [1] * 1000}, "seeds": 11}, "11,000"),
    ],
)
def test_a_grid_that_is_too_large_is_refused_before_it_is_expanded(grid: dict[str, object], runs: str) -> None:
    with bounded(0), pytest.raises(ConfigError) as caught:
        parse_plan(study(**grid), "here").cells()
    assert caught.value.received == runs


BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in itertools.pairwise("abcdefghijklmnopqrst"))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("p.yaml", "x: 1\na: [1", "not valid YAML: line 2: a bracket is not closed"),
        ("p.yaml", "x: 1\na: 'b\nc: d", "not valid YAML: line 2: a quotation mark is not closed"),
        ("p.yaml", "- a: 1\n b: 2", "not valid YAML: line 2: the indentation does not match"),
        ("p.yaml", "a:\n\tb: 2", "not valid YAML: line 2: a value can't start with a tab"),
        ("p.yaml", "a: b: c", "not valid YAML: line 1: a colon is not allowed here"),
        ("p.yaml", "a: *x", "not valid YAML: line 1: the alias 'x' is not defined"),
        ("p.yaml", "a: 1\n---\nb: 2", "not valid YAML: line 2: a second document starts here"),
        ("p.yaml", "a: >5q\n x", "not valid YAML: line 1: expected chomping"),
        ("p.toml", "\na = = 1", "not valid TOML: line 2, column 5: invalid value"),
        ("p.json", '{\n"a": ]', "not valid JSON: line 2, column 6: expecting value"),
        ("p.json", "[" * 100_000, "nested too deeply"),
        ("p.yaml", "- " * 2000, "nested too deeply"),
        ("p.yaml", "[" * 30_000, "nested too deeply"),
        ("p.yaml", "!!python/object/apply:os.system ['true']", "not valid YAML: line 1: the tag .* is not supported"),
        ("p.yaml", BOMB, "aliases expand to more than"),
        ("p.yaml", "title: &a [*a]", "contains itself"),
        ("p.yaml", f"title: {'9' * 5000}", "5000"),
        ("p.toml", f"title = {'9' * 5000}", "5000"),
        ("p.json", "9" * 5000, "5000"),
        ("p.yaml", f"studies: [{{name: a, protocol: train, depth: [0x{'f' * 5000}]}}]", "studies.0.depth"),
        ("p.yaml", "#" * (2**15 + 1), "at most 32,768 bytes"),
        ("p.json", " " * (2**20 + 1), "at most 1,048,576 bytes"),
        ("p.txt", "", "must end in"),
        ("p.yaml", "", "is empty"),
        ("p.yaml", "# only a comment", "is empty"),
        ("p.yaml", "text", "The plan .* must be a mapping, got 'text'"),
        ("p.yaml", "title: a", "studies is missing from the plan"),
        ("p.yaml", "studies: 3", "studies in the plan .* must be a list, got 3"),
    ],
    ids=lambda value: value[:20],
)
def test_an_invalid_file_is_refused_with_its_name(tmp_path: Path, name: str, content: str, reason: str) -> None:
    (tmp_path / name).write_text(content)
    with bounded(0), pytest.raises(ConfigError, match=reason) as caught:
        read_plan(tmp_path / name)
    assert name in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("missing.yaml", "No such file"),
        ("folder.yaml", "directory"),
        ("a\0.yaml", "null"),
        ("binary.yaml", "line 1 holds the byte 0xff, which is not UTF-8"),
    ],
)
def test_a_file_that_can_not_be_read_is_refused(tmp_path: Path, path: str, reason: str) -> None:
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\0")
    with pytest.raises(ConfigError, match=reason):
        read_plan(tmp_path / path)


def test_aliases_within_the_limit_are_expanded(tmp_path: Path) -> None:
    shared = "settings: &s {steps: 7}"
    (tmp_path / "p.yaml").write_text(
        f"studies: [{{name: a, protocol: train, {shared}}}, {{name: b, protocol: train, settings: *s}}]"
    )
    assert [study.settings for study in read_plan(tmp_path / "p.yaml").studies] == [{"steps": 7}] * 2


def test_every_preset_is_a_valid_plan() -> None:
    for name in PRESETS:
        cells = preset(name).cells()
        assert cells
    assert {cell.norm.norm_placement for cell in preset("placements").cells().values()} >= {"pre", "keel", "residual"}
    with pytest.raises(ConfigError, match="quick, chapter, placements, residuals, C1"):
        preset("qiuck")
