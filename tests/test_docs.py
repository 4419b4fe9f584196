"""The pages stay true: links and files exist, commands parse, snippets run, tables hold the numbers of their files."""

import ast
import contextlib
import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from decimal import ROUND_HALF_EVEN, ROUND_HALF_UP, Decimal

import jax
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from stand_ins import small_autoencoder

from dydit_jax import Pipeline, to_uint8
from dydit_jax.checkpoints import Weights, save_autoencoder
from dydit_jax.diffusion.process import Diffusion
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.models.config import DiTConfig
from dydit_jax.models.dit import Model
from dydit_jax.runtime import console

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SCRIPTS = [*ROOT.glob("*.py"), *(ROOT / "tools").glob("*.py")]
COMMANDS = {
    str(path.relative_to(ROOT)): re.search(r"from dydit_jax\.cli\.(\w+) import", path.read_text())[1]
    for path in SCRIPTS
} | {
    name: entry.removeprefix("dydit_jax.cli.").removesuffix(":main")
    for name, entry in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"].items()
}
# What the commands call once their flags are parsed.
JOBS = [
    ("cli.train", "train_and_evaluate"),
    ("cli.sample", "sample"),
    ("cli.evaluate", "evaluate"),
    ("cli.analyze", "analyze"),
    ("cli.convert", "convert"),
    ("cli.convert", "export"),
    ("cli.convert", "merge"),
    ("cli.convert", "push"),
    ("cli.prepare_latents", "prepare_latents"),
    ("cli.prepare_latents", "verify_latents"),
    ("data.packing", "prepare_pictures"),
    ("cli.search_solver", "search_solver"),
]
# A page whose snippets have a test of their own, which compiles what they define.
RUN_ELSEWHERE = {"docs/extend.md"}


def blocks(page, language: str = "") -> list[str]:
    """Return the code blocks of a page that name a language, or none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [code for name, code in found if name == language]


def prose(page) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def is_command(text: str) -> bool:
    return bool(re.match(r"(dydit-[a-z-]+ -|(\.venv/bin/)?python \S+\.py)", text))


def commands(whole: bool) -> list:
    """Return (page, command): whole ones from code blocks, or those in sentences, which may leave flags out."""
    found = []
    for page in PAGES:
        lines = [line.split(" #")[0].strip() for code in blocks(page) for line in code.splitlines()]
        spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]
        texts = [text for text in (lines if whole else spans) if text and is_command(text)]
        found += [pytest.param(text, id=f"{page.name}: {text[:60]}") for text in texts]
    return found


def slug(heading: str) -> str:
    """Return the anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page):
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"out", "runs"}
    packages = {path.name for path in (ROOT / "dydit_jax").iterdir() if path.is_dir()}
    for name in re.findall(r"`([\w./-]+/[\w.-]*)`", prose(page)):
        first = name.split("/")[0]
        if first in folders:
            assert (ROOT / name).exists(), f"{page.name} names {name}"
        elif first in packages and name.endswith(".py"):
            assert (ROOT / "dydit_jax" / name).exists(), f"{page.name} names {name}"


def test_every_measured_file_has_its_command_on_a_page():
    text = " ".join(page.read_text() for page in PAGES)
    for path in (ROOT / "docs" / "speed").glob("*.json"):
        assert path.name in text, path.name


def test_every_test_named_exists():
    """In a cell, a test without a file is of the file before it."""
    text, named = prose(ROOT / "docs" / "reliability.md"), 0
    for cell in re.split(r"\||\n", text):
        file = None
        for name, test in re.findall(r"`(?:(test_\w+\.py)::)?(test_\w+)`", cell):
            file, named = name or file, named + 1
            assert f"def {test}(" in (ROOT / "tests" / file).read_text(), f"{file}::{test}"
    assert named > 60


def test_targets_of_make_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for page in PAGES:
        lines = [line for code in blocks(page) for line in code.splitlines()]
        lines += re.findall(r"`(make[^`]*)`", prose(page))
        for line in lines:
            if line.startswith("make "):
                assert line.split()[1] in targets, line


def test_make_removes_nothing_that_it_did_not_make():
    text = (ROOT / "Makefile").read_text()
    removed = re.search(r"^clean:\n\trm -rf (.*)$", text, re.MULTILINE)[1].split()
    assert set(removed) == {"$(VENV)", "$(NEWEST_VENV)", *re.findall(r"--out (\S+)", text)}


