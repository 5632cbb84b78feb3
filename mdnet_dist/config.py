"""The configuration of a run: every field, its meaning, its unit and its default, in this one place.

A run is described by one YAML file plus dotted overrides (`train.epochs=3`). Unknown keys are refused with the nearest
known one, wrong types and contradictions are refused naming the values, and the result cannot be changed afterwards.
Two numbers own the batch: `train.global_batch` and `train.micro_batch`. Accumulation follows from them and the number
of ranks (`mdnet_dist.plan`), and DeepSpeed's dictionary is generated from this file (`mdnet_dist.engine`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from mdnet_dist.errors import InputError, nearest

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]


class Section(BaseModel):
    """A mapping of the YAML file; its fields' docstrings are their documentation (`docs/configuration.md`)."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


def _chosen_by(key: str, default: str | None) -> Discriminator:
    """Choose among sections by their `key`; a mapping without it means `default`."""
    return Discriminator(
        lambda value: value.get(key, default) if isinstance(value, dict) else getattr(value, key, None)
    )


# ---------------------------------------------------------------------------------------------------------------- data


class DataConfig(Section):
    """Which samples are read and how they become tensors."""

    shards: str
    """Folder of the shard set (with its manifest.json), as `python -m data_shards` writes it."""
    fold: Annotated[int, Field(ge=0)] | None = None
    """With a set dealt into F folds: test on this fold, validate on the next (cyclically), train on the others.
    Null for a set with train, val and test."""
    image_size: Annotated[int, Field(ge=16)] = 224
    """Side in px of the square the network sees."""
    fit: Literal["pad", "crop", "stretch"] = "pad"
    """How an image that is not square becomes one: the whole image on a border of its own mean colour (pad), the
    central square (crop: loses the border), or unequal scaling (stretch: changes shapes)."""
    reports_per_image: Positive = 1
    """R: reports drawn for each image at each step, without repetition; an image with fewer gives all it has."""
    max_tokens: Annotated[int, Field(ge=2)] = 40
    """Longest sentence in tokens, its end token included; longer ones are cut in training and counted at the start."""
    min_word_count: Positive = 1
    """Words that occur less often in the training parts become <unk>."""
    workers: Annotated[int, Field(ge=0)] = 1
    """Loader processes for each rank; 0 reads in the training process."""
    shuffle_window: Positive = 4096
    """Samples, over all ranks, within which the order is shuffled while shards are read in sequence; bounds memory."""


class AugmentConfig(Section):
    """Random changes to training images. Each is off by default, because whether it falsifies a report depends on the
    images; `mdnet_dist/augment.py` says beside each one what it may not be used for."""

    mirror: bool = False
    """Mirror left and right with probability 1/2. Not for images whose reports say left or right."""
    quarter_turns: bool = False
    """Rotate by 0, 90, 180 or 270 degrees. Only for images without an up side, such as histology."""
    shift_px: Annotated[int, Field(ge=0)] = 0
    """Move by up to so many px along each axis, the border reflected."""
    stain: NotNegative = 0.0
    """Standard deviation of the change of each stain's strength (haematoxylin, eosin); 0.1 is moderate. H&E only."""
    brightness: NotNegative = 0.0
    """Standard deviation of the factor on all channels; 0.1 is moderate."""


# --------------------------------------------------------------------------------------------------------------- model


class MedicalImageModel(Section):
    """D for medical images: 7x7 stride-2 stem, pooling, stages of bottleneck units (DESIGN.md section 3)."""

    form: Literal["medical"] = "medical"
    stem_channels: Positive = 64
    """Channels out of the 7x7 stem."""
    stage_channels: list[Positive] = [64, 128, 256, 256]
    """nOut of each stage: what a concatenated unit adds. A stage is 2 x nOut wide at concat_depth 0 and 1."""
    units_per_stage: list[Positive] = [3, 4, 6, 3]
    """Bottleneck units in each stage."""
    stage_strides: list[Literal[1, 2]] = [1, 2, 2, 1]
    """Stride of each stage's first unit; the stem and its pooling stride by 4 before them."""
    concat_depth: Annotated[int, Field(ge=0)] | Literal["full"] = 1
    """d: units at the start of each stage whose output is concatenated instead of added."""

    @model_validator(mode="after")
    def _stages_agree(self) -> MedicalImageModel:
        lengths = {len(self.stage_channels), len(self.units_per_stage), len(self.stage_strides)}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(
                f"stage_channels {self.stage_channels}, units_per_stage {self.units_per_stage} and stage_strides "
                f"{self.stage_strides} must be equally long"
            )
        _check_concat_depth(self.concat_depth, max(self.units_per_stage))
        if any(channels % 4 for channels in self.stage_channels):
            raise ValueError(f"stage_channels {self.stage_channels} must be multiples of 4, the bottleneck's factor")
        return self


