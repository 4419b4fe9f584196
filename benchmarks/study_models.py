"""The models of the study, in the order of their importance, and what they are compared with.

A study is a data set with its configs and its judge. Fine-tuned models start from one static parent; lambda is the
share of the MACs of attention and MLP that training aims at.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping

import study_routers  # noqa: F401 (registers the routers that some models name)
from judge import Judge

from dydit_jax.data.sources import digits

STATIC, TRAINED_ON, NARROWER, SHALLOWER = "static", "static, trained on", "static, narrower", "static, shallower"
LAMBDAS = {budget: f"DyDiT, lambda {budget}" for budget in (0.3, 0.5, 0.7)}
DYNAMIC = LAMBDAS[0.5]
NO_HEADS, NO_GROUPS, NO_TOKENS = (f"DyDiT, {part} off" for part in ("heads", "groups", "tokens"))
CONSTANT, RISING = "constant schedule", "rising schedule"
RANDOM, TOP_K = "DyDiT, random tokens", "DyDiT, top-k tokens"
OF_A_NUMBER = (RANDOM, TOP_K)  # of tokens: the mean number that pass in the DyDiT with a threshold
VARIANTS = (NO_HEADS, NO_GROUPS, NO_TOKENS, CONSTANT, RISING, RANDOM, TOP_K)  # of a DyDiT, of its cost
FLOW, DYNAMIC_FLOW = "SiT", "DySiT, lambda 0.5"
ONE_PASS = "DyDiT, one pass"
SHIPPED = "DyDiT, trained longer"


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A model of the study.

    Attributes:
      config: name of its config.
      start: the model whose first training it starts from; "" starts from random values.
      settings: keys of the config that differ, such as "loss.budget".
    """

    config: str
    start: str = ""
    settings: Mapping = dataclasses.field(default_factory=dict)

    def sections(self, settings: Mapping) -> dict:
        """Return the config as plain dicts, with its own settings and others."""
        config = importlib.import_module(f"dydit_jax.configs.{self.config}").get_config()
        config.update_from_flattened_dict({**self.settings, **settings})
        return config.to_dict()


@dataclasses.dataclass(frozen=True)
class Question:
    """Models that answer a question.

    Attributes:
      text: the question.
      models: in the order of their training; each starts from one that stands before it.
      seeds: training seeds of each.
      pairs: of models: the difference of the first and the second answers it.
    """

    text: str
    models: tuple[str, ...]
    seeds: int
    pairs: tuple[tuple[str, str], ...] = ()


# The most important first, among models of the same seed.
QUESTIONS = (
    Question("The parent of all that is fine-tuned", (STATIC,), 1),
    Question("The model that ships", (SHIPPED,), 1),
    Question(
        "At equal MACs, does a DyDiT beat static models?",
        (DYNAMIC, TRAINED_ON, NARROWER, SHALLOWER),
        3,
        ((DYNAMIC, NARROWER), (DYNAMIC, SHALLOWER), (DYNAMIC, TRAINED_ON)),
    ),
    Question("What does a smaller budget cost?", (LAMBDAS[0.3], LAMBDAS[0.7]), 2),
    Question(
        "What do heads, groups and tokens bring?",
        (NO_TOKENS, NO_HEADS, NO_GROUPS),
        2,
        ((NO_HEADS, DYNAMIC), (NO_GROUPS, DYNAMIC), (NO_TOKENS, DYNAMIC)),
    ),
    Question(
        "Do schedules of heads and groups have to be learnt?",
        (CONSTANT, RISING),
        2,
        ((CONSTANT, NO_TOKENS), (RISING, NO_TOKENS)),
    ),
    Question("Top-k tokens, or those above a threshold?", (TOP_K,), 2, ((TOP_K, DYNAMIC),)),
    Question("Does it have to be learnt which tokens pass?", (RANDOM,), 2, ((RANDOM, TOP_K),)),
    Question("Guidance in one pass, for the Pareto page", (ONE_PASS,), 1),
    Question("The parent of the flow", (FLOW,), 1),
    Question("And as a flow?", (DYNAMIC_FLOW,), 2, ((DYNAMIC_FLOW, FLOW), (DYNAMIC_FLOW, DYNAMIC))),
)


