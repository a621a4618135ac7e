"""Evaluation's imports: one way, training for benchmarks alone, and nothing heavy before a command runs."""

from __future__ import annotations

import graphlib
import subprocess
import sys
from pathlib import Path

from test_imports import imports

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "evaluation").rglob("*.py"))
}


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {name: imports(path) & MODULES.keys() - {name} for name, path in MODULES.items()}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert set(order) == set(MODULES)


def test_definitions_know_neither_networks_nor_pages_nor_commands() -> None:
    """What lies in metrics/ needs the sounds, the store and the result; of the rooms above it nothing."""
    allowed = {"evaluation", "evaluation.metrics", "evaluation.result", "evaluation.sounds", "evaluation.store"}
    for name, path in MODULES.items():
        if name.startswith("evaluation.metrics"):
            others = imports(path) & MODULES.keys()
            assert all(other in allowed or other.startswith("evaluation.metrics") for other in others), (name, others)


def test_benchmarks_alone_import_training() -> None:
    found = {name for name, path in MODULES.items() if any(m.split(".")[0] == "training" for m in imports(path))}
    assert found and all(name.startswith("evaluation.benchmarks.") for name in found)


def test_the_evaluate_command_loads_nothing_heavy_before_it_runs() -> None:
    code = (
        "import sys, evaluation.run, evaluation.commands; "
        "heavy = {'torch', 'numpy', 'soundfile', 'accelerate', 'jinja2', 'tqdm'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