class CifarImageModel(Section):
    """D for 32-px images, as EcNet's authors released it: 3x3 stem of 16, stages 16k, 32k, 64k/2."""

    form: Literal["cifar"] = "cifar"
    depth: Positive = 56
    """9n + 2 for n units in each of the three stages."""
    widening: Positive = 12
    """k: multiplies the stages' channels."""
    concat_depth: Annotated[int, Field(ge=0)] | Literal["full"] = 1
    """d: units at the start of each stage whose output is concatenated instead of added."""

    @model_validator(mode="after")
    def _depth_fits(self) -> CifarImageModel:
        if self.depth % 9 != 2 or self.depth < 11:
            raise ValueError(f"depth {self.depth} must be 9n + 2, as 11, 20, 29, 38, 47, 56")
        _check_concat_depth(self.concat_depth, (self.depth - 2) // 9)
        return self


def _check_concat_depth(concat_depth: int | str, most_units: int) -> None:
    if isinstance(concat_depth, int) and concat_depth > most_units:
        raise ValueError(f"concat_depth {concat_depth} exceeds the {most_units} units of the longest stage; write full")


class LanguageModelConfig(Section):
    """L: the LSTM that says each topic's sentence (DESIGN.md section 3)."""

    embedding: Positive = 256
    """Size of word and topic embeddings."""
    hidden: Positive = 512
    """H: units of the LSTM."""
    attention: Positive = 256
    """Size of the space in which a map position meets the LSTM's state."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.3
    """Share of word-embedding and output features dropped in training."""


class ModelConfig(Section):
    """The network."""

    image: Annotated[
        Annotated[MedicalImageModel, Tag("medical")] | Annotated[CifarImageModel, Tag("cifar")],
        _chosen_by("form", "medical"),
    ] = MedicalImageModel()
    """D; `form` chooses between medical and cifar."""
    language: LanguageModelConfig = LanguageModelConfig()
    sharpening: Literal["cam", "none"] = "cam"
    """cam: the predicted class's activation map goes into L's attention; none: Show-Attend-Tell attention."""


# --------------------------------------------------------------------------------------------------------------- blend


class ConstantBeta(Section):
    """beta(t) = value."""

    kind: Literal["constant"]
    value: Fraction = 0.5


class LinearBeta(Section):
    """A straight line from start to end."""

    kind: Literal["linear"]
    start: Fraction = 0.1
    end: Fraction = 0.9


class CosineBeta(Section):
    """Half a cosine from start to end: slow, fast, slow."""

    kind: Literal["cosine"]
    start: Fraction = 0.1
    end: Fraction = 0.9


class SigmoidBeta(Section):
    """A logistic curve through the middle of start and end at the fraction `midpoint`."""

    kind: Literal["sigmoid"]
    start: Fraction = 0.1
    end: Fraction = 0.9
    midpoint: Fraction = 0.5
    steepness: PositiveFloat = 12.0
    """Slope of the logistic's argument, per unit of the fraction of training done."""


class DelayedStepBeta(Section):
    """start until the fraction `at`, end from there on."""

    kind: Literal["delayed_step"]
    start: Fraction = 0.1
    end: Fraction = 0.9
    at: Fraction = 0.5


class PiecewiseBeta(Section):
    """Straight lines between knots."""

    kind: Literal["piecewise"]
    knots: list[list[Fraction]]
    """[[fraction of training done, beta], ...], fractions rising; constant before the first and after the last."""

    @model_validator(mode="after")
    def _knots_rise(self) -> PiecewiseBeta:
        if not self.knots or any(len(knot) != 2 for knot in self.knots):
            raise ValueError(f"knots {self.knots} must be pairs [fraction, beta]")
        fractions = [knot[0] for knot in self.knots]
        if any(later <= earlier for earlier, later in itertools.pairwise(fractions)):
            raise ValueError(f"knots' fractions {fractions} must rise")
        return self


BetaSchedule = Annotated[
    Annotated[ConstantBeta, Tag("constant")]
    | Annotated[LinearBeta, Tag("linear")]
    | Annotated[CosineBeta, Tag("cosine")]
    | Annotated[SigmoidBeta, Tag("sigmoid")]
    | Annotated[DelayedStepBeta, Tag("delayed_step")]
    | Annotated[PiecewiseBeta, Tag("piecewise")],
    _chosen_by("kind", None),
]


class BlendConfig(Section):
    """Eq. 12: theta_D <- theta_D - lambda ((1 - beta) dL_M + beta eta dL_L)."""

    beta: BetaSchedule = ConstantBeta(kind="constant", value=0.5)
    """Weight of the language loss on the image model, as a function of the fraction of training done."""
    eta: PositiveFloat | Literal["balanced"] = 1.0
    """Factor on the language gradient; balanced: the running ratio of both gradients' norms where they enter D."""
    eta_memory: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.98
    """Share of the running norms that one step keeps; used by `eta: balanced` only."""


# ----------------------------------------------------------------------------------------------------------- optimizer


class ScheduleConfig(Section):
    """Learning rate as a function of the fraction of training done."""

    kind: Literal["cosine", "step", "constant"] = "cosine"
    warmup: Fraction = 0.05
    """Share of training over which the rate rises linearly from 0."""
    end: Fraction = 0.0
    """cosine: share of the rate that is left at the end."""
    milestones: list[Fraction] = [0.3, 0.6, 0.8]
    """step: fractions of training at which the rate is multiplied by `factor`."""
    factor: PositiveFloat = 0.2
    """step: what the rate is multiplied by."""

    @model_validator(mode="after")
    def _milestones_rise(self) -> ScheduleConfig:
        if self.milestones != sorted(set(self.milestones)):
            raise ValueError(f"milestones {self.milestones} must rise")
        return self


class SgdGroup(Section):
    """SGD with momentum."""

    lr: NotNegative = 0.1
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    nesterov: bool = True
    weight_decay: NotNegative = 5e-4
    """Added to the gradient, as classic SGD does."""
    schedule: ScheduleConfig = ScheduleConfig()


class AdamGroup(Section):
    """Adam with decoupled weight decay."""

    lr: NotNegative = 1e-3
    betas: list[Fraction] = [0.9, 0.999]
    eps: PositiveFloat = 1e-8
    weight_decay: NotNegative = 0.0
    """Decoupled (AdamW)."""
    schedule: ScheduleConfig = ScheduleConfig()

    @model_validator(mode="after")
    def _two_betas(self) -> AdamGroup:
        if len(self.betas) != 2 or max(self.betas) >= 1.0:
            raise ValueError(f"betas {self.betas} must be two numbers below 1")
        return self


class SgdAdamConfig(Section):
    """SGD for the image model, Adam for class head and language model."""

    kind: Literal["sgd_adam"] = "sgd_adam"
    image: SgdGroup = SgdGroup()
    """theta_D."""
    head: AdamGroup = AdamGroup()
    """theta_M."""
    language: AdamGroup = AdamGroup()
    """theta_L."""


class AdamWConfig(Section):
    """AdamW for all three."""

    kind: Literal["adamw"]
    image: AdamGroup = AdamGroup()
    """theta_D."""
    head: AdamGroup = AdamGroup()
    """theta_M."""
    language: AdamGroup = AdamGroup()
    """theta_L."""


# ------------------------------------------------------------------------------------------------------------ training


class TrainConfig(Section):
    """How long, in which batches, with which arithmetic."""

    epochs: Positive = 100
    global_batch: Positive = 64
    """Images in one update of the weights, over all ranks and accumulation steps."""
    micro_batch: Positive = 16
    """Most images a rank puts through the network at once; smaller where the ranks' shares of the batch are."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of initial weights, sample order, augmentation, report choice and dropout."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast; weights, BatchNorm and optimiser state stay fp32."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """ZeRO: 0 replicates all; 1 shards the optimiser's state, 2 gradients too, 3 weights too."""
    clip_norm: NotNegative = 0.0
    """Largest norm of the whole gradient; 0 does not clip."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Of L_M: share of the probability spread over all classes."""
    log_every_steps: Positive = 10
    max_bad_steps: Positive = 5
    """Steps in a row with a loss or gradient that is not finite (all ranks skip each) before training stops with 3."""
    keep_last: Positive = 2
    """Newest checkpoints kept."""
    keep_best: Annotated[int, Field(ge=0)] = 1
    """Best checkpoints by the validation score kept besides."""
    checkpoint_every_epochs: Positive = 1


class EvaluateConfig(Section):
    """Generation and scoring."""

    every_epochs: Positive = 1
    """Score the validation part after every so many epochs, and after the last."""
    batch: Positive = 64
    """Images a rank decodes at once."""
    beam_width: Positive = 1
    """1: greedy; more: beam search, by mean log-likelihood of a sentence's tokens."""
    metric: str = "dca_bleu4"
    """What `best` means: any logged metric without its part (bleu4, dca, label_accuracy, cider ...), or dca_bleu4, the
    mean of dca and bleu4; where the set has no conclusion it is bleu4 alone."""
    pictures: Annotated[int, Field(ge=0)] = 4
    """Sample reports drawn with their attention and logged as artifacts."""


class TrackingConfig(Section):
    """MLflow."""

    uri: str | None = None
    """Tracking URI; null: MLFLOW_TRACKING_URI where set, else sqlite at runs/mlflow.db of the checkout."""
    experiment: str = "mdnet"


class RunConfig(Section):
    """One training run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Of the run's folder and of its MLflow run."""
    runs_folder: str = "runs"
    """Where run folders are made."""
    data: DataConfig
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig()
    blend: BlendConfig = BlendConfig()
    optimizer: Annotated[
        Annotated[SgdAdamConfig, Tag("sgd_adam")] | Annotated[AdamWConfig, Tag("adamw")],
        _chosen_by("kind", "sgd_adam"),
    ] = SgdAdamConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    tracking: TrackingConfig = TrackingConfig()
    deepspeed: dict[str, Any] = {}
    """Merged over the generated DeepSpeed dictionary, for experts; the batch keys are refused, they have one owner."""

    @model_validator(mode="after")
    def _one_owner(self) -> RunConfig:
        if self.train.micro_batch > self.train.global_batch:
            raise ValueError(
                f"train.micro_batch {self.train.micro_batch} exceeds train.global_batch {self.train.global_batch}"
            )
        owned = {
            "train_batch_size": "train.global_batch",
            "train_micro_batch_size_per_gpu": "train.micro_batch",
            "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
            "gradient_clipping": "train.clip_norm",
            "optimizer": "optimizer",
            "scheduler": "optimizer.*.schedule",
        }
        for key, owner in owned.items():
            if key in self.deepspeed:
                raise ValueError(f"deepspeed.{key} {self.deepspeed[key]!r} is not given there; set {owner}")
        stage = (self.deepspeed.get("zero_optimization") or {}).get("stage", self.train.zero_stage)
        if stage != self.train.zero_stage:
            raise ValueError(
                f"deepspeed.zero_optimization.stage {stage} contradicts train.zero_stage "
                f"{self.train.zero_stage}; set the latter"
            )
        return self


# ------------------------------------------------------------------------------------------------------------- reading


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-3 as a number: YAML 1.1 wants 1.0e-3 and makes the other a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply dotted overrides and check the result.

    Args:
        path: the YAML file.
        overrides: `dotted.key=value`, the value written as in YAML.

    Raises:
        InputError: no such file, not YAML, an unknown key, a wrong type or value, or a contradiction.
    """
    values = read_yaml(path)
    for override in overrides:
        apply_override(values, override)
    return check_config(values, str(path), {override.partition("=")[0] for override in overrides})


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, loaded safely.

    Raises:
        InputError: no such file, not YAML, or not a mapping.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)  # noqa: S506 (a SafeLoader)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name a YAML file such as launch/configs/demo.yaml") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: must hold a mapping of keys to values")
    return values


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one `dotted.key=value` in a nested mapping, in place.

    Raises:
        InputError: no equals sign, a value that is not YAML, or a key below something that is not a mapping.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"override '{override}': must be dotted.key=value, as train.epochs=3")
    try:
        value = yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"override '{override}': the value is not valid YAML") from error
    *above, last = key.split(".")
    for name in above:
        below = values.setdefault(name, {})
        if not isinstance(below, dict):
            raise InputError(f"override '{override}': '{name}' is {below!r}, not a mapping")
        values = below
    if isinstance(value, dict) and isinstance(values.get(last), dict):
        values[last] = {**values[last], **value}
    else:
        values[last] = value


def check_config(
    values: Mapping[str, Any], source: str, overridden: set[str] | frozenset[str] = frozenset()
) -> RunConfig:
    """Turn a nested mapping into a checked configuration.

    Args:
        values: as read from YAML.
        source: file name for messages.
        overridden: dotted keys that came from the command line, for messages.

    Raises:
        InputError: the first thing that is wrong, with its dotted key.
    """
    try:
        return RunConfig.model_validate(dict(values))
    except ValidationError as error:
        raise InputError(_first_error(error, source, overridden)) from None
    except RecursionError:
        raise InputError(f"{source}: nested too deeply") from None


def _first_error(error: ValidationError, source: str, overridden: set[str] | frozenset[str]) -> str:
    """One line for pydantic's first error; unknown keys come first, because a misspelt key causes others."""
    details = sorted(error.errors(include_url=False), key=lambda detail: detail["type"] != "extra_forbidden")
    detail = details[0]
    holder, names = _locate(detail["loc"])
    key = ".".join(names)
    from_override = any(key == dotted or key.startswith(f"{dotted}.") for dotted in overridden)
    place = f"override '{key}'" if from_override else f"{source}: {key}" if key else source
    kind, message = detail["type"], detail["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        return f"{place}: unknown key; {nearest(names[-1], holder.model_fields)}"
    if kind == "missing":
        return f"{place}: missing; {describe_field(holder, names[-1])}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        sections = _sections_in(holder.model_fields[names[-1]])
        return f"{place}: {_tag_key(sections[0])} must be one of {', '.join(map(_tag, sections))}"
    if kind == "value_error":
        return f"{place}: {message}"
    return f"{place}: {message[0].lower()}{message[1:]}, but it is {detail['input']!r}"


def _locate(location: tuple[int | str, ...]) -> tuple[type[Section], list[str]]:
    """The section that owns a pydantic error location, and the location as the user writes it: without union tags."""
    holder: type[Section] = RunConfig
    choices: list[type[Section]] = [RunConfig]
    names: list[str] = []
    for step in location:
        if len(choices) > 1:  # pydantic names the branch of a union here, the user does not
            choices = [section for section in choices if _tag(section) == step]
        elif choices:
            holder = choices[0]
            names.append(str(step))
            choices = _sections_in(holder.model_fields[str(step)]) if step in holder.model_fields else []
        elif isinstance(step, int):
            names.append(str(step))
    return holder, names


def _sections_in(annotation: Any) -> list[type[Section]]:
    annotation = getattr(annotation, "annotation", annotation)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for argument in get_args(annotation) for section in _sections_in(argument)]


def _tag_key(section: type[Section]) -> str:
    return "form" if "form" in section.model_fields else "kind"


def _tag(section: type[Section]) -> str:
    return str(get_args(section.model_fields[_tag_key(section)].annotation)[0])


def describe_field(section: type[Section], name: str) -> str:
    """A field's docstring on one line."""
    return " ".join((section.model_fields[name].description or name).split())


# ------------------------------------------------------------------------------------------------------------- writing


def as_yaml(config: Section) -> str:
    """The resolved configuration, every default written out; `load_config` reads it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def flatten(config: Section) -> dict[str, Any]:
    """`{"train.epochs": 3, ...}`: one entry a leaf, lists whole."""

    def leaves(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for name, value in values.items():
            key = f"{prefix}{name}"
            flat.update(leaves(f"{key}.", value) if isinstance(value, dict) and value else {key: value})
        return flat

    return leaves("", config.model_dump(mode="json"))
