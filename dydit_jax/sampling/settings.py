"""The settings of a run: the checkpoint's own, a preset over them, and what is given explicitly over both."""

import dataclasses
from collections.abc import Callable, Mapping

from dydit_jax.diffusion.process import Diffusion, Process
from dydit_jax.diffusion.samplers import SamplingConfig
from dydit_jax.errors import InputError, require_known
from dydit_jax.records import read_record
from dydit_jax.sampling.searched import is_searched, read_searched, warn_of_other_settings

# From the literature, for models of ImageNet's latents, and not measured here: DPM-Solver++ in 20 evaluations, and
# guidance at medium noise alone (https://arxiv.org/abs/2404.07724), at timesteps where sigma / alpha of the linear
# schedule is from 0.26 to 5.8: their interval of 0.28 to 2.9 for data of deviation 0.5, widened at its end that is
# near the image.
PRESETS = {
    "fast20": dict(sampler="dpmpp_2m", steps="logsnr:20", eta=0.0, guidance_interval=(75, 590)),
}
FOR_PROCESS = Diffusion("linear", 1000)  # at the same timesteps others have other noise
NOT_GUIDED = dict(guidance=1.0, guidance_interval=None)


@dataclasses.dataclass(frozen=True)
class Preset:
    """Settings by name.

    Attributes:
      preset: fast20, sampler, steps and interval of guidance for 20 evaluations, from the literature and not measured
        here, of models with the linear schedule; other flags win over it.
    """

    preset: str = ""


def choose_sampling(
    own: SamplingConfig, given: Mapping, *, process: Process, checksum: Callable[[], str]
) -> SamplingConfig:
    """Return the settings of a run.

    Args:
      own: the checkpoint's.
      given: settings that win, and `preset`, whose settings win over the checkpoint's alone. The sampler may be the
        file of a searched solver.
      process: that the model was trained on.
      checksum: -> of the model's weights.

    Raises:
      InputError: an unknown preset or setting, a value that is not allowed, or a file that does not fit the model.
    """
    given = dict(given)
    name = given.pop("preset", "")
    if name:
        require_known("sampling.preset", name, PRESETS)
        if process != FOR_PROCESS:
            raise InputError(
                f"sampling.preset {name} is for {FOR_PROCESS}, this model is of {process}; give sampling.sampler, "
                "sampling.steps and sampling.guidance_interval themselves."
            )
    preset = PRESETS.get(name, {})
    settings = dataclasses.asdict(own) | preset
    if name or "sampler" in given:
        settings["searched_weights"] = None
    if given.get("guidance_scales") is not None:
        settings |= NOT_GUIDED
    elif any((preset | given).get(name) is not None for name in NOT_GUIDED):
        settings["guidance_scales"] = None
    path = str(given.get("sampler", ""))
    if not is_searched(path):
        return read_record(SamplingConfig, settings | given, "sampling")
    if "steps" in given:
        raise InputError(f"{path} brings its own timesteps; leave out sampling.steps, not {given['steps']!r}.")
    if given.get("eta"):
        raise InputError(f"sampling.eta belongs to ddim; {path} has none, so {given['eta']} can't be honoured.")
    searched = read_searched(path, process, checksum)
    fitted = searched.pop("fitted_to")
    sampling = read_record(SamplingConfig, settings | given | searched, "sampling")
    warn_of_other_settings(path, fitted, sampling)
    return sampling
