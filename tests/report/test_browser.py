"""The report page in a browser: it is drawn, responds to input, and never runs text from a record."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace

import pytest
from helpers import synthetic_run as synthetic
from helpers.browser import REQUIRE, find_browser, open_page

from omninorm.record.signals import SIGNALS
from omninorm.report import read_run, render
from omninorm.report.story import Series


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faulty")
    return read_run(synthetic.run(folder / "run", scene="logits"))


@pytest.mark.parametrize(("required", "outcome"), [("", pytest.skip.Exception), ("1", pytest.fail.Exception)])
def test_missing_browser_skips_the_test_unless_it_is_required(monkeypatch, required, outcome):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv(REQUIRE, required)
    with pytest.raises(outcome, match="no browser"):
        find_browser()


def test_browser_reports_errors_and_refused_scripts(faulty, tmp_path):
    """Without this, the tests below could not fail."""
    broken = render(faulty).replace("'use strict';", "'use strict'; nowhere.nothing;")
    shown = open_page(broken, tmp_path)
    assert any("Content Security Policy" in line for line in shown.console), "a changed script must be refused"
    assert "data-ready=" not in shown.dom
    shown = open_page(render(faulty), tmp_path, "nowhere.nothing;")
    assert any("nowhere is not defined" in line for line in shown.console)


def test_faulty_run_is_drawn_with_its_alarms(faulty, tmp_path):
    shown = open_page(render(faulty), tmp_path)
    assert shown.console == []
    drawn = len(SIGNALS) - 2 + 3  # two are missing; loss, gradient norm and learning rate are added
    assert f'data-ready="{drawn}"' in shown.dom
    assert f'data-drawn="{drawn}"' in shown.dom
    assert shown.dom.count("<canvas role=") == drawn
    assert "<h1>Failing: attention logits in blocks.8</h1>" in shown.dom
    assert "The attention logits of blocks.8 passed 1e4 and went on growing" in html.unescape(shown.dom)
    for alarm in faulty.alarms:
        assert (
            f'aria-label="{"Failure" if alarm.severity == "fail" else "Warning"} at step {alarm.step}: {alarm.rule}'
            in shown.dom
        )
    assert shown.dom.count('class="tick ') == len(faulty.alarms) == 5
    # The alarm of the verdict is chosen, and marked in the maps that have its layer: of blocks and of groups.
    assert len(re.findall(r'<button[^>]* aria-pressed="true"', shown.dom)) == 1
    by_layer = [name for name, signal in SIGNALS.items() if signal.axis in ("block", "group")]
    assert shown.dom.count('class="box"') == len(by_layer)


@pytest.mark.parametrize("scene", ["healthy", "nan"])
def test_other_runs_are_drawn_without_errors(tmp_path, scene):
    shown = open_page(render(read_run(synthetic.run(tmp_path / "run", scene=scene, samples=20))), tmp_path)
    assert shown.console == []
    assert "data-drawn=" in shown.dom
    assert ("No alarm" in shown.title) == (scene == "healthy")
    assert (">NaN<" in shown.dom) == (scene == "nan")


@pytest.mark.parametrize("kinds", ["train", "empty"])
def test_panels_without_a_signal_are_left_out_and_the_table_says_why(tmp_path, kinds):
    folder = synthetic.run(tmp_path / "run", kinds="train" if kinds == "train" else "watch", samples=4)
    if kinds == "empty":
        record = folder / "record.jsonl"
        record.write_bytes(record.read_bytes().splitlines(keepends=True)[0])
    shown = open_page(render(read_run(folder)), tmp_path)
    assert shown.console == []
    reason = "The run was recorded without omninorm.watch." if kinds == "train" else "No sample was taken."
    assert shown.dom.count(f"<td>{reason}</td>") == len(SIGNALS)
    assert shown.dom.count("<figure") == (4 if kinds == "train" else 0)
    assert f'data-drawn="{4 if kinds == "train" else 0}"' in shown.dom
    # Nor are there sections without content.
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", shown.dom)
    assert headings == ["Alarms", "The run", *(["Training"] if kinds == "train" else []), "Signals without values"]


def test_text_from_a_record_is_never_executed(tmp_path):
    story = read_run(synthetic.run(tmp_path / "run", scene="hostile", prefix=synthetic.HOSTILE, samples=10))
    # The policy would refuse the scripts as well; without it, escaping alone must hold.
    page = render(story)
    bare = page.replace('<meta http-equiv="Content-Security-Policy"', '<meta name="none"')
    assert bare != page
    shown = open_page(bare, tmp_path)
    assert shown.console == []
    assert shown.title != "pwned"
    assert "data-drawn=" in shown.dom, "the page's own script must have run"
    assert html.escape(synthetic.HOSTILE, quote=False) in shown.dom
    assert shown.dom.count("<script") == 2
    assert "<img" not in shown.dom


USE = """
const fire = (element, key) => element.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true, cancelable: true}));
const map = document.querySelector('[data-name="attention_logit"] .plot');
fire(map, 'End'); fire(map, 'ArrowDown'); fire(map, 'ArrowDown');
const spoken = document.getElementById('live').textContent;
const box = map.getBoundingClientRect();
map.dispatchEvent(new PointerEvent('pointermove', {clientX: box.right - 12, clientY: box.top + 16, bubbles: true}));
const tip = document.getElementById('tip').innerText.replaceAll('\\n', ', ');
const head = [...document.querySelectorAll('#table-layers thead button')].find(each => each.textContent === 'Largest attention logit');
const top = () => document.querySelector('#table-layers tbody th').textContent;
head.click(); const most = top(); const sorted = head.parentElement.getAttribute('aria-sort');
head.click(); const least = top();
document.querySelector('.tick').click();
const marked = document.querySelector('tr.chosen').id;
document.getElementById('theme').click();
return [spoken, tip, most, sorted, least, marked, document.documentElement.dataset.theme].join('|');
"""


def test_page_responds_to_keys_pointer_sorting_selection_and_theme(faulty, tmp_path):
    shown = open_page(render(faulty), tmp_path, USE)
    assert shown.console == []
    spoken, tip, most, sorted_, least, marked, theme = html.unescape(shown.result()).split("|")
    newest = faulty.columns[-1].signals["attention_logit"]
    names = list(faulty.watched.blocks)
    for told, row in ((spoken, 2), (tip, 0)):
        value, layer, step = told.split(", ")
        assert (layer, step) == (names[row], "step 600")
        # bfloat16 rounds to 2^-8, three digits to 1/200 at most.
        assert float(value.replace(",", "")) == pytest.approx(newest[row], rel=2**-8 + 0.005)
    assert most == names[newest.index(max(newest))]
    assert sorted_ == "descending"
    assert least == names[newest.index(min(newest))], "parts without a value stay at the end"
    assert marked == "alarm-0"
    assert theme in ("dark", "light")


AGAIN = """
const before = sessionStorage.getItem('test');
sessionStorage.setItem('test', 'yes');
if (!before) {
  window.scrollTo({top: 700, behavior: 'instant'});
  document.querySelectorAll('.tick')[4].click();
  document.getElementById('theme').click();
  return 'first';
}
for (let timer = 0; timer < 1000; timer++) clearTimeout(timer);  // or it would load itself for ever
const pressed = document.querySelector('.tick[aria-pressed="true"]');
return [Math.round(window.scrollY), pressed && pressed.dataset.alarm, document.documentElement.dataset.theme].join(' ');
"""


def test_live_page_loads_itself_again_and_keeps_what_the_reader_sees(faulty, tmp_path):
    shown = open_page(render(faulty, refresh=1), tmp_path, AGAIN)
    assert shown.console == []
    assert shown.result() == "700 4 dark"


# Changing the theme redraws every figure; printing draws them immediately.
LABELS = """
const told = {}, before = CanvasRenderingContext2D.prototype.fillText;
CanvasRenderingContext2D.prototype.fillText = function (text, x, y, most) {
  const figure = this.canvas.closest('figure');
  if (figure) {
    const wide = Math.min(this.measureText(text).width, most ?? Infinity);
    (told[figure.dataset.name] ??= []).push([text, this.textAlign, this.textAlign === 'right' ? x - wide : x - wide / 2]);
  }
};
document.getElementById('theme').click();
window.dispatchEvent(new Event('beforeprint'));
return JSON.stringify(told);
"""


def labels_of(story, folder):
    """Each figure's labels: text, alignment, and where its left end is."""
    shown = open_page(render(story), folder, LABELS)
    assert shown.console == []
    return json.loads(html.unescape(shown.result()))