# --- Commands ------------------------------------------------------------------------------------


@pytest.fixture
def typed(monkeypatch, capsys):
    """Return a function that runs a command with its job left out: what it said, and what the job was asked."""

    def run(words: list[str]) -> tuple[str, list]:
        module, asked = importlib.import_module(f"dydit_jax.cli.{COMMANDS[words[0]]}"), []
        for place, name in JOBS:
            monkeypatch.setattr(f"dydit_jax.{place}.{name}", lambda *request, **_: asked.append(request))
        monkeypatch.setattr(console.logging, "basicConfig", lambda **_: None)
        monkeypatch.setattr(console, "_hush_storage", lambda: None)
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.delitem(sys.modules, "config_config", raising=False)  # the config that was read before
        with contextlib.suppress(SystemExit):
            module.main()
        captured = capsys.readouterr()
        return captured.out + captured.err, asked

    return run


def words_of(command: str) -> list[str]:
    """Split a command; `...` stands for something that is the reader's own."""
    words = [word for word in shlex.split(command) if word != "--distributed"]  # other processes would be waited for
    words = words[1:] if words[0].endswith("python") else words
    own = {"--config": "digits_dit", "--workdir": "runs/own"}
    return [own.get(before, word) if word == "..." else word for before, word in zip(["", *words], words)]


