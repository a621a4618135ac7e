"""What is installed is what pyproject.toml asks for, and names that other packages also use are ours."""

import ast
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [Requirement(line) for line in PROJECT["dependencies"]]
USERS_PACKAGES = {
    "torch": "torch",
    "torchaudio": "torchaudio",
    "transformers": "transformers",
    "laion-clap": "laion_clap",
    "k-diffusion": "k_diffusion",
    "descript-audio-codec": "dac",
    "accelerate": "accelerate",
    "safetensors": "safetensors",
}


def imported_by(path: Path) -> set[str]:
    """Top-level modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def run_elsewhere(code: str, folder: Path) -> str:
    """Output of `python -c code` started in an unrelated folder without our PYTHONPATH."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda r: r.name)
def test_installed_version_lies_in_the_range_that_pyproject_gives(requirement):
    version = importlib.metadata.version(requirement.name)
    assert requirement.specifier.contains(version, prereleases=True), f"{requirement.name} {version}"


@pytest.mark.parametrize("name", USERS_PACKAGES)
def test_the_users_packages_are_required_as_ranges_and_installed(name):
    (requirement,) = [r for r in REQUIREMENTS if r.name == name]
    assert all(part.operator != "==" for part in requirement.specifier)
    assert importlib.util.find_spec(USERS_PACKAGES[name]) is not None


@pytest.mark.parametrize("module", ["training", "evaluation"])
def test_names_that_other_packages_use_are_ours_here(module):
    assert Path(importlib.util.find_spec(module).origin).parent == ROOT / module


def test_training_stays_ours_when_laion_claps_folder_is_on_the_path(tmp_path):
    # laion_clap puts its own folder, which holds another `training`, at the end of sys.path.
    folder = Path(importlib.util.find_spec("laion_clap").origin).parent
    code = f"import sys; sys.path.insert(1, {str(ROOT)!r}); sys.path.append({str(folder)!r}); "
    assert Path(run_elsewhere(code + "import training; print(training.__file__)", tmp_path)).parent == ROOT / "training"


@pytest.mark.parametrize("module", ["k_diffusion", "dac", "laion_clap", "nara_wpe"])
def test_each_borrowed_package_is_touched_in_one_file_at_most(module):
    files = [p.relative_to(ROOT) for p in (ROOT / "stable_audio_lite").rglob("*.py") if module in imported_by(p)]
    assert len(files) <= 1, files


def test_every_package_that_the_code_imports_is_required():
    known = importlib.metadata.packages_distributions()
    ours = {"stable_audio_lite", "training", "evaluation", "tests"}
    peers = {"stable_audio_tools", "diffusers"}  # measured beside ours where they are installed
    extras = {k: v for k, v in PROJECT["optional-dependencies"].items() if k != "dev"}
    extra = [Requirement(line) for lines in extras.values() for line in lines]
    required = {r.name.lower().replace("_", "-") for r in REQUIREMENTS + extra}
    for folder in ("stable_audio_lite", "training", "evaluation"):
        for path in (ROOT / folder).rglob("*.py"):
            for module in imported_by(path) - ours - peers - sys.stdlib_module_names:
                owners = {name.lower().replace("_", "-") for name in known.get(module, [module])}
                assert owners & required, f"{path.relative_to(ROOT)} imports {module}, which pyproject.toml lacks"


def test_the_wheel_holds_every_config():
    import setuptools

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = setuptools.find_namespace_packages(str(ROOT), include=settings["packages"]["find"]["include"])
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml")}
    assert len(folders) > 3 and {".".join(folder.parts) for folder in folders} <= set(packages)
    assert "*.yaml" in settings["package-data"]["*"]


def test_command_and_licence_are_declared():
    assert PROJECT["scripts"] == {"stable-audio-lite": "stable_audio_lite.cli:main"}
    assert PROJECT["license"] == "MIT" and (ROOT / "LICENSE").read_text().startswith("MIT License")


@pytest.mark.long
def test_a_wheel_works_outside_of_the_tree(tmp_path):
    """Built from a copy of the sources and unpacked in an empty folder, it makes a sound and knows its subcommands."""
    sources, site, empty = tmp_path / "sources", tmp_path / "site", tmp_path / "empty"
    sources.mkdir(), empty.mkdir()
    for name in ("stable_audio_lite", "training", "evaluation", "configs"):
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path, sources], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    command = [sys.executable, "-m", "stable_audio_lite.cli"]
    environment = os.environ | {"PYTHONPATH": str(site)}
    run = partial(subprocess.run, cwd=empty, env=environment, capture_output=True, text=True, check=True)
    listed = run([*command, "--help"]).stdout
    assert all(name in listed for name in ("generate", "plan", "evaluate"))
    assert str(site) in run([sys.executable, "-c", "import training; print(training.__file__)"]).stdout
    assert "stable_audio" in run([*command, "info", "stable_audio/tiny"]).stdout  # configs are in there too
    run([*command, "generate", "solo piano", "--seconds", "1", "--steps", "2", "-o", "music.wav"])
    assert [path.name for path in empty.iterdir()] == ["music.wav"]
