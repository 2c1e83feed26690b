"""The example of the page is run as a script, by real workers."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_example_runs(tmp_path):
    text = (ROOT / "docs" / "exploration.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    (tmp_path / "example.py").write_text(code)
    run = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert re.match(r"\{'width': \d+, 'layers': \d\} \{'lr': [\d.e-]+, 'batch': \d+\} [01]\.\d+$", run.stdout.strip())