@pytest.mark.parametrize(
    ("rates", "labels"),
    [
        ([0.00105] * 600, ["0.00105"]),
        ([1.25e-7] * 600, ["1.25e-7"]),
        ([0.0] * 600, ["0"]),
        ([0.00095 + 1e-4 * step / 600 for step in range(1, 601)], ["0.00095", "0.00100", "0.00105"]),
        ([6e-5 * step / 600 for step in range(1, 601)], ["0", "2e-5", "4e-5", "6e-5"]),
        ([2e8 + 1e6 * step / 600 for step in range(1, 601)], ["2.000e8", "2.005e8", "2.010e8"]),
    ],
)  # fmt: skip
def test_axis_labels_share_a_notation_and_fit(faulty, tmp_path, rates, labels):
    story = replace(faulty, series={**faulty.series, "lr": Series(list(range(1, 601)), rates)})
    told = labels_of(story, tmp_path)
    assert [text for text, align, _ in told["step-lr"] if align == "right"] == labels
    assert all(left >= 0 for drawn in told.values() for _, _, left in drawn)


def test_axis_begins_with_the_first_step_and_rows_are_named(faulty, tmp_path):
    told = labels_of(faulty, tmp_path)
    for name in ("step-loss", "stream_rms", "weight_rms"):
        assert [text for text, align, _ in told[name] if align == "center"][:2] == ["1", "100"], name
    rows = [text for text, align, _ in told["weight_rms"] if align == "right"]
    assert rows[0] == "0"
    assert "embedding" in rows


