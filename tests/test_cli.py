"""The commands: flags are made from the dataclass that they fill, and every mistake is one line that helps."""

import dataclasses
import importlib
import inspect
import subprocess
import sys

import pytest
from absl import flags
from conftest import ROOT

from dydit_jax.cli import train as train_command
from dydit_jax.cli.flags import define_flags, define_overrides, read_flags, read_meanings, read_overrides
from dydit_jax.cli.prepare_images import Packing
from dydit_jax.cli.train import Training, config_keys, find_config, known_configs
from dydit_jax.convert.conversion import Conversion
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.errors import InputError
from dydit_jax.jobs.analyze import Analysis
from dydit_jax.jobs.evaluate import Evaluation
from dydit_jax.jobs.prepare_latents import LatentsRequest
from dydit_jax.jobs.sample import Request
from dydit_jax.jobs.search_solver import SearchRequest
from dydit_jax.runtime import console

COMMANDS = ["train", "sample", "evaluate", "analyze", "convert", "prepare_latents", "prepare_images", "search_solver"]
# Every record that flags fill, the least that makes one, and values of each kind.
FILLED = [
    (Training, ["--workdir=w"], dict(workdir="w")),
    (Training, ["--workdir=w", "--from_step=3"], dict(workdir="w", from_step=3)),
    (Request, ["--checkpoint=c", "--out=o", "--labels=1,2"], dict(checkpoint="c", out="o", labels=["1", "2"])),
    (
        Request,
        ["--checkpoint=c", "--out=o", "--num_images=3", "--token_capacity=0.5", "--report", "--mode=gated"],
        dict(checkpoint="c", out="o", num_images=3, token_capacity=["0.5"], report=True, mode="gated"),
    ),
    (Evaluation, ["--samples=a,b"], dict(samples=("a", "b"))),
    (Analysis, ["--checkpoints=a", "--out=o", "--labels=3,1"], dict(checkpoints=("a",), out="o", labels=("3", "1"))),
    (Conversion, ["--source=s", "--out=o"], dict(source="s", out="o")),
    (
        Conversion,
        ["--source=s", "--out=o", "--latent_scale=0.5", "--latent_shift=-1,0,2e-1,3", "--heads=2", "--order"],
        dict(source="s", out="o", latent_scale=(0.5,), latent_shift=(-1.0, 0.0, 0.2, 3.0), heads=2, order=True),
    ),
    (LatentsRequest, ["--out=o", "--path=p"], dict(out="o", path="p")),
    (SearchRequest, ["--checkpoint=c", "--out=o"], dict(checkpoint="c", out="o")),
    (Packing, ["--source=s", "--out=o", "--max_bad=0"], dict(source="s", out="o", max_bad=0)),
]


