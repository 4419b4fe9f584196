"""The folders are the architecture: every module imports from floors below or its own folder, downwards."""

import ast

import pytest
from conftest import ROOT

# Lower number: nearer to the ground. A module may import from lower floors, and from modules of its own folder.
FLOORS = {
    "cache": 0,
    "errors": 0,
    "processes": 0,
    "records": 0,
    "trees": 0,
    "models": 1,
    "console": 1,
    "diffusion": 1,
    "sharding": 1,
    "programs": 1,
    "tracking": 1,
    "pictures": 1,
    "figures": 1,
    "report": 2,
    "convert": 2,
    "data": 2,
    "fast": 2,
    "latents": 2,
    "metrics": 2,
    "checkpoints": 2,
    "build": 3,
    "conversion": 3,
    "generate": 4,
    "loading": 4,
    "evaluation": 4,
    "sampling": 5,
    "preparation": 5,
    "update": 5,
    "trainer": 6,
    "analysis": 6,
}
# Third-party packages that may be known in one place only.
CONFINED = {
    "torch": ("convert/torch_files.py", "convert/torch_network.py"),
    "diffusers": (),
    "wandb": ("tracking.py",),
    "tensorboardX": ("tracking.py",),
    "grain": ("data/sources.py",),
}
MODULES = sorted((ROOT / "dydit_jax").rglob("*.py"))


def imported(path) -> list[str]:
    """Return the dotted names that a file imports, wherever in the file."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module)
            names += [f"{node.module}.{alias.name}" for alias in node.names if node.module.count(".") == 0]
    return names


def unit(dotted: str) -> str:
    return dotted.split(".")[1]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    parts = path.relative_to(ROOT / "dydit_jax").with_suffix("").parts
    if parts == ("__init__",):
        return
    own = parts[0]
    for name in imported(path):
        if not name.startswith("dydit_jax."):
            continue
        other = unit(name)
        assert other == own or FLOORS[other] < FLOORS[own] or (FLOORS[other], FLOORS[own]) in {(0, 0)}, (
            f"{path.name} (floor {FLOORS[own]}) imports {name} (floor {FLOORS[other]})"
        )


def test_models_and_diffusion_do_not_know_each_other():
    for folder, other in (("models", "diffusion"), ("diffusion", "models")):
        for path in (ROOT / "dydit_jax" / folder).glob("*.py"):
            assert not [name for name in imported(path) if name.startswith(f"dydit_jax.{other}")]


def test_optional_packages_are_confined():
    for path in MODULES:
        place = str(path.relative_to(ROOT / "dydit_jax"))
        for name in imported(path):
            package = name.split(".")[0]
            assert package not in CONFINED or place in CONFINED[package], f"{place} imports {package}"


def test_nothing_private_of_jax_is_used():
    for path in [*MODULES, *ROOT.glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        assert not [name for name in imported(path) if "._" in name], path


def test_configs_import_only_ml_collections():
    for path in (ROOT / "configs").glob("*.py"):
        assert {name.split(".")[0] for name in imported(path)} <= {"ml_collections", "configs"}
