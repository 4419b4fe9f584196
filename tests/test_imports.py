"""The folders are the architecture: every module imports from floors below or its own folder, downwards."""

import ast
import graphlib
import re

import pytest
from conftest import ROOT

# The map of the README is the order: a module may import from rows below its own, and from its own folder.
ROWS = re.findall(r"^dydit_jax/(\w+)/?(?=\s|$)", (ROOT / "README.md").read_text(), re.MULTILINE)
# Third-party packages that may be known in one place only.
CONFINED = {
    "torch": ("convert/torch_files.py", "convert/torch_network.py"),
    "diffusers": (),
    "wandb": ("runtime/writers.py",),
    "tensorboardX": ("runtime/writers.py",),
    "grain": ("data/batches.py",),
    "diffrax": ("sampling/adaptive.py",),
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
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def unit(dotted: str) -> str:
    return dotted.split(".")[1]


def test_the_map_names_every_folder_and_module_once():
    found = {path.relative_to(ROOT / "dydit_jax").parts[0].removesuffix(".py") for path in MODULES} - {"__init__"}
    assert sorted(ROWS) == sorted(found)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    own = path.relative_to(ROOT / "dydit_jax").with_suffix("").parts[0]
    if own == "__init__":
        return
    for name in imported(path):
        if name.startswith("dydit_jax."):
            other = unit(name)
            assert other == own or ROWS.index(other) > ROWS.index(own), f"{path.name} imports {name} from above"


def test_modules_do_not_import_each_other_in_a_circle():
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in MODULES}
    # `from package import module` names the module as well as the package.
    below = {name: {other for other in imported(path) if other in names} - {name} for name, path in names.items()}
    graphlib.TopologicalSorter(below).prepare()  # raises a CycleError that names the circle


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
    for path in (ROOT / "dydit_jax" / "configs").glob("*.py"):
        for name in imported(path):
            assert name.split(".")[0] == "ml_collections" or name.startswith("dydit_jax.configs"), f"{path}: {name}"
