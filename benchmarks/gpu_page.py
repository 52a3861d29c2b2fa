"""Writes the measured part of docs/gpu.md from results of `benchmarks/gpu.py`: `python benchmarks/gpu_page.py FILE`.

The script replaces the text between two markers in docs/gpu.md. Without a file, the text is that nothing has been
measured. With --print the text is printed instead. Results of a dry run are refused unless --print is given.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- measured: written by benchmarks/gpu_page.py -->", "<!-- end of measured -->"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "gpu.md"
NOTHING = """**Not yet measured on a GPU.** No run, comparison or norm of omninorm has been timed on a GPU, and none has
been run on one. `make gpu` checks and measures all of it in 8 minutes on a machine with Python, torch and Triton."""
# The targets for shares of copy bandwidth, and the smallest number of rows and the widths to which they apply.
TARGETS = {"forward": 0.90, "backward": 0.80}
LEAST_ROWS, WIDTHS = 4096, (1024, 16384)
SLOWEST, MOST_OVERHEAD = 1.05, 0.02
PASSES = {"forward": "Forward", "backward": "Backward", "add": "x + residual and its norm, forward"}
# The items with the overhead of the watch.
OVERHEADS = {"overhead": "eager", "overhead, long steps": "eager, large batch", "overhead, compiled": "compiled"}
Item = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("results", type=Path, nargs="?", help="the file that benchmarks/gpu.py wrote")
    parser.add_argument("--table", type=Path, help="also write the faster back ends into this kernels/measured.json")
    parser.add_argument("--print", action="store_true", help="print the text instead of writing docs/gpu.md")
    options = parser.parse_args()
    try:
        data = None if options.results is None else _read(options.results, options.print)
    except (OSError, ValueError) as error:
        print(f"gpu_page.py: {error}", file=sys.stderr)
        return 2
    if options.table is not None and data is not None:
        write_table(options.table, data, options.results.name)
    text = NOTHING if data is None else page(data)
    if options.print:
        print(text)
        return 0
    PAGE.write_text(between_markers(PAGE.read_text(encoding="utf-8"), text), encoding="utf-8")
    print(f"Written to {PAGE}")
    return 0


def _read(path: Path, dry: bool) -> dict[str, Any]:
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or "parts" not in data or "header" not in data:
        raise ValueError(f"{path} has no results of benchmarks/gpu.py. Pass the file that its option --json names.")
    if data["header"]["device"] != "cuda" and not dry:
        raise ValueError(f"{path} has the results of a dry run, whose times mean nothing. Use --print to see the text.")
    return data


def between_markers(document: str, text: str) -> str:
    """Return the document with the text between its markers."""
    before, rest = document.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{text.strip()}\n{END}{rest.split(END, 1)[1]}"


def write_table(path: Path, data: dict[str, Any], run: str) -> None:
    """Replace the measurements of this device in the table that chooses the back end of norms on GPUs."""
    table = json.loads(path.read_text(encoding="utf-8"))
    device = data["machine"]["name"]
    others = [each for each in table["measurements"] if each["device"] != device]
    table["measurements"] = [*others, *measurements(data, run)]
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def measurements(data: dict[str, Any], run: str) -> Iterator[Item]:
    """Yield the back end to choose for every size: "triton" if neither the GPU nor the host needs longer with it.

    Both times are for a forward and a backward pass. It depends on the model whether the host's time matters; if it
    does, it is many times the difference on the GPU.
    """
    dtypes = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    for item in items(data, "speed").values():
        seconds: dict[str, dict[str, float]] = {}
        for row in item.get("measured", []):
            if row["contestant"].startswith("omninorm ") and row["pass"] != "add":
                seconds.setdefault(row["contestant"].split()[1], {})[row["pass"]] = row["us"]
        whole = {name: sum(passes.values()) for name, passes in seconds.items() if len(passes) == 2}
        if len(whole) == 2:
            ours_is_faster = whole["triton"] < whole["torch"] and not _costs_the_host_more(data, item["kind"])
            yield {
                "device": data["machine"]["name"], "operator": item["kind"], "dtype": dtypes[item["dtype"]],
                "width": item["width"], "rows": item["rows"], "backend": "triton" if ours_is_faster else "torch",
                "run": run, "compiled": False,
            }  # fmt: skip


def _costs_the_host_more(data: dict[str, Any], kind: str) -> bool:
    """Return whether a call of Triton needs more of the host's time than PyTorch's operators, by more than the noise.

    The result is True if this was not measured.
    """
    times = items(data, "speed").get("host time of a call", {}).get("times", {})
    name = {"rms_norm": "RMSNorm", "layer_norm": "LayerNorm"}[kind]
    ours, theirs = (times.get(f"omninorm.{name} {backend}", {}) for backend in ("triton", "torch"))
    passes = ("with_graph_us", "backward_us")
    if any(each not in ours or each not in theirs for each in passes):
        return True
    return sum(ours[each] for each in passes) > SLOWEST * sum(theirs[each] for each in passes)


def page(data: dict[str, Any]) -> str:
    """Return the text in Markdown: the machine, targets and misses, then one section for each part."""
    parts = (_machine, _targets, _numerics, _speed, _host, _training, _watch, _failures)
    sections = [part(data) for part in parts]
    return "\n\n".join(section for section in sections if section)


def items(data: dict[str, Any], part: str) -> dict[str, Item]:
    """Return the items of a part that did not fail."""
    found = data["parts"].get(part, {}).get("items", {})
    return {key: item for key, item in found.items() if "error" not in item}


def _machine(data: dict[str, Any]) -> str:
    machine = data["machine"]
    gpu = machine["gpu"]
    memory = f", {gpu['devices'][0]['memory_gib']:g} GiB" if gpu["devices"] else ""
    facts = f"driver {gpu['driver']}, {gpu['runtime']}, torch {machine['torch']}, Triton {gpu['triton']}"
    peers = ", ".join(f"{name}: {state}" for name, state in machine["peers"].items())
    commit = f" at commit {machine['commit'][:10]}" if machine.get("commit") else ""
    how = "`make gpu`" if not data["header"]["quick"] else "`benchmarks/gpu.py --quick`"
    measured = f"Measured on **{machine['name']}**{memory}; {facts}; omninorm {machine['omninorm']}{commit}, by {how}."
    names = (
        "*omninorm triton* is omninorm's kernels, *omninorm torch* PyTorch's operators called by omninorm, and",
        "*omninorm auto* the one that omninorm chooses. *torch* and *torch.nn* are PyTorch's own norms.",
    )
    return f"{_prose(measured, f'Peers: {peers}.')}\n\n{_prose(*names)}"


def _prose(*sentences: str) -> str:
    """Return sentences as one paragraph of lines of at most 100 columns."""
    return textwrap.fill(" ".join(sentences), 100, break_long_words=False, break_on_hyphens=False)


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# Targets ------------------------------------------------------------------------------------------------------------


def _targets(data: dict[str, Any]) -> str:
    backends = data["machine"]["backends"]
    rows = [row for backend in backends for row in _bandwidth_targets(data, f"omninorm {backend}")]
    rows += [_peer_target(data, f"omninorm {backend}") for backend in backends]
    rows.append(_watch_target(data))
    return "### Targets\n\n" + _table(["target", "worst", "verdict"], rows)


def _sizes(data: dict[str, Any]) -> Iterator[Item]:
    """Yield the speed items whose size counts for the targets."""
    for item in items(data, "speed").values():
        if "measured" in item and item["rows"] >= LEAST_ROWS and WIDTHS[0] <= item["width"] <= WIDTHS[1]:
            yield item


def _bandwidth_targets(data: dict[str, Any], name: str) -> Iterator[list[str]]:
    for which, wanted in TARGETS.items():
        found = [
            (row["of_copy"], _place(item))
            for item in _sizes(data)
            for row in item["measured"]
            if row["contestant"] == name and row["pass"] == which
        ]
        missed = sorted(pair for pair in found if pair[0] < wanted)
        worst = min(found, default=None)
        text = f"{name}: {which} at least {wanted:.0%} of copy bandwidth"
        shown = "–" if worst is None else f"{worst[0]:.0%} ({worst[1]})"
        yield [text, shown, _verdict(len(found), len(missed))]


def _peer_target(data: dict[str, Any], name: str) -> list[str]:
    found = [
        (ratio["ratio"], f"{_place(item)} {ratio['pass']}, {ratio['peer']}")
        for item in _sizes(data)
        for ratio in item["ratios"]
        if ratio["contestant"] == name
    ]
    missed = [pair for pair in found if pair[0] > SLOWEST]
    worst = max(found, default=None)
    shown = "–" if worst is None else f"{worst[0]:.2f} × ({worst[1]})"
    return [f"{name}: at most {SLOWEST:.2f} × the best peer's time", shown, _verdict(len(found), len(missed))]


def _watch_target(data: dict[str, Any]) -> list[str]:
    found = items(data, "watch").get("overhead, long steps")
    share = None if found is None else found["watched"]["every=10"]["ratio"] - 1
    shown = "–" if share is None else f"{share:.1%}"
    verdict = _verdict(int(share is not None), int(share is not None and share > MOST_OVERHEAD))
    return [f"watch: at most {MOST_OVERHEAD:.0%} of a step of about 100 ms at every=10", shown, verdict]


def _place(item: Item) -> str:
    return f"{item['kind']} {item['dtype']} {item['rows']}×{item['width']}"


def _verdict(measured: int, missed: int) -> str:
    if not measured:
        return "not measured"
    return f"**missed** at {missed} of {measured}" if missed else f"met at all {measured}"


# Parts --------------------------------------------------------------------------------------------------------------


def _numerics(data: dict[str, Any]) -> str:
    found = items(data, "numerics")
    if not found:
        return ""
    compared = {key: item for key, item in found.items() if "worst" in item}
    rows = [
        [key, str(item["cases"]), ", ".join(f"{name} {share:.2f}" for name, share in item["worst"].items())]
        for key, item in compared.items()
    ]
    states = {key: "**wrong**" if item["wrong"] else "holds" for key, item in found.items() if key not in compared}
    text = "Largest errors against float64, as shares of the allowed error: 1 or less is right.\n\n"
    text += _table(["kernel", "cases", "largest error"], rows)
    if states:
        text += "\n\n" + "; ".join(f"{key}: {state}" for key, state in states.items()) + "."
    return "### Numerics\n\n" + text


def _speed(data: dict[str, Any]) -> str:
    """Return one table for each pass: the share of copy bandwidth by size and contestant."""
    found = [item for item in items(data, "speed").values() if "measured" in item]
    if not found:
        return ""
    names = list(dict.fromkeys(row["contestant"] for item in found for row in item["measured"]))
    tables = [_speed_table(found, names, which) for which in PASSES]
    intro = _prose(
        "Shares of copy bandwidth, by the GPU's time without the host's: the bytes per second that a norm must read",
        "and write, each once, over those of copying a tensor of the same size. The column *copy* is in GB/s.",
    )
    return "\n\n".join(["### Speed of the norms", intro, *tables])


def _speed_table(found: list[Item], names: list[str], which: str) -> str:
    rows = []
    for item in sorted(found, key=lambda item: (item["kind"], item["dtype"], item["width"])):
        shown = {row["contestant"]: f"{row['of_copy']:.2f}" for row in item["measured"] if row["pass"] == which}
        copied = next(row for row in item["measured"] if row["contestant"] == "copy")
        shown["copy"] = f"{copied['gb_per_s']:,.0f}"
        rows.append([_place(item), *(shown.get(name, "–") for name in names)])
    return f"**{PASSES[which]}**\n\n" + _table(["rows × width", *names], rows)


def _host(data: dict[str, Any]) -> str:
    item = items(data, "speed").get("host time of a call")
    if item is None:
        return ""
    passes = ("forward_us", "with_graph_us", "backward_us")
    rows = [
        [name, *(f"{each[which]:.1f}" if which in each else "–" for which in passes)]
        for name, each in item["times"].items()
    ]
    columns = ["module", "without gradients, µs", "with an autograd graph, µs", "backward, µs"]
    intro = f"The host's time for one call of a module on 16 rows of width {item['width']}, in float32."
    return f"### Host time of a call\n\n{intro}\n\n" + _table(columns, rows)


def _training(data: dict[str, Any]) -> str:
    rows = []
    for way, item in items(data, "training").items():
        for name, each in item["variants"].items():
            ratio = f"{item['ratios'][name]:.2f}" if name in item["ratios"] else "1"
            if name in item.get("ranges", {}):
                ratio += " ({:.2f} to {:.2f})".format(*item["ranges"][name])
            rows.append([f"{name}, {way}", f"{each['tokens_per_s']:,.0f}", f"{each['ms']:.1f}", ratio])
    if not rows:
        return ""
    columns = ["norms", "tokens/s", "ms per step", "speed over torch.nn"]
    intro = _prose(
        "A Thinker of 124 million weights under bfloat16 autocast, with omninorm's norms and with torch.nn's. The",
        "variants take turns. The last column is the median over the rounds, and their range.",
    )
    return f"### Training\n\n{intro}\n\n" + _table(columns, rows)


def _watch(data: dict[str, Any]) -> str:
    found = items(data, "watch")
    rows = [row for key, name in OVERHEADS.items() for row in _overheads(found.get(key, {}), name)]
    texts = ["### The watch"]
    if rows:
        intro = "What `omninorm.watch` adds to a training step, by its sampling interval."
        noise = "*Noise* is the difference between neighbouring measurements without a watch."
        texts.append(_prose(intro, noise))
        columns = ["step", "sequences", "step, ms", "sampling", "added, ms", "added", "noise, ms"]
        texts.append(_table(columns, rows))
    if (waits := found.get("host waits")) is not None:
        counts = f"{waits['plain']} without a watch, {max(waits['unsampled'])} without a sample"
        texts.append(f"Host waits in a step: {counts}, {max(waits['sampled'])} with a sample.")
    for key, item in found.items():
        if key.startswith("CUDA graph"):
            texts.append(f"{key}: {'; '.join(item['wrong']) or item.get('summary', 'as eager calls')}.")
    return "\n\n".join(texts) if len(texts) > 1 else ""


def _overheads(item: Item, name: str) -> Iterator[list[str]]:
    for sampling, each in item.get("watched", {}).items():
        noise = f"{item['noise_ms']:.2f}" if "noise_ms" in item else "–"
        batch, step = str(item.get("batch", "–")), f"{item['step_ms']:.1f}"
        yield [name, batch, step, sampling, f"{each['extra_ms']:+.2f}", f"{each['ratio'] - 1:+.1%}", noise]


def _failures(data: dict[str, Any]) -> str:
    """Return a list of the faults, and of the items that failed or did not run."""
    lines = []
    for name, part in data["parts"].items():
        if part["status"] != "done":
            lines.append(f"- {name}: {part['status']} after {len(part['items'])} items")
        for key, item in part["items"].items():
            lines += [f"- {name}, {key}: {text}" for text in item.get("wrong", [])]
            lines += [f"- {name}, {key}: failed: {item['error']}"] if "error" in item else []
            lines += [f"- {name}, {key}: {who}: {why}" for who, why in item.get("failed", {}).items()]
    return "### Wrong, failed or not run\n\n" + ("\n".join(lines) if lines else "Nothing.")


if __name__ == "__main__":
    raise SystemExit(main())
