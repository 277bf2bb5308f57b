"""The YAML file as a typed, frozen recipe; all of its problems are found at once."""

from __future__ import annotations

import contextlib
import copy
import functools
import operator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

import pipelines.steps  # noqa: F401  registers the steps
from compress_peft.data.build import DataSettings
from compress_peft.data.preset import preset_names
from compress_peft.errors import ConfigError, Problem, did_you_mean
from eval.judge import JudgeSettings
from eval.text_metrics import MetricName
from pipelines.inputs import missing_inputs
from pipelines.presets import above_preset, under_recipe
from pipelines.steps.base import STEPS, Step, check_order
from pipelines.steps.merge import Merge
from pipelines.tasks import scored
from pipelines.validation import problems_of


class Section(BaseModel):
    """Base of the recipe's sections."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelSettings(Section):
    """The model to start from."""

    source: str
    """A local folder, a hub id (org/name or org/name@revision), a .gguf file, package:NAME, or random."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of activations and uncompressed weights; auto: float32 on CPUs, bfloat16 on GPUs that have it."""
    config: dict[str, Any] | None = None
    """For source random: the architecture. Otherwise: the expected one, used by --dry-run when the source is away."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for sources that you trust."""


class TaskEvaluation(Section):
    """Score on the test split: accuracy for tasks with choices, exact match of generated text otherwise."""

    batch_size: PositiveInt = 16
    """Prompts in one batch."""
    limit: PositiveInt | None = None
    """Use only the first so many test examples."""
    max_new_tokens: PositiveInt = 256
    """For tasks without choices."""
    num_beams: PositiveInt = 1
    """Beams of the search for generated answers; 1 is greedy."""
    stop: tuple[str, ...] = ()
    """Texts that end a generated answer, e.g. ["\\n"]; they and what follows do not count."""
    answer: Literal["text", "gsm8k"] = "text"
    """How a generated answer is compared: the whole text (normalized), or the number that GSM8K asks for."""
    metrics: tuple[MetricName, ...] | None = Field(default=None, min_length=1)
    """Scores of generated answers, also for tasks with choices; default: what suits the task (see `answer`,
    which this replaces)."""
    judge: JudgeSettings | None = None
    """A language model that grades generated answers, also for tasks with choices; off unless given."""


def _name_or_settings(schema: dict[str, Any]) -> None:
    settings = dict(schema)
    schema.clear()
    schema["anyOf"] = [{"enum": preset_names()}, settings]


class FurtherTask(TaskEvaluation):
    """A task with data of its own, of which only the test split is used; or the name of a preset."""

    model_config = ConfigDict(json_schema_extra=_name_or_settings)

    data: DataSettings
    """As the recipe's own data section; `splits: {test: n}` is enough."""
    name: str | None = None
    """In the report; default: that of the data."""

    @model_validator(mode="before")
    @classmethod
    def _above_preset(cls, given: Any) -> Any:
        given = {"data": {"preset": given}} if isinstance(given, str) else given
        return above_preset(given) if isinstance(given, dict) else given


class PerplexityEvaluation(Section):
    """Perplexity on held-out text: documents joined by end-of-text, cut into independent blocks."""

    text: str = "test"
    """"test" for the documents of the test split, or a .txt file."""
    blocks: PositiveInt = 16
    """Number of blocks."""
    block_size: PositiveInt = 512
    """Tokens in a block; each but the first is predicted."""
    batch_size: PositiveInt = 1
    """Blocks in one batch."""


class FidelityEvaluation(Section):
    """KL divergence from the original model and share of equal greedy tokens, on held-out text."""

    text: str = "test"
    """"test" for the documents of the test split, or a .txt file."""
    blocks: PositiveInt = 4
    """Number of blocks; the original's logits of each are kept on disk, 4 bytes a token and vocabulary entry."""
    block_size: int = Field(default=256, ge=2)
    """Tokens in a block."""
    new_tokens: PositiveInt = 32
    """Greedy continuation of the first half of each block."""


class HarnessEvaluation(Section):
    """Tasks of lm-evaluation-harness, scored on the model in memory (pip install "compress-peft[eval]")."""

    tasks: tuple[str, ...] = Field(min_length=1)
    """Names as `lm-eval ls tasks` lists them, or of one's own task files."""
    include_path: str | None = None
    """A folder with task files of one's own."""
    num_fewshot: NonNegativeInt | None = None
    """Examples shown in the prompt; null: what the task says."""
    limit: PositiveInt | None = None
    """Use only the first so many examples of each task."""
    batch_size: PositiveInt = 8
    """Requests in one batch."""