@pytest.fixture
def typed(monkeypatch, capsys):
    """Return a function that runs a command as typed and returns its exit code and what it said."""

    def run(command: str, *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(console.logging, "basicConfig", lambda **_: None)
        monkeypatch.setattr(console, "_hush_storage", lambda: None)
        monkeypatch.setattr(sys, "argv", [command, *arguments])
        monkeypatch.delitem(sys.modules, "config_config", raising=False)  # the config that was read before
        code = 0
        try:
            importlib.import_module(f"dydit_jax.cli.{command}").main()
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


@pytest.fixture
def trained(typed, monkeypatch):
    """Return a function that types a training and returns the config that it would run."""

    def run(*arguments: str) -> dict:
        found = []
        monkeypatch.setattr(train_command, "train_and_evaluate", lambda config, *_: found.append(config))
        code, said = typed("train", "--workdir=w", *arguments)
        assert code == 0 and said in ("", "Finished in 0s.\n")
        return found[0]

    return run


@pytest.mark.parametrize("cls, arguments, expected", FILLED)
def test_flags_fill_their_dataclass(cls, arguments, expected):
    values = flags.FlagValues()
    required = define_flags(cls, values)
    values(["program", *arguments])
    assert read_flags(cls, values) == cls(**expected)
    parameters = inspect.signature(cls).parameters
    assert required == [name for name, parameter in parameters.items() if parameter.default is parameter.empty]


@pytest.mark.parametrize(
    "cls", [*dict.fromkeys(cls for cls, _, _ in FILLED), SamplingConfig], ids=lambda cls: cls.__name__
)
def test_every_flag_means_something(cls):
    values = flags.FlagValues()
    define_flags(cls, values)
    assert [name for name in values if not values[name].help] == []


def test_every_key_of_a_config_means_something():
    assert [name for name, meaning in config_keys().items() if not meaning] == []


def test_meanings_are_read_from_the_docstring():
    @dataclasses.dataclass
    class Example:
        """A record.

        Attributes:
          first: one line.
          second, third: more than
            one line.

        Something else: not a field.
        """

        first: int
        second: int
        third: int
        fourth: int

    assert read_meanings(Example) == dict(
        first="One line.", second="More than one line.", third="More than one line.", fourth=""
    )


def test_overrides_are_what_was_given():
    values = flags.FlagValues()
    define_overrides(SamplingConfig, "sampling", values)
    values(["program", "--sampling.steps=10,20", "--sampling.guidance=0", "--sampling.autoencoder="])
    assert read_overrides(SamplingConfig, "sampling", values) == dict(steps="10,20", guidance=0.0, autoencoder="")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_the_flags_and_ends_well(typed, command):
    code, said = typed(command, "--out=x", "--help")
    module = importlib.import_module(f"dydit_jax.cli.{command}")
    assert code == 0 and said.startswith(module.__doc__.strip())
    assert said.index("Flags:") < said.index("Required.") < said.index("--distributed\n") < said.index("--version\n")
    assert f"dydit-{command.replace('_', '-')} --" in said
    assert max(map(len, said.splitlines())) <= 120


def test_help_of_training_shows_the_keys_of_the_config(typed):
    said = typed("train", "--help")[1]
    assert "--config.optimizer.learning_rate\n      Peak of the learning rate" in said
    assert said.index("--workdir") < said.index("--config.model.size") < said.index("--config.tracking.profile")
    assert "digits_dydit" in said


def test_version_is_the_package_s(typed):
    version = next(line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("version"))
    assert typed("sample", "--version") == (0, f"dydit-jax {version.split()[-1].strip(chr(34))}\n")


@pytest.mark.parametrize(
    "command, arguments, message",
    [
        ("sample", ("--labels", "0", "1", "2", "--out=x"), "give --labels 0,1,2."),
        ("sample", ("--labels=0,", "1", "2"), "give --labels 0,1,2."),
        ("sample", ("--report", "true"), "did you mean --report=true?"),
        ("sample", ("x",), "Unknown argument 'x'; a value follows its flag"),
        ("sample", ("--rows", "1", "2"), "Unknown argument '2'; a value follows its flag"),
        ("sample", ("out=x",), "did you mean --out=x?"),
        ("train", ("config.train.steps=5",), "did you mean --config.train.steps=5?"),
        ("train", ("--config=digits_dit", "config.train.steps=5"), "did you mean --config.train.steps=5?"),
        ("sample", ("--steps=5",), "Unknown flag --steps. Did you mean --sampling.steps?"),
        ("sample", ("--sampling.stepz=5",), "Did you mean --sampling.steps?"),
        ("sample", ("--gidance=5",), "Did you mean --sampling.guidance"),
        ("sample", ("--zzz=5",), "Unknown flag --zzz. --help lists them."),
        ("train", ("--steps=5",), "Did you mean --config.train.steps or --config.sampling.steps?"),
        ("train", ("--learning_rate=5",), "Did you mean --config.optimizer.learning_rate?"),
        ("train", ("--config.train.steps=5",), "is a key of the config; give --config before it."),
        ("train", ("--workdir=x",), "--config is required. The experiment: a config file, or one of default,"),
        ("train", ("--config=digits_dit",), "--workdir is required. Folder of the run"),
        ("train", ("--config=digit",), "There is no file 'digit' and no config of that name; known: default,"),
        ("train", ("--config=",), "There is no file ''"),
        ("convert", ("--source=x",), "--out is required: a .safetensors file, or a folder"),
        (
            "convert",
            ("--source=x", "--out=m", "--merge", "--push=hf://me/x"),
            "first --merge with a folder as --out, then",
        ),
        ("convert", ("--source=x", "--out=m", "--merge", "--export=original"), "leave out --merge."),
        ("convert", ("--source=x", "--out=m", "--export=original", "--push=hf://me/x"), "--push sends no files of"),
        ("convert", ("--source=x", "--out=m", "--push=hf://me/x"), "--push does not read --out; leave it out"),
        ("convert", ("--source=x", "--out=m", "--merge", "--heads=3"), "--merge does not read --heads"),
        ("convert", ("--source=x", "--out=m", "--base=y"), "A conversion from PyTorch does not read --base"),
        ("convert", ("--source=x", "--export=original"), "--out is required: a .safetensors file, or a folder"),
        ("prepare_latents", ("--verify",), "--out is required. Folder for the latents"),
        ("prepare_latents", ("--out=x",), "--path is empty; name the pictures."),
        ("prepare_images", ("--source=x",), "--out is required."),
        ("sample", ("--checkpoint=x", "--out=x"), "Give one of --labels"),
        (
            "sample",
            ("--checkpoint=sd-vae-ft-ema", "--out=x", "--labels=1"),
            "known: digits, digits-flow, ",
        ),
    ],
)
def test_mistakes_are_one_line_that_helps(typed, command, arguments, message):
    code, said = typed(command, *arguments)
    assert code == 2 and message in said and len(said.splitlines()) == 1 and said.startswith(f"{command}: ")


def test_a_config_goes_by_its_name_or_path(trained, monkeypatch):
    monkeypatch.chdir(ROOT)
    by_name = trained("--config=digits_dydit", "--config.train.steps=7")
    assert by_name["train"]["steps"] == 7 and by_name["model"]["routers"] == "first_on"
    assert by_name == trained("--config=configs/digits_dydit.py", "--config.train.steps=7")


def test_a_config_of_ones_own_starts_from_one_that_ships(trained, tmp_path):
    text = "from dydit_jax.configs import default\ndef get_config(steps='3'):\n  config = default.get_config()\n"
    (tmp_path / "mine.py").write_text(f"{text}  config.train.steps = int(steps)\n  return config\n")
    assert trained(f"--config={tmp_path}/mine.py")["train"]["steps"] == 3
    assert trained(f"--config={tmp_path}/mine.py:9")["train"]["steps"] == 9


def test_a_file_wins_over_a_name_and_a_folder_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits_dit").mkdir()
    assert find_config("digits_dit").endswith("dydit_jax/configs/digits_dit.py")
    (tmp_path / "digits_half").touch()
    assert find_config("digits_half") == "digits_half"
    with pytest.raises(InputError, match="digits_control, digits_dit, digits_dydit"):
        find_config(str(tmp_path))
    assert "default" in known_configs() and "__init__" not in known_configs()


def test_every_command_is_a_console_script_and_a_script_of_three_lines():
    declared = (ROOT / "pyproject.toml").read_text()
    scripts = [*ROOT.glob("*.py"), *(ROOT / "tools").glob("*.py")]
    used = {script.read_text().split("dydit_jax.cli.")[1].split()[0] for script in scripts}
    assert used == set(COMMANDS) and len(scripts) == len(COMMANDS)
    for command in COMMANDS:
        assert f'dydit-{command.replace("_", "-")} = "dydit_jax.cli.{command}:main"' in declared


HEAVY = ("diffusers", "grain", "huggingface_hub", "matplotlib", "orbax", "sklearn", "tensorflow_datasets", "torch")
HELP_OF_ALL = f"""
import contextlib, importlib, io, sys
for command in {COMMANDS}:
    sys.argv = [command, "--help"]
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        importlib.import_module("dydit_jax.cli." + command).main()
"""


@pytest.mark.parametrize(
    "code, absent",
    [
        ("import sys, dydit_jax; dydit_jax.__version__, dir(dydit_jax)", (*HEAVY, "absl", "flax", "jax", "numpy")),
        (HELP_OF_ALL, HEAVY),
    ],
    ids=["import", "help"],
)
def test_what_only_one_job_needs_is_imported_there(code, absent):
    code += f"\nprint([name for name in {absent} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_lists_of_numbers_are_read_as_their_field_wants():
    def read(*typed):
        values = flags.FlagValues()
        define_overrides(SamplingConfig, "sampling", values)
        values(["sample", *typed])
        return read_overrides(SamplingConfig, "sampling", values)

    given = read("--sampling.guidance_interval=100,700", "--sampling.guidance_scales=1,2.5")
    assert given == dict(guidance_interval=(100, 700), guidance_scales=(1.0, 2.5))
    assert read() == {}
    with pytest.raises(InputError, match="--sampling.guidance_interval must be numbers .* not 1,half"):
        read("--sampling.guidance_interval=1,half")
