"""What README and documentation say is so: examples print it, plans are plans, tables are the results', links lead somewhere."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import io
import json
import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml

import omninorm
from omninorm.experiments.compare import parse_plan

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md", *PAGES]


def examples(page: Path) -> list[tuple[str, str]]:
    """Blocks of Python, each with the indented output that follows it."""
    return re.findall(r"```python\n(.*?)```\n\n((?: {4}[^\n]*\n)+)", page.read_text(encoding="utf-8"), re.DOTALL)


EXAMPLES = [pytest.param(*each, id=f"{page.stem}-{at}") for page in TEXTS for at, each in enumerate(examples(page))]


@pytest.mark.parametrize(("code", "output"), EXAMPLES)
def test_examples_print_what_they_say(code: str, output: str) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert printed.getvalue() == textwrap.dedent(output)


def test_examples_were_found() -> None:
    assert len(examples(ROOT / "README.md")) == README.count("```python") == 4
    assert {page.stem for page in PAGES if examples(page)} == {"start", "norms", "placements", "surgery"}


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


def test_the_watchs_first_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a model, an optimizer, data, and a loop's body of the reader's own."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train_on(batch: torch.Tensor) -> torch.Tensor:
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    monkeypatch.chdir(tmp_path)
    (block,) = blocks("watching.md")
    scope = {"model": model, "optimizer": optimizer, "data": torch.randn(3, 2, 4), "train_on": train_on}
    exec(block, scope)
    assert [step.step for step in scope["w"].history.steps] == [1, 2, 3]
    assert (tmp_path / "page.html").exists()
    assert (tmp_path / "runs" / "mine" / "record.jsonl").exists()


def test_comparings_factory_has_the_arguments_that_are_passed() -> None:
    (block,) = blocks("comparing.md")
    scope: dict[str, object] = {}
    exec(block, scope)
    assert list(inspect.signature(scope["build"]).parameters) == ["norm", "depth", "vocab_size"]


def test_every_block_of_code_is_run_by_some_test() -> None:
    with_output = {page.relative_to(ROOT).as_posix(): len(examples(page)) for page in TEXTS}
    elsewhere = {"docs/watching.md": 1, "docs/comparing.md": 1, "docs/running.md": 2}
    for page in TEXTS:
        name = page.relative_to(ROOT).as_posix()
        assert page.read_text(encoding="utf-8").count("```python") == with_output[name] + elsewhere.get(name, 0), name


def test_plans_are_plans() -> None:
    (plan,) = re.findall(r"```yaml\n(.*?)```", (DOCS / "comparing.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(parse_plan(yaml.safe_load(plan), "comparing.md").cells()) == 2 * 3 * 2 * 5


def test_what_is_made_from_commands_and_results_is_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    generate = importlib.import_module("generate")
    for path, page in generate.pages().items():
        assert path.read_text(encoding="utf-8") == page, f"run python docs/generate.py: {path.name}"


def test_the_readme_quotes_the_benchmark() -> None:
    targets = json.loads((DOCS / "bench.json").read_text(encoding="utf-8"))["targets"]
    medians = {each["name"]: f"{each['median']:.2f}" for each in targets}
    quoted = [
        "RMSNorm forward / clone, fp32",
        "RMSNorm backward / clone, fp32",
        "RMSNorm fwd+bwd / nn.RMSNorm, fp32",
        "RMSNorm fwd+bwd / nn.LayerNorm, fp32",
        "RMSNorm backward / clone, bf16",
    ]
    speed = README.split("## How fast")[1].split("\n## ")[0]
    for name in quoted:
        assert f" {medians[name]} " in speed or f"({medians[name]} " in speed, name


def test_every_link_to_a_file_leads_there() -> None:
    checked = 0
    for page in TEXTS:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if re.match(r"https?://|#|mailto:", target):
                continue
            assert (page.parent / target.split("#")[0]).exists(), f"{page.name}: {target}"
            checked += 1
    assert checked > 100


def test_every_picture_is_described() -> None:
    for page in TEXTS:
        text = page.read_text(encoding="utf-8")
        for described in re.findall(r"!\[(.*?)\]\(", text):
            assert len(described) >= 8, page.name
        assert "<img" not in text


def test_the_version_stands_in_one_place_and_is_repeated_rightly() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == omninorm.__version__
    assert f"Version {omninorm.__version__}." in README.split("## Cite it")[1]
    assert f"## {omninorm.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert omninorm.__version__ not in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


# What is public ------------------------------------------------------------------------------------------------------

API = "\n".join(path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.md"))
DOCUMENTED = re.findall(r"automodule:: (\S+)", API)


def test_the_facade_is_what_the_api_lists() -> None:
    facade = (DOCS / "api" / "index.md").read_text(encoding="utf-8").split("```")[0]
    assert set(re.findall(r"`(\w+)`", facade)) - {"omninorm"} == set(omninorm.__all__)


def test_every_public_package_has_a_page() -> None:
    """A package is public if it says what of it is."""
    public = set()
    for path in (ROOT / "src" / "omninorm").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
        if path.name == "__init__.py" and name != "omninorm" and "__all__" in path.read_text(encoding="utf-8"):
            public.add(name)
    internal = {
        "omninorm.bench",
        "omninorm.inspection.rules",
        "omninorm.record",
        "omninorm.report.comparison",
        "omninorm.watch.callbacks",
    }
    assert public - internal <= set(DOCUMENTED), public - internal - set(DOCUMENTED)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_what_is_public_is_described(name: str) -> None:
    importlib.import_module(name)
    module = sys.modules[name]
    names = getattr(module, "__all__", [each for each in vars(module) if not each.startswith("_")])
    for each in names:
        value = getattr(module, each)
        if callable(value) and getattr(value, "__module__", "").startswith("omninorm"):
            assert value.__doc__, f"{name}.{each}"


# The lesson's numbers ------------------------------------------------------------------------------------------------


def test_a_number_of_the_lesson_that_changed_fails_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("lesson_under_test", DOCS / "lesson" / "lesson.py")
    lesson = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lesson)
    glued = {}
    monkeypatch.setattr(lesson, "glue", lambda name, value, display: glued.update({name: value}))
    monkeypatch.setattr(lesson, "NUMBERS", tmp_path / "numbers.json")
    monkeypatch.setenv(lesson.BUILDING, "1")
    with pytest.raises(ValueError, match=r"page\.size must be what numbers\.json says"):
        lesson.number("page.size", 3.0)
    monkeypatch.setenv(lesson.UPDATE, "1")
    lesson.number("page.size", 3.0)
    monkeypatch.delenv(lesson.UPDATE)
    assert lesson.number("page.size", 3.05, "{:.1f}") == glued["page.size"] == "3.0"
    with pytest.raises(ValueError, match=r"got 3\.1 for 3\.0"):
        lesson.number("page.size", 3.1)
    assert lesson.number("page.time", 7.0, "{:.0f}", within=None) == "7"
    with pytest.raises(ValueError, match="must hold, got 3"):
        lesson.check(False, 3)
    lesson.check(True)
    # a reader who changes a page and runs it is not stopped
    monkeypatch.delenv(lesson.BUILDING)
    lesson.number("page.size", 99.0)
    lesson.check(False)
