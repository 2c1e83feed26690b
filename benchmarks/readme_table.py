"""Fill the README with the output of its example and with the tables of `benchmarks/results`.

    python -m benchmarks.readme_table            # writes README.md
    python -m benchmarks.readme_table --check    # exit code 1 if its tables are not those of the results

What stands between ``<!-- results: begin -->`` and ``<!-- results: end -->`` is written anew, as is the output of the
example between ``<!-- output: begin -->`` and ``<!-- output: end -->``. The example is the first block of Python.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BATCH = 8
"""The batch size of the table of steps; the JSON holds the others."""


def results() -> str:
    """The tables, in Markdown."""
    counts = [_reach(RESULTS / "reach.json"), _axes(RESULTS / "axes.json"), _elastic(RESULTS / "elastic_convert.json")]
    parts = [*counts, _bytes(RESULTS / "bytes_kept.json")]
    parts += [_steps(path) for path in sorted(RESULTS.glob("training_step_*.json"))]
    return "\n\n".join(part for part in parts if part)


def _results(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["results"] if path.exists() else []


def _reach(path: Path) -> str:
    rows = _results(path)
    counts = Counter(row["result"] for row in rows)
    told = ", ".join(f"{count} {result}" for result, count in counts.most_common())
    if not rows:
        return ""
    return (
        f"**Same numbers as eager.** Of {len(rows)} architectures (torchvision, timm, transformers, our own), stepped "
        f"three times with an optimizer beside eager: {told} ([docs/models.md](docs/models.md), `make reach`)."
    )


def _axes(path: Path) -> str:
    rows = _results(path)
    right = [r for r in rows if r.get("forward", {}).get("permutation") == "ok"]
    reached = sum(r["forward"]["fixed"] <= 0.1 for r in right)
    if not rows:
        return ""
    return (
        f"**Axes.** Permuting every free axis everywhere at once left the outputs of {len(right)} of {len(rows)} as "
        f"they were; in {reached} free axes reach at least 90 % of the parameters ([docs/axes.md](docs/axes.md))."
    )


def _elastic(path: Path) -> str:
    """Rows without checks were made elastic, and nothing was run on data."""
    rows = _results(path)
    made = [row for row in rows if row["result"] == "ok"]
    rigid = sum(row["rigid"] <= 0.1 for row in made)
    checked = [row for row in rows if row["checks"]]
    right = sum(set(row["checks"].values()) == {"ok"} for row in checked)
    if not rows:
        return ""
    return (
        f"**Elastic.** Of {len(rows)} architectures given without configuration {len(made)} became elastic, {rigid} "
        f"with at most 10 % of their parameters rigid; of the {len(checked)} whose subnets were checked by execution "
        f"{right} passed all checks ([docs/elastic_models.md](docs/elastic_models.md))."
    )


def _bytes(path: Path) -> str:
    if not path.exists():
        return ""
    data = json.loads(path.read_text())
    lines = [
        f"**Memory kept for backward**, MiB, gradients bit-equal with eager's ({_machine(data['machine'])}; "
        "`python -m benchmarks.bytes_kept`):",
        "",
        "| model | trained | eager | torch.compile | graphopt | bit-packed masks | eager / graphopt | time, of eager |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in data["rows"]:
        sizes = (row.get(f"{who}_bytes") for who in ("eager", "compile", "ours", "packed"))
        cells = [row["model"], row["trained"], *(f"{size / 2**20:.1f}" if size is not None else "-" for size in sizes)]
        cells += [f"{row['eager_to_ours']:.1f}", f"{row['ours_ratio']:.2f}" if "ours_ratio" in row else "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _steps(path: Path) -> str:
    data = json.loads(path.read_text())
    rows = [row for row in data["steps"] if row["batch"] == BATCH]
    names = list(dict.fromkeys(row["name"] for row in rows if row["name"] != "eager"))
    lines = [
        f"**Time of a step**, as a ratio to eager with its default optimizer (below 1: faster), batch {BATCH}, "
        f"{_machine(data['machine'])} (`make bench`):",
        "",
        f"| model | {' | '.join(names)} | FLOPs, eager → graphopt |",
        f"|---|{'---:|' * (len(names) + 1)}",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        by_name = {row["name"]: row for row in rows if row["model"] == model}
        cells = [f"{by_name[name]['ratio to eager']:.2f}" if name in by_name else "-" for name in names]
        lines.append(f"| {model} | {' | '.join(cells)} | {_flops(by_name)} |")
    for row in data["host_overhead"]:
        if row["name"] in ("flat graph", "flat fused"):
            lines += ["", f"MLP at batch 1 on one thread, {row['part']}: {row['ratio']:.2f} of {row['baseline']}."]
    return "\n".join(lines)


def _flops(by_name: dict[str, dict[str, Any]]) -> str:
    eager, ours = (by_name.get(name, {}).get("flops") for name in ("eager", "flat"))
    if not eager or not ours:
        return "-"
    return f"{eager / 1e9:.2f} G" + (f" → {ours / 1e9:.2f} G" if ours != eager else "")


def _machine(machine: dict[str, Any]) -> str:
    threads = machine["threads"]
    where = machine["gpu"] or f"{machine['cpu']}, {threads} thread{'s' if threads > 1 else ''}"
    return f"{where}, torch {machine['torch']}"


def example_output(text: str) -> str:
    """What the README's example prints."""
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert found is not None, "README.md holds no example"
    with TemporaryDirectory() as cache:  # as on a machine where nothing was measured yet
        environment = os.environ | {"GRAPHOPT_CACHE_DIR": cache, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", found[1]]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=ROOT)
    return f"```\n{run.stdout.rstrip()}\n```"


def replaced(text: str, marker: str, content: str) -> str:
    """``text`` with ``content`` between the two comments of ``marker``."""
    begin, end = f"<!-- {marker}: begin -->", f"<!-- {marker}: end -->"
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    assert found, f"README.md holds no {begin} ... {end}"
    return f"{before}{begin}\n{content}\n{end}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme_table")
    parser.add_argument("--check", action="store_true", help="write nothing, compare the tables")
    options = parser.parse_args(arguments)
    text = README.read_text()
    filled = replaced(text, "results", results())
    if options.check:
        return int(filled != text)
    README.write_text(replaced(filled, "output", example_output(text)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