class LatencyGrid(Section):
    """Further timings: every combination; a key that is left out stays as it is for the first timing."""

    batch_size: tuple[PositiveInt, ...] = ()
    """Rows, e.g. [1, 4, 16]."""
    prompt_tokens: tuple[PositiveInt, ...] = ()
    """Lengths of the prompt, e.g. [128, 1024]."""
    num_beams: tuple[PositiveInt, ...] = ()
    """Beams, e.g. [1, 3]; more than one by beam search."""


class ProfileEvaluation(Section):
    """Memory and latency, measured in a fresh process for each stage."""

    prompt_tokens: PositiveInt = 256
    """Length of the prompt for the prefill time."""
    new_tokens: PositiveInt = 32
    """Tokens decoded one by one."""
    batch_size: PositiveInt = 1
    """Rows decoded together."""
    repeats: PositiveInt = 3
    """Timed repetitions after one warm-up; the median is reported."""
    grid: LatencyGrid = LatencyGrid()
    """Speed at further batch sizes, prompt lengths and beams; nothing unless given."""


class EvaluateSettings(Section):
    """What is measured at every stage: original, after each step, exported and reloaded."""

    task: TaskEvaluation | None = TaskEvaluation()
    """null switches it off."""
    tasks: tuple[FurtherTask, ...] = ()
    """Further tasks, each with data of its own, e.g. [boolq, {data: {preset: mt_bench}, judge: {...}}]."""
    perplexity: PerplexityEvaluation | None = PerplexityEvaluation()
    """null switches it off. An encoder-decoder has none: in its place stands the loss of the test split's answers."""
    fidelity: FidelityEvaluation | None = None
    """true or settings: how close each stage is to the original model; off unless given."""
    lm_eval: HarnessEvaluation | None = None
    """Tasks of lm-evaluation-harness; off unless given."""
    profile: ProfileEvaluation | None = ProfileEvaluation()
    """null switches it off."""

    @field_validator("fidelity", mode="before")
    @classmethod
    def _true_is_default(cls, value: Any) -> Any:
        return {True: {}, False: None}[value] if isinstance(value, bool) else value


class BaseRecipe(Section):
    """One run: a model, steps, and what to measure."""

    name: str = ""
    """Name of the run; default: the file's name."""
    seed: int = 0
    """Seed of everything random that has no seed of its own."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """auto, cpu, cuda or cuda:N."""
    output: str = "runs"
    """Folder under which the run folder is created, named after the run; --output names the run folder itself."""
    model: ModelSettings
    """The model to start from."""
    data: DataSettings | None = None
    """The task; needed for fine-tuning and for task scores."""
    evaluate: EvaluateSettings = EvaluateSettings()
    """What is measured at every stage."""


def _step_type() -> Any:
    types = [STEPS[name] for name in STEPS]
    return Annotated[functools.reduce(operator.or_, types), Field(discriminator="step")]


Recipe = create_model(
    "Recipe",
    __base__=BaseRecipe,
    steps=(tuple[_step_type(), ...], Field(min_length=1, description="What happens to the model, in this order.")),
)
"""The recipe with the steps that are registered."""


class _UniqueKeys(yaml.SafeLoader):
    """YAML where a key given twice is an error instead of silently taking the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f'the key "{key}" is given twice', key_node.start_mark
                )
            seen.add(key)
        return dict(super().construct_mapping(node, deep=deep))


