"""What is known of a source's model, and from where: its tensors, its training's options, files beside it, the user.

Tensors leave things open: how many heads share a width, whether the last row of the label table is a class, what a
network predicts. All other sources are read. Sources that disagree end the conversion, and what none of them says is
guessed and reported as a guess.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from dydit_jax.convert.diffusers_scheduler import SCHEDULER_FILE, read_scheduler, scheduler_beside
from dydit_jax.errors import InputError
from dydit_jax.models.autoencoder import LATENT_SCALE
from dydit_jax.runtime.files import read_json

CONFIG_FILE = "config.json"
MAX_CONFIG_BYTES = 1 << 20
LARGEST_NUMBER = 2**53  # beyond it, or not finite, an option is about something else
# Options of training scripts and arguments of model classes -> what they are about here.
FIELDS = {
    "depth": "depth",
    "hidden_size": "width",
    "num_heads": "heads",
    "patch_size": "patch",
    "input_size": "side",
    "image_size": "image_size",
    "in_channels": "channels",
    "num_classes": "classes",
    "mlp_ratio": "mlp_ratio",
    "num_layers": "depth",  # and the next ones, of diffusers' classes
    "num_attention_heads": "heads",
    "sample_size": "side",
    "num_embeds_ada_norm": "classes",
    "scaling_factor": "latent_scale",
    "shift_factor": "latent_shift",
    "latent_channels": "latent_channels",
    "norm_num_groups": "norm_groups",
}
PER_CHANNEL = ("latents_mean", "latents_std")  # of an autoencoder of diffusers
AUTOENCODERS = {"ema": "sd-vae-ft-ema", "mse": "sd-vae-ft-mse"}  # by the option `vae` of DiT's training
NORM_EPS = 1e-6  # of every normalisation of a DiT
NOISE = ("noise", "epsilon", "eps")
FLOW_OPTIONS = {"path_type": "Linear", "prediction": "velocity"}  # of SiT's training, as `Flow` has it
TENSORS, GUESS = "the file's tensors", "a guess"


class Evidence:
    """Values by field, each with who says it; see the module.

    Attributes:
      sources: for people: where the value of each field comes from.
      doubts: what was guessed or not believed, a sentence each.
      named_size: what the training calls its model, e.g. "XL/2"; None where it does not.
    """

    def __init__(self):
        self.sources, self.doubts, self.named_size, self._values = {}, [], None, {}

    def say(self, field: str, value, source: str) -> None:
        """Note a source's value of a field; None where it has none.

        Raises:
          InputError: another source says something else.
        """
        if value is None:
            return
        if field in self._values and self._values[field] != value:
            raise InputError(
                f"{source} says {field} {value}, but {self.sources[field]} says {self._values[field]}. Correct the "
                f"flag or {CONFIG_FILE}; if an option of the training means something else, save the state dict alone."
            )
        self._values.setdefault(field, value)
        self.sources.setdefault(field, source)

    def guess(self, field: str, value, reason: str) -> None:
        """Guess a field that no source mentions; the reason names the flag that decides."""
        if field not in self._values:
            self._values[field], self.sources[field] = value, GUESS
            self.doubts.append(f"{field} {value} is a guess: {reason}")

    def value(self, field: str):
        """Return the known or guessed value of a field, or None."""
        return self._values.get(field)


def gather_evidence(source, options: Mapping, flags: Mapping) -> Evidence:
    """Read all sources but the tensors.

    Args:
      source: the file of weights; a `config.json` in its folder is read, and the scheduler of diffusers' pipeline.
      options: of the training that wrote it.
      flags: values that the user gave, by field; None where not.

    Raises:
      InputError: sources that disagree, a file that can't be read, or a flow or a diffusion of another kind than ours.
    """
    evidence, path = Evidence(), Path(source)
    for field, value in flags.items():
        evidence.say(field, value, f"--{field}")
    beside = path.with_name(CONFIG_FILE)
    if beside.is_file():
        _require_short(beside)
        _hear(evidence, read_json(beside, remedy="mend it, or move it away"), f"{CONFIG_FILE}'s")
    _hear(evidence, options, "the training's option")
    scheduler = scheduler_beside(path.absolute().parent)
    if scheduler is not None and scheduler.is_file():
        _require_short(scheduler)
        diffusion = read_scheduler(scheduler)
        said = dict(process=diffusion.name, schedule=diffusion.schedule, train_steps=diffusion.train_steps)
        for field, value in said.items():
            evidence.say(field, value, SCHEDULER_FILE)
    if _names_flow(path.stem):
        evidence.guess("process", "flow", f"{path.name} is named like a SiT; --process decides")
    return evidence


def _require_short(path: Path) -> None:
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise InputError(f"{path} has more than {MAX_CONFIG_BYTES} bytes; no model's description has.")


def _hear(evidence: Evidence, options: Mapping, who: str) -> None:
    """Note the values whose names are known."""
    _hear_process(evidence, options, who)
    for name, field in FIELDS.items():
        value = options.get(name)
        if type(value) in (int, float) and abs(value) < LARGEST_NUMBER:
            evidence.say(field, int(value) if value == int(value) else value, f"{who} {name}")
    if type(dropout := options.get("class_dropout_prob")) in (int, float):
        evidence.say("null_row", dropout > 0, f"{who} class_dropout_prob")
    evidence.say("autoencoder", AUTOENCODERS.get(str(options.get("vae"))), f"{who} vae")
    for name in PER_CHANNEL:
        values = options.get(name)
        if isinstance(values, list | tuple) and values and all(type(value) in (int, float) for value in values):
            evidence.say(name, tuple(map(float, values)), f"{who} {name}")
    if type(options.get("_class_name")) is str:
        evidence.say("class_name", options["_class_name"], f"{who} _class_name")
    if options.get("_class_name") == "AutoencoderKL" and "scaling_factor" not in options:
        evidence.say("latent_scale", LATENT_SCALE, f"{who} _class_name, by its default,")
    norm_eps = options.get("norm_eps")
    if type(norm_eps) is float and norm_eps != NORM_EPS:
        evidence.doubts.append(f"{who} norm_eps is {norm_eps:g}; here it is {NORM_EPS:g}, as in DiT")
    name = str(options.get("model"))
    if named := re.fullmatch(r"(?:Dy)?([DS])iT-(\w{1,8}/\d{1,3})", name):
        evidence.say("process", "diffusion" if named[1] == "D" else "flow", f"{who} model")
        evidence.named_size = named[2]


def _hear_process(evidence: Evidence, options: Mapping, who: str) -> None:
    """Note which process a training is of: a flow has a path, or predicts something else than noise."""
    names = ("model", "_class_name")
    flow = [name for name in names if type(options.get(name)) is str and _names_flow(options[name])]
    flow += [name for name in FLOW_OPTIONS if options.get(name) is not None and options[name] not in NOISE]
    for name in flow:
        evidence.say("process", "flow", f"{who} {name}")
    if not flow and options.get("prediction") in NOISE:
        evidence.say("process", "diffusion", f"{who} prediction")
    if options.get("_class_name") == "DiTTransformer2DModel":
        evidence.say("process", "diffusion", f"{who} _class_name")
    for name, known in FLOW_OPTIONS.items():
        if flow and options.get(name) not in (None, known):
            raise InputError(
                f"{who} {name} says {options[name]!r:.80}; the one flow that can be converted has {name} {known!r}: "
                "velocities on SiT's straight line from noise at time 0 to the image at time 1."
            )


def _names_flow(name: str) -> bool:
    return re.search(r"(?<![a-z])(dy)?sit(?![a-z])", name.lower()) is not None