def flags_of_script(path) -> set[str]:
    """Return the flags that a benchmark and its neighbours define; importing several would define some twice."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    own = {call.args[0].value for call in calls if ast.unparse(call.func).startswith("flags.DEFINE")}
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    neighbours = [path.with_name(f"{name}.py") for name in names]
    return own.union(*(flags_of_script(neighbour) for neighbour in neighbours if neighbour.is_file()))


def require_flags(words: list[str], typed) -> None:
    """Check that a program has all flags of a command."""
    if words[0] in COMMANDS:
        known = set(re.findall(r"^  --([\w.]+)", typed([words[0], "--help"])[0], re.MULTILINE)) | {"help", "version"}
    else:
        known = flags_of_script(ROOT / words[0])
    for word in words[1:]:
        if word.startswith("--"):
            name = word[2:].split("=")[0]
            assert name in known or (name.startswith("no") and name[2:] in known), f"{words[0]} has no {word}"


@pytest.mark.parametrize("command", commands(whole=True))
def test_commands_of_code_blocks_parse(command, typed, tmp_path, monkeypatch):
    words = words_of(command)
    if words[0] not in COMMANDS:
        require_flags(words, typed)
        return
    for folder in ("configs", "assets"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    said, asked = typed(words)
    assert len(asked) == 1, said


@pytest.mark.parametrize("command", commands(whole=False))
def test_commands_in_sentences_have_these_flags(command, typed):
    require_flags(words_of(command), typed)


# What makes a command of the README short.
SHORT = {
    "train.py": ("--config.train.steps=2", "--config.data.batch_size=8"),
    "sample.py": ("--sampling.steps=2", "--weights=params"),
    "analyze.py": ("--num_examples=8", "--num_timesteps=2"),
}


@pytest.mark.slow
def test_commands_of_the_readme_run_one_after_the_other(tmp_path):
    """Those that need no network: a training, a fine-tuning of its result, images of that, an analysis."""
    for path in (ROOT / "configs", ROOT / "assets", *SCRIPTS):
        (tmp_path / path.name).symlink_to(path)
    environment, done = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT)), []
    for command in (parameter.values[0] for parameter in commands(whole=True) if "README" in parameter.id):
        script, *rest = words_of(command)
        if script in SHORT and "xl2" not in command:
            process = [sys.executable, script, *rest, *SHORT[script]]
            result = subprocess.run(process, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
            assert result.returncode == 0, result.stderr
            done.append(script)
    assert done == 2 * ["train.py", "train.py", "sample.py", "analyze.py"]  # of a diffusion, of a flow
    assert (tmp_path / "out" / "grid" / "grid.png").is_file()
    assert (tmp_path / "out" / "analysis" / "report.html").is_file()


# --- Snippets ------------------------------------------------------------------------------------


def run_snippet(code: str) -> tuple[str, dict]:
    """Run a snippet, with two steps for any run, and return what it printed and its names."""
    code, printed, names = re.sub(r'steps="ddim\d+"', 'steps="ddim2"', code), io.StringIO(), {}
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "snippet", "exec"), names)
    return printed.getvalue(), names


def random_like(shapes):
    """Return small random arrays of a tree of shapes; nothing is compiled."""
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: 0.1 * generator.standard_normal(leaf.shape, np.float32), shapes)


def test_snippet_of_the_readme_draws_digits(tmp_path, monkeypatch):
    [code] = blocks(ROOT / "README.md", "python")
    monkeypatch.chdir(tmp_path)
    printed, _ = run_snippet(code)
    assert re.fullmatch(r"\d\d% of the MACs, \d\d% of the heads\n", printed)
    assert Image.open(tmp_path / "digits.png").size[0] >= 3 * 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if blocks(page, "python") and str(page.relative_to(ROOT)) not in RUN_ELSEWHERE],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_snippets_of_a_page_run_one_after_the_other(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_snippet("\n".join(blocks(page, "python")))


@pytest.fixture
def latent_pipeline(tmp_path) -> Pipeline:
    """A tiny model of latents with a tiny autoencoder, both with random weights."""
    path = tmp_path / "autoencoder.safetensors"
    save_autoencoder(path, small_autoencoder(), {})
    config = DiTConfig(depth=1, width=32, heads=2, patch=2, side=4, classes=10, routers="first_on")
    sampling = SamplingConfig(sampler="ddim", steps="2", autoencoder=str(path))
    params = random_like(Model(config).abstract_params())
    return Pipeline(Weights(config, Diffusion(), sampling, params, {}))


@pytest.mark.slow
def test_snippet_of_the_readme_draws_decoded_latents(latent_pipeline, tmp_path, monkeypatch):
    [code] = blocks(ROOT / "README.md", "python")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Pipeline, "load", lambda name: latent_pipeline)
    drawn = run_snippet(code)[1]["drawn"]
    assert drawn.pixels.shape == (3, 32, 32, 3) and drawn.pixels.dtype == np.uint8
    with pytest.raises(ValueError, match="latents are decoded first"):
        to_uint8(drawn.samples.images)
    assert np.asarray(Image.open(tmp_path / "digits.png")).shape[-1] == 3


# --- The notebook ---

NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"


def test_notebook_was_run_to_its_end_and_is_small():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    assert not [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]
    assert NOTEBOOK.stat().st_size < 200_000


@pytest.mark.slow
def test_notebook_runs(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    stored, notebook = (nbformat.read(NOTEBOOK, as_version=4) for _ in range(2))
    environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
    client = nbclient.NotebookClient(notebook, timeout=1200, resources=dict(metadata=dict(path=str(tmp_path))))
    client.execute(env=environment)
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    before, after = map(int, re.search(r"needed before (\d+)%, now (\d+)%", said).groups())
    assert after < before
    is_cost = lambda cell: cell.cell_type == "code" and "executed" in cell.source
    costs = [[cell.outputs for cell in book.cells if is_cost(cell)] for book in (stored, notebook)]
    assert len(costs[0]) == 1 and costs[0] == costs[1]  # no training is before it, and no time is in it


# --- Numbers -------------------------------------------------------------------------------------


def test_settings_beside_ddpm_are_those_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    settings_table = importlib.import_module("quality_figure").settings_table
    found = json.loads((ROOT / "docs" / "quality.json").read_text())
    assert settings_table(found["settings"]) in (ROOT / "docs" / "sampling.md").read_text()


SPEEDS = {
    "complete": "complete",
    "gated": "gated",
    "fast": "fast",
    "PyTorch eager": "torch_eager",
    "PyTorch compiled": "torch_compiled",
    "compiled": "torch_compiled",
}


def measured_rows() -> list:
    """Return (place, row by column, file) of every row of a table of speeds."""
    rows = []
    for name in ("docs/benchmarks.md", "docs/speed/README.md"):
        unit = 1
        for block in (ROOT / name).read_text().split("\n\n"):
            unit = 1000 if "Milliseconds per step" in block else unit
            lines = [[cell.strip(" *`") for cell in line.split("|")[1:-1]] for line in block.splitlines()]
            header, *table = lines
            if "file" not in header or "gated" not in header:
                continue
            for cells in table[1:]:
                row = dict(zip(header, cells))
                rows.append(pytest.param(row, unit, id=f"{name}: {row['file']}"))
            unit = 1
    return rows


def is_rounded(text: str, value: float) -> bool:
    """Return whether a text is a value rounded to as many digits."""
    shown, exact = Decimal(text), Decimal(value)
    return any(exact.quantize(shown, rounding) == shown for rounding in (ROUND_HALF_EVEN, ROUND_HALF_UP))


def test_digits_page_holds_the_numbers_of_the_flow_study():
    rows = json.loads((ROOT / "docs" / "flow.json").read_text())["results"]
    cell_of = lambda row: (row["model"], row["settings"], row["guidance"])
    for cell in {cell_of(row) for row in rows}:
        model, settings, _ = cell
        begins = rf"\| {model} \| " + (r"[\d.]+ \|" if settings == "own" else rf"{settings} \|")
        [line] = re.findall(f"^{begins}.*", (ROOT / "docs" / "digits.md").read_text(), re.MULTILINE)
        for key, places in (("accuracy", 3), ("distance", 2)):
            values = [row[key] for row in rows if cell_of(row) == cell]
            spread = f" ± {np.std(values, ddof=1):.{places}f}" if len(values) > 1 else ""
            assert f"| {np.mean(values):.{places}f}{spread} |" in line, (cell, key)


@pytest.mark.parametrize("row, unit", measured_rows())
def test_tables_hold_the_numbers_of_their_files(row, unit):
    result = json.loads((ROOT / "docs" / "speed" / row["file"]).read_text())
    seconds = {column: result["seconds_per_step"].get(key) for column, key in SPEEDS.items()}
    for column in row.keys() & seconds.keys():
        if row[column] != "-":
            assert is_rounded(row[column], unit * seconds[column]), column
    speedup = next(text for column, text in row.items() if column.startswith("speed-up"))
    measured, ideal = re.fullmatch(r"([\d.]+) \(([\d.]+)\)", speedup).groups()
    assert is_rounded(measured, result["speedup_over"]["complete"]) and is_rounded(ideal, result["ideal_speedup"])
    assert is_rounded(row["efficiency"], result["efficiency"])
    if "difference" in row:
        assert row["difference"] == f"{result['largest_difference_to_gated']:.1e}"
    for column in row.keys() & {"batch", "steps"}:
        assert int(row[column]) == result[{"batch": "batch_size"}.get(column, column)], column


STEPS = {
    "static": "static",
    "second stage": "dynamic",
    "second stage, top-k at half the tokens": "dynamic, top-k 0.5",
    "first stage": "dynamic and complete",
    "static, gradient and norm alone": "static, without its update",
    "PyTorch eager, static": "torch_eager",
    "PyTorch compiled, static": "torch_compiled",
}


@pytest.mark.parametrize(
    ("page", "begins", "files", "keys"),
    [
        ("benchmarks.md", "## Training, CPU, Intel", ("train_s2_intel", "train_b2_intel"), "sgpm"),
        ("speed/README.md", "Two Intel cores with nothing", ("train_s2_intel", "train_b2_intel"), "sgpm"),
        ("speed/README.md", "**A small model**", ("train_fashion_intel",), "sgp"),
        ("speed/README.md", "**By the TPU compiler**", ("train_xl2_v5e_products", "train_xl2_v5e"), "ct"),
    ],
)
def test_tables_of_training_steps_hold_the_numbers_of_their_files(page, begins, files, keys):
    value_of = {
        "s": lambda row: row["seconds"],
        "g": lambda row: row["giga_flops_per_second"],
        "p": lambda row: row.get("times_torch_compiled", {"seconds": 1.0})["seconds"],
        "m": lambda row: row.get("temporary_gib"),
        "c": lambda row: 100 * row["scheduled_share_of_peak"],
        "t": lambda row: row["times_static"]["scheduled"],
    }
    text = (ROOT / "docs" / page).read_text()
    lines = text[text.index(begins) :].split("\n|---")[1].split("\n\n")[0].splitlines()[1:]
    measured = [json.loads((ROOT / "docs" / "speed" / f"{file}.json").read_text())["rows"] for file in files]
    assert len(lines) == len(measured[0])
    for line in lines:
        name, *cells = (cell.strip().removesuffix(" %") for cell in line.strip("|").split("|"))
        values = [value_of[key](rows[STEPS[name]]) for rows in measured for key in keys]
        for cell, value in zip(cells, values, strict=True):
            assert cell == "" if value is None else is_rounded(cell, value), (name, cell, value)