def read_yaml(path: Path) -> dict[str, Any]:
    """The file as a dictionary.

    Raises:
        ConfigError: no such file, not YAML, not a mapping, or a key twice.
    """
    if not path.is_file():
        nearby = sorted(str(other) for other in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        fix = did_you_mean(str(path), nearby) if nearby else "give the path of a YAML file"
        raise ConfigError(Problem(str(path), "no such file", fix))
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        what = getattr(error, "problem", None) or str(error)
        raise ConfigError(
            Problem(where, f"is not valid YAML: {what}", "check indentation, quotes and colons")
        ) from error
    if not isinstance(raw, dict):
        raise ConfigError(Problem(str(path), "must be a mapping of keys to values", "start from a file under configs/"))
    return raw


def apply_overrides(raw: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """The recipe with "a.b=c" applied; list items by number ("steps.0.method=nf4"). Values are read as YAML.

    Raises:
        ConfigError: an override is malformed or points into nothing.
    """
    raw = copy.deepcopy(raw)
    problems = []
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = path.replace("[", ".").replace("]", "").split(".")
        if not equals or not all(keys):
            problems.append(Problem(f"--set {override}", "is not of the form key.key=value", "e.g. --set seed=1"))
            continue
        try:
            _put(raw, keys, yaml.safe_load(text))
        except (ValueError, IndexError, TypeError, AttributeError, yaml.YAMLError) as error:
            problems.append(Problem(f"--set {override}", f"cannot be applied: {error}", "check the path and the value"))
    if problems:
        raise ConfigError(problems)
    return raw


def set_key(raw: dict[str, Any], path: str, value: Any) -> None:
    """Set one key of a raw recipe in place: "a.b", list items by number ("steps.0.method").

    Raises:
        ConfigError: the path points into nothing.
    """
    try:
        _put(raw, path.replace("[", ".").replace("]", "").split("."), copy.deepcopy(value))
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise ConfigError(Problem(path, f"cannot be set: {error}", "check the path")) from error


def _put(here: Any, keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        if isinstance(here, list):
            here = here[int(key)]
        elif here.get(key) is None:
            here[key] = {}
            here = here[key]
        else:
            here = here[key]
    last: Any = int(keys[-1]) if isinstance(here, list) else keys[-1]
    here[last] = value


def parse_recipe(raw: dict[str, Any], default_name: str = "run") -> Any:
    """The typed recipe.

    Raises:
        ConfigError: with every problem of the file at once: unknown keys, wrong types, impossible order, ...
    """
    raw = under_recipe({"name": default_name, **raw})
    problems: list[Problem] = []
    recipe = None
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        problems += problems_of(error, Recipe, raw)
        problems += _missing_in_sound_sections(raw)
    if isinstance(raw.get("steps"), list):
        problems += _step_problems(raw["steps"], has_data=raw.get("data") is not None)
    if recipe is not None:
        problems += _unfit_data(recipe)
    if problems:
        raise ConfigError(problems)
    return recipe


def _unfit_data(recipe: Any) -> list[Problem]:
    """Data to evaluate on alone before a step that learns from data, and dialogues without a judge."""
    problems = []
    if recipe.data is not None and recipe.data.splits.train == 0:
        fix = "give sizes to train and validation, or leave out this step"
        for index, step in enumerate(recipe.steps):
            if (reason := step.requires_data()) is not None:
                problems.append(Problem(f"steps[{index}]", f"{reason}, and data.splits.train is 0", fix))
    judge = 'judge: {endpoint: "http://localhost:8000/v1", model: ...}'
    for where, task, data in scored(recipe):
        if data.follow_ups is not None and (task.judge is None or task.metrics is not None):
            fix = f"add {judge}, and leave out metrics" + (", or set it to null" if where == "evaluate.task" else "")
            problems.append(Problem(where, "a judge, and no metric, grades the turns of data.follow_ups", fix))
    return problems


def _missing_in_sound_sections(raw: dict[str, Any]) -> list[Problem]:
    """What the sections that are right by themselves refer to in vain, so that it is told with the other problems."""
    sound: dict[str, Any] = {}
    for key, section in (("model", ModelSettings), ("data", DataSettings), ("evaluate", EvaluateSettings)):
        with contextlib.suppress(ValidationError):
            sound[key] = section.model_validate(raw.get(key))
    return missing_inputs(sound.get("model"), sound.get("data"), sound.get("evaluate"), "")


def _after_bundle(step: Step, where: str) -> list[Problem]:
    """What comes of a merge with policy auto that can only be a bundle."""
    if "bundled" not in step.forbids:
        return []
    what = "on this backbone policy auto makes a bundle of the adapter before it, which keeps it apart"
    fix = "train merge_aware_lora, whose merge keeps the compression, or put this step first"
    return [Problem(where, f'"{step.step}" cannot follow here: {what}', fix)]


def _step_problems(raw_steps: list[Any], has_data: bool) -> list[Problem]:
    """Wrong order, settings that do not fit together, missing data; also when other parts of the recipe are wrong."""
    problems = check_order(raw_steps)
    earlier: list[Step] = []
    for index, raw in enumerate(raw_steps):
        where = f"steps[{index}]"
        try:
            step: Step = TypeAdapter(_step_type()).validate_python(raw)
        except ValidationError:
            continue  # told already
        reason = step.requires_data()
        if reason is not None and not has_data:
            problems.append(Problem(where, f"{reason}, and the recipe has no data section", "add data:"))
        problems += step.check_against(earlier, where)
        if any(isinstance(past, Merge) and past.leaves_bundle(earlier[:place]) for place, past in enumerate(earlier)):
            problems += _after_bundle(step, where)
        earlier.append(step)
    return problems
