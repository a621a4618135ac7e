"""Imports go one way, cost nothing until used, and training and evaluation never meet."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]

PACKAGES = ("evaluation", "training", "stable_audio_lite")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports anywhere outside `if TYPE_CHECKING`."""
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute here"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
        pending += ast.iter_child_nodes(node)
    return found


def graph() -> dict[str, set[str]]:
    """The modules of this project that each of its modules imports."""
    return {
        module: {name for name in imports(path) if name in MODULES and name != module}
        for module, path in MODULES.items()
    }


def places() -> dict[str, int]:
    """The line of each file and folder in the README's tree, by its name as a module."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = text.split("## Where things are")[1].split("```")[1]
    found: dict[str, int] = {}
    package = ""
    for number, line in enumerate(tree.splitlines()):
        names = re.split(r"\s{2,}", line.strip())[0].split()
        if line[:1].strip():
            package = names[0].rstrip("/")
        else:
            found |= {f"{package}.{name.rstrip('/').removesuffix('.py')}": number for name in names}
    return found


def test_imports_go_down_the_readmes_list() -> None:
    """Every module has a place there; it imports from its own line or from those below, within functions too."""
    line = places()
    missing, wrong = [], []
    for module, imported in graph().items():
        if "." not in module:
            continue  # a package itself only hands out what is below
        own = ".".join(module.split(".")[:2])
        if own not in line:
            missing.append(module)
            continue
        for other in imported:
            below = line.get(".".join(other.split(".")[:2]))
            if "." in other and below is not None and below < line[own]:
                wrong.append(f"{module} imports {other}")
    assert not missing, missing
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_one_another() -> None:
    TopologicalSorter(graph()).prepare()  # raises CycleError


def test_the_library_imports_nothing_above_it() -> None:
    for path in (ROOT / "stable_audio_lite").rglob("*.py"):
        assert not {m for m in imports(path) if m.split(".")[0] in ("training", "evaluation", "tests")}, path


def test_what_all_systems_share_is_written_once() -> None:
    """One Fourier transform of frames, one module that knows k-diffusion's loops, one average of weights, one loop."""
    sources = {
        p: p.read_text() for d in ("stable_audio_lite", "training", "evaluation") for p in (ROOT / d).rglob("*.py")
    }
    for words, wanted in (
        ("torch.stft(", "audio/stft.py"),
        ("k_diffusion", "diffusion/samplers.py"),
        ("class EMA", "training/ema.py"),
        ("def fit(", "training/loop.py"),
        ("cumprod", "diffusion/process.py"),
    ):
        found = [path for path, text in sources.items() if words in text]
        assert [path.as_posix().endswith(wanted) for path in found] == [True], (words, found)


def test_training_and_evaluation_never_import_each_other() -> None:
    for own, other in (("training", "evaluation"), ("evaluation", "training")):
        for path in (ROOT / own).rglob("*.py"):
            if path.parent.name != "benchmarks":  # which time training, among other things
                assert not {m for m in imports(path) if m.split(".")[0] == other}, path


def test_importing_the_package_and_the_command_loads_nothing_heavy() -> None:
    code = (
        "import sys, stable_audio_lite, stable_audio_lite.cli, stable_audio_lite.audio.io; "
        "heavy = {'torch', 'transformers', 'soundfile', 'matplotlib', 'scipy', 'huggingface_hub', 'tqdm'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_sampling_loads_only_what_solvers_use() -> None:
    """k-diffusion's file also imports ODE and SDE solvers and SciPy, which take longer than a sound."""
    code = (
        "import sys, torch; from stable_audio_lite.diffusion.samplers import SAMPLERS; "
        "draw = lambda: torch.ones(1, 2); "
        "levels = torch.tensor([1.0, 0.5, 0.1, 0.0]); "
        "[solve(lambda x, sigma: x / 2, draw(), levels, noise=draw) for solve in SAMPLERS.values()]; "
        "print(sorted({'scipy', 'torchdiffeq', 'torchsde', 'torchvision', 'k_diffusion'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
