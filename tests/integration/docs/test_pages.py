"""README and documentation are true: examples print their output, tables match results, plans parse, links resolve."""

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
from omninorm.cli.demo import demo
from omninorm.experiments.compare import parse_plan

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md", *PAGES]


def examples(page: Path) -> list[tuple[str, str]]:
    """Return the page's blocks of Python, each with the indented output that follows it."""
    return re.findall(r"```python\n(.*?)```\n\n((?: {4}[^\n]*\n)+)", page.read_text(encoding="utf-8"), re.DOTALL)


EXAMPLES = [
    pytest.param(*example, id=f"{page.stem}-{number}")
    for page in TEXTS
    for number, example in enumerate(examples(page))
]


@pytest.mark.parametrize(("code", "output"), EXAMPLES)
def test_an_example_prints_the_output_below_it(
    code: str, output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # some write files
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert printed.getvalue() == textwrap.dedent(output)


def test_pages_have_the_expected_examples() -> None:
    assert len(examples(ROOT / "README.md")) == README.count("```python") == 3
    assert {page.stem for page in PAGES if examples(page)} == {
        "start", "norms", "gpu", "placements", "running", "surgery", "comparing-checkpoints",
    }  # fmt: skip


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


def test_the_first_block_of_the_monitors_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test provides what the block leaves to the reader: model, optimizer, data and the step."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train_on(batch: torch.Tensor) -> torch.Tensor:
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    monkeypatch.chdir(tmp_path)
    scope = {"model": model, "optimizer": optimizer, "data": torch.randn(3, 2, 4), "train_on": train_on}
    exec(blocks("watching.md")[0], scope)
    assert [step.step for step in scope["w"].history.steps] == [1, 2, 3]
    assert (tmp_path / "page.html").exists()
    assert (tmp_path / "runs" / "mine" / "record.jsonl").exists()


def test_the_factory_in_the_docs_takes_the_arguments_that_compare_passes() -> None:
    (block,) = blocks("comparing.md")
    scope: dict[str, object] = {}
    exec(block, scope)
    assert list(inspect.signature(scope["build"]).parameters) == ["norm", "depth", "vocab_size"]


def test_every_block_of_python_is_run_by_a_test() -> None:
    with_output = {page.relative_to(ROOT).as_posix(): len(examples(page)) for page in TEXTS}
    elsewhere = {"docs/watching.md": 4, "docs/comparing.md": 1, "docs/running.md": 2}
    for page in TEXTS:
        name = page.relative_to(ROOT).as_posix()
        assert page.read_text(encoding="utf-8").count("```python") == with_output[name] + elsewhere.get(name, 0), name


def test_the_plan_in_the_docs_parses() -> None:
    (plan,) = re.findall(r"```yaml\n(.*?)```", (DOCS / "comparing.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(parse_plan(yaml.safe_load(plan), "comparing.md").cells()) == 2 * 3 * 2 * 5


@pytest.mark.parametrize("name", ["README.md", "command-line.md", "performance.md"])
def test_generated_pages_and_tables_are_up_to_date(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    pages = {path.name: (path, page) for path, page in importlib.import_module("generate").pages().items()}
    path, page = pages.pop(name)
    assert path.read_text(encoding="utf-8") == page, "run python docs/generate.py"
    assert len(pages) == 2, "a generated page that is not checked"


def section(title: str) -> str:
    """Return a section of the README as one line."""
    return " ".join(README.split(f"## {title}")[1].split("\n## ")[0].split())


def test_the_readme_is_short() -> None:
    lines = README.splitlines()
    assert len(lines) <= 150
    assert not [line for line in lines if len(line) > 120]


def test_the_readme_quotes_the_benchmark() -> None:
    targets = json.loads((DOCS / "bench.json").read_text(encoding="utf-8"))["targets"]
    medians = {target["name"]: target["median"] for target in targets}
    speed = section("Speed")
    assert f"{1 / medians['RMSNorm fwd+bwd / nn.RMSNorm, fp32']:.1f} times as fast as torch.nn.RMSNorm" in speed
    assert f"{1 / medians['RMSNorm fwd+bwd / nn.LayerNorm, fp32']:.1f} times as fast as torch.nn.LayerNorm" in speed
    steps = {f"{medians[f'Thinker speed / nn.RMSNorm, {dtype}']:.2f}" for dtype in ("fp32", "bf16")}
    assert steps == set(re.findall(r"training step is (\S+) times as fast", speed))


def test_the_readme_quotes_the_demos_gradients() -> None:
    runs = {run["name"]: run for run in json.loads((DOCS / "demo.json").read_text(encoding="utf-8"))["runs"]}
    post = runs["post-rmsnorm"]
    gradients = post["depth_gradients"]
    ratio = float(f"{gradients[-1] / gradients[0]:.3g}")
    caption = " ".join(README.split("<!-- demo -->")[0].split())
    quoted = f"at step {post['gradient_step']}, block 1 gets 1/{ratio:,.0f} of block {len(gradients)}'s gradient"
    assert quoted in caption
    assert runs["no-norm"]["diverged_at"] < post["gradient_step"], "its line is missing from the figure"


def test_the_duration_of_the_demo_is_the_same_everywhere() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"make demo .*about 4 minutes on 2 cores", makefile)
    for text in (README.split("## ")[0], demo.__doc__):
        assert "about four minutes on two cores" in " ".join(text.split())


def test_the_readmes_verdicts_are_those_of_the_committed_comparison() -> None:
    files = [DOCS / "claims" / name for name in ("results.json", "timings.json")]
    claims = [claim for file in files for claim in json.loads(file.read_text(encoding="utf-8"))["claims"]]
    verdicts = {claim["id"]: claim["verdict"] for claim in claims}
    rows = re.findall(r"^\| (C\d) \|.*?\| (holds|partly|fails) \|", README, re.MULTILINE)
    assert [name for name, _ in rows] == [f"C{number}" for number in range(1, 8)]
    for name, verdict in rows:
        expected = "holds" if verdicts[name] == "holds" else "partly" if verdicts[name].startswith("holds") else "fails"
        assert verdict == expected, name


def test_every_link_to_a_file_resolves() -> None:
    checked = 0
    for page in TEXTS:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if re.match(r"https?://|#|mailto:", target):
                continue
            assert (page.parent / target.split("#")[0]).exists(), f"{page.name}: {target}"
            checked += 1
    assert checked > 100


def test_every_picture_has_an_alternative_text() -> None:
    for page in TEXTS:
        text = page.read_text(encoding="utf-8")
        for alternative in re.findall(r"!\[(.*?)\]\(", text):
            assert len(alternative) >= 8, page.name
        assert "<img" not in text


def test_every_mention_of_the_version_matches_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == omninorm.__version__
    assert f"## {omninorm.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert omninorm.__version__ not in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


# Public names -------------------------------------------------------------------------------------------------------

API = "\n".join(path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.md"))
DOCUMENTED = re.findall(r"automodule:: (\S+)", API)


def test_the_api_page_lists_the_names_of_the_package() -> None:
    facade = (DOCS / "api" / "index.md").read_text(encoding="utf-8").split("```")[0]
    assert set(re.findall(r"`(\w+)`", facade)) - {"omninorm"} == set(omninorm.__all__)


def test_every_public_package_has_a_page() -> None:
    """A package is public if it has `__all__`."""
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
        "omninorm.monitor.callbacks",
    }
    assert public - internal <= set(DOCUMENTED), public - internal - set(DOCUMENTED)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_public_function_and_class_has_a_docstring(name: str) -> None:
    importlib.import_module(name)
    module = sys.modules[name]
    names = getattr(module, "__all__", [key for key in vars(module) if not key.startswith("_")])
    for public in names:
        value = getattr(module, public)
        if callable(value) and getattr(value, "__module__", "").startswith("omninorm"):
            assert value.__doc__, f"{name}.{public}"


# The lesson's numbers ------------------------------------------------------------------------------------------------


def test_a_changed_number_in_the_lesson_fails_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("lesson_under_test", DOCS / "lesson" / "lesson.py")
    lesson = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lesson)
    glued = {}
    monkeypatch.setattr(lesson, "glue", lambda name, value, display: glued.update({name: value}))
    monkeypatch.setattr(lesson, "NUMBERS", tmp_path / "numbers.json")
    monkeypatch.setenv(lesson.BUILDING, "1")
    with pytest.raises(ValueError, match=r"page\.size differs from numbers\.json"):
        lesson.number("page.size", 3.0)
    monkeypatch.setenv(lesson.UPDATE, "1")
    lesson.number("page.size", 3.0)
    monkeypatch.delenv(lesson.UPDATE)
    assert lesson.number("page.size", 3.05, "{:.1f}") == glued["page.size"] == "3.0"
    with pytest.raises(ValueError, match=r"3\.1 for 3\.0"):
        lesson.number("page.size", 3.1)
    assert lesson.number("page.time", 7.0, "{:.0f}", within=None) == "7"
    with pytest.raises(ValueError, match=r"otherwise: 3"):
        lesson.check(False, 3)
    lesson.check(True)
    # Outside of the build a reader may change a page and run it.
    monkeypatch.delenv(lesson.BUILDING)
    lesson.number("page.size", 99.0)
    lesson.check(False)
