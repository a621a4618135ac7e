"""Imports go one way, cost nothing until used, and training and evaluation never meet."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# A module may import from its own layer or from those before it.
LAYERS = (
    ("errors", "files", "config", "command"),
    ("audio", "devices"),
    ("nn", "data", "corpus"),
    ("models",),
    ("diffusion",),
    ("bundle",),
    ("clap",),
    ("systems", "lora"),
    ("generation", "spectral", "pipeline", "restoration", "codec", "describe", "doctor"),
    ("cli",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


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
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        pending += ast.iter_child_nodes(node)
    return found


def layer(module: str) -> str | None:
    """`audio` for stable_audio_lite.audio.io, None for other packages and for the package itself."""
    parts = module.split(".")
    return parts[1] if parts[0] == "stable_audio_lite" and len(parts) > 1 and parts[1] in RANK else None


def test_library_imports_go_one_way() -> None:
    wrong = []
    for path in sorted((ROOT / "stable_audio_lite").rglob("*.py")):
        own = path.relative_to(ROOT / "stable_audio_lite").with_suffix("").parts[0]
        if own == "__init__":
            continue
        assert own in RANK, f"{own} has no place in LAYERS"
        for module in imports(path):
            other = layer(module)
            if other is not None and RANK[other] > RANK[own]:
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
            if module.split(".")[0] in ("training", "evaluation", "tests"):
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong, "\n".join(wrong)


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