@pytest.mark.parametrize("width", [500, 1200])
def test_alarm_table_fits_the_page(tmp_path, width):
    long = "model.very_long_name_of_layers" * 3
    page = render(read_run(synthetic.run(tmp_path / "run", scene="logits", prefix=long, samples=10)))
    script = """
const place = document.querySelector('#table-alarms').parentElement;
place.closest('details').open = true;
return [place.scrollWidth - place.clientWidth, place.scrollHeight - place.clientHeight, place.clientWidth];
"""
    wider, higher, wide = map(int, open_page(page, tmp_path, script, width).result().split(","))
    assert (wider, higher) == (0, 0)
    assert 300 < wide < width


@pytest.mark.parametrize("scene", ["logits", "hostile"])
def test_page_does_not_scroll_sideways_on_a_phone(tmp_path, scene):
    """In a frame of 360 pixels, since a window has a smallest width."""
    long = "model.very_long_name_of_layers" * 3
    inner = render(read_run(synthetic.run(tmp_path / "run", scene=scene, prefix=long, samples=10)))
    (tmp_path / "inner.html").write_text(_measured(inner), encoding="utf-8")
    shown = open_page(
        '<!doctype html><html><iframe src="inner.html" width="360" height="800"></iframe></html>', tmp_path
    )
    # By the console, because frames of files can't see each other.
    (told,) = [re.search(r"window=(\d+) visible=(\d+) page=(\d+)", line) for line in shown.console]
    window, visible, page = map(int, told.groups())
    assert window == 360
    assert page == visible <= window


def _measured(page: str) -> str:
    bare = page.replace('<meta http-equiv="Content-Security-Policy"', '<meta name="none"')
    root = "document.documentElement"
    script = (
        f"console.log(`window=${{window.innerWidth}} visible=${{{root}.clientWidth}} page=${{{root}.scrollWidth}}`)"
    )
    return bare.replace("</body>", f"<script>{script}</script></body>")