@dataclasses.dataclass(frozen=True)
class Study:
    """A data set on which the questions are asked.

    Attributes:
      contestants: the models by name.
      make_judge: returns the judge, with `measure(images, labels)`.
      real_pictures: number -> that many real test pictures, float32 [n,side,side,C] in [-1, 1], and labels [n].
      class_names: by label.
      macs_per_second: of training on the machine that the configs were made for, two cores: an estimate until
        something has been trained.
    """

    contestants: Mapping[str, Contestant]
    make_judge: Callable
    real_pictures: Callable
    class_names: tuple[str, ...] = ()
    macs_per_second: float = 25e9


def contestants(data: str, *, narrower: Contestant, shallower: Contestant, longer: int) -> dict[str, Contestant]:
    """Return the models of a data set with the configs `<data>_dit`, `_control`, `_dydit`, `_sit` and `_dysit`.

    Args:
      data: name of the data set.
      narrower, shallower: static models of half the MACs.
      longer: steps of the model that ships, which nothing is compared with.
    """
    dynamic = lambda **settings: Contestant(
        f"{data}_dydit", STATIC, {key.replace("__", "."): value for key, value in settings.items()}
    )
    one_pass = {
        "model.guidance_free": True,
        "loss.guidance_free": True,
        # The start has learnt the budget already.
        "loss.budget_hold_steps": 0,
        "loss.budget_warmup_steps": 1,
    }
    return {
        STATIC: Contestant(f"{data}_dit"),
        TRAINED_ON: Contestant(f"{data}_control", STATIC),
        NARROWER: narrower,
        SHALLOWER: shallower,
        **{name: dynamic(loss__budget=budget) for budget, name in LAMBDAS.items()},
        SHIPPED: dynamic(train__steps=longer, optimizer__decay_steps=longer),
        NO_HEADS: dynamic(model__time_router="open,linear"),
        NO_GROUPS: dynamic(model__time_router="linear,open"),
        NO_TOKENS: dynamic(model__token_router="all"),
        CONSTANT: dynamic(model__time_router="constant", model__token_router="all"),
        RISING: dynamic(model__time_router="rising", model__token_router="all"),
        RANDOM: dynamic(model__token_router="random"),
        TOP_K: dynamic(),
        FLOW: Contestant(f"{data}_sit"),
        DYNAMIC_FLOW: Contestant(f"{data}_dysit", FLOW),
        ONE_PASS: Contestant(f"{data}_dydit", DYNAMIC, one_pass),
    }


def _fashion_judge():
    from fashion_judge import FashionJudge

    return FashionJudge()


def _fashion_pictures(count: int):
    from fashion_judge import CLASSES, FOLDER, real_pictures, split_classes

    return split_classes(*real_pictures(FOLDER, "test"), count // CLASSES)[1]


STUDIES = {
    "fashion": Study(
        contestants(
            "fashion",
            narrower=Contestant("fashion_narrow"),
            shallower=Contestant("fashion_shallow"),
            longer=14_000,
        ),
        _fashion_judge,
        _fashion_pictures,
        ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
    ),
    # Easy and quick, to try the command; docs/digits.md is the study of this data.
    "digits": Study(
        contestants(
            "digits",
            narrower=Contestant("digits_half"),
            shallower=Contestant("digits_half", settings={"model.depth": 2, "model.width": 96, "model.heads": 6}),
            longer=5000,
        ),
        Judge,
        lambda count: digits("test"),
    ),
}


def ordered_runs() -> list[tuple[str, int]]:
    """Return (model, training seed) of all trainings, in their order; what one starts from precedes it.

    First seeds of all models, so that every question has an answer early; then the spreads, question by question.
    """
    first = [(name, 0) for question in QUESTIONS for name in question.models]
    others = [(name, seed) for question in QUESTIONS for seed in range(1, question.seeds) for name in question.models]
    return first + others
