"""The configuration of a run: every field, its meaning, its unit and its default, in this one place.

A run is described by a YAML file, overlays (YAML files with a part of a configuration) and dotted overrides
(`train.epochs=3`). Unknown keys are refused with the nearest known one, wrong types and contradictions are refused
naming the values, and the result cannot be changed afterwards.
Two numbers own the batch: `train.global_batch` and `train.micro_batch`. Accumulation follows from them and the number
of ranks (`mdnet_dist.plan`), and DeepSpeed's dictionary is generated from this file (`mdnet_dist.engine`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, JsonValue, Tag, ValidationError, model_validator
from pydantic.fields import FieldInfo
from yaml.constructor import ConstructorError

from mdnet_dist.errors import InputError, nearest

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Positive = Annotated[int, Field(gt=0, lt=2**31)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Section(BaseModel):
    """A mapping of the YAML file; its fields' docstrings are their documentation (`docs/configuration.md`)."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,  # a password might be in it
    )


AnySection = TypeVar("AnySection", bound=Section)


def chosen_by(key: str, default: str | None) -> Discriminator:
    """Choose among sections by their `key`; a mapping without it means `default`."""
    return Discriminator(
        lambda value: value.get(key, default) if isinstance(value, dict) else getattr(value, key, None)
    )


def _holds_password(address: str) -> bool:
    """Whether an address may hold `user:password@`. A password may have a slash or @ in it, so that the end of its
    server's name tells nothing; in http, a colon and an @ behind it in the path count as one as well. Object stores
    have such paths, and none but `KEY:SECRET@` before their first slash."""
    return bool(re.search(r"(?i)https?://[^@]*:.*@|://[^/@]*:.*@", address, re.DOTALL))


# ---------------------------------------------------------------------------------------------------------------- data


class DataConfig(Section):
    """Which samples are read and how they become tensors."""

    shards: str
    """Folder of the shard set (with its manifest.json), as `python -m data_shards` writes it, or the address of one:
    http://, https://, s3://, gs://, gcs://, az:// or abfs://. Passwords belong into ~/.netrc or the environment: one in
    the address is refused, for a run keeps its configuration."""
    fold: Count | None = None
    """With a set dealt into F folds: test on this fold, validate on the next (cyclically), train on the others.
    Null for a set with train, val and test."""
    image_size: Annotated[int, Field(ge=16, le=8192)] = 224
    """Side in px of the square the network sees."""
    fit: Literal["pad", "crop", "stretch"] = "pad"
    """How an image that is not square becomes one: the whole image on a border of its own mean colour (pad), the
    central square (crop: loses the border), or unequal scaling (stretch: changes shapes)."""
    reports_per_image: Positive = 1
    """R: reports drawn for each image at each step, without repetition; an image with fewer gives all it has."""
    sentences: Literal["topics", "report"] = "topics"
    """topics: the network says a sentence on each topic. report: it says one sentence for the whole report, the topics'
    sentences joined in the set's order with the conclusion last; the conclusion is then read off its end."""
    max_tokens: Annotated[int, Field(ge=2, le=4096)] = 40
    """Longest sentence in tokens, its end token included; longer ones are cut in training and counted at the start."""
    min_word_count: Positive = 1
    """Words that occur less often in the training parts become <unk>."""
    workers: Count = 1
    """Loader processes for each rank; 0 reads in the training process."""
    shuffle_window: Positive = 4096
    """Samples, over all ranks, within which the order is shuffled while shards are read in sequence; bounds memory."""
    cache: str = "runs/shard_cache"
    """Folder for shards that are read from an address, kept for later runs and shared by all processes of a machine; on
    a local disk, best. A shard that makes room while it is read keeps its place on the disk until it has been read."""
    cache_gib: Annotated[float, Field(gt=0.0, le=1e9)] = 32.0
    """Most GiB in that folder, downloads under way included; those used longest ago make room for others."""
    remote_timeout_seconds: Annotated[float, Field(gt=0.0, le=86400.0)] = 60.0
    """Longest silence in s of a server before a read of an address counts as stalled. Object stores are read 4 MiB at a
    time, which must come within it."""
    remote_patience_seconds: Annotated[float, Field(ge=0.0, le=604800.0)] = 600.0
    """How long in s a read of an address that fails in a way that may pass (nobody answers, a connection breaks, an
    error 5xx) is tried again, from the file's beginning each time, before the shard counts as damaged. Pauses are 1 s,
    2 s, 4 s and so on, 60 s at most. Keep it, with remote_timeout_seconds, below train.patience_seconds, which such a
    wait counts against. Bytes that differ from the manifest are asked for three times, whatever this says."""
    damaged: Literal["strict", "skip"] = "strict"
    """strict: what is damaged ends the run, with shard, sample and byte named. skip: it is left out, counted and told.
    Its places in training hold a blank that adds to no loss, so that all else comes when it would have come; in
    evaluation it is not scored. A shard that is missing or not what the manifest says is left out whole: which of its
    bytes are wrong is not known."""
    most_damaged: Fraction = 0.01
    """With skip: the share of an epoch's or part's images that may be damaged; one more ends the run. A resumed epoch
    counts from where it goes on."""

    @model_validator(mode="after")
    def _no_password(self) -> DataConfig:
        if "://" in self.shards and re.search(r"[?#\s]", self.shards):  # ?token=..., and no file name can be added
            raise ValueError("shards was given as an address with ?, # or a blank; give that of the set's folder alone")
        if _holds_password(self.shards):
            raise ValueError(
                "shards was given with a password, which would be written into the run's configuration; put it into "
                "~/.netrc (in the path of an http address, @ is written %40)"
            )
        return self


class AugmentConfig(Section):
    """Random changes to training images. Each is off by default, because whether it falsifies a report depends on the
    images; `mdnet_dist/augment.py` says beside each one what it may not be used for."""

    mirror: bool = False
    """Mirror left and right with probability 1/2. Not for images whose reports say left or right."""
    quarter_turns: bool = False
    """Rotate by 0, 90, 180 or 270 degrees. Only for images without an up side, such as histology."""
    shift_px: Count = 0
    """Move by up to so many px along each axis, the border reflected."""
    stain: Fraction = 0.0
    """Standard deviation of the change of each stain's strength (haematoxylin, eosin); 0.1 is moderate. H&E only."""
    brightness: Fraction = 0.0
    """Standard deviation of the factor on all channels; 0.1 is moderate."""


# --------------------------------------------------------------------------------------------------------------- model


class MedicalImageModel(Section):
    """D for medical images: 7x7 stride-2 stem, pooling, stages of bottleneck units (docs/design.md section 1)."""

    form: Literal["medical"] = "medical"
    """Chooses this section."""
    stem_channels: Positive = 64
    """Channels out of the 7x7 stem."""
    stage_channels: list[Positive] = [64, 128, 256, 256]
    """nOut of each stage: what a concatenated unit adds. A stage is 2 x nOut wide at concat_depth 0 and 1."""
    units_per_stage: list[Annotated[int, Field(gt=0, le=1000)]] = [3, 4, 6, 3]
    """Bottleneck units in each stage."""
    stage_strides: list[Annotated[int, Field(ge=1, le=2)]] = [1, 2, 2, 1]
    """Stride of each stage's first unit; the stem and its pooling stride by 4 before them."""
    concat_depth: Count | Literal["full"] = 1
    """d: units at the start of each stage whose output is concatenated instead of added."""
    padding: Literal["zeros", "reflect"] = "zeros"
    """What convolutions see beyond the image's border. With zeros, border positions know where they are and come to
    hold what is true of the whole image, which draws the attention there; the mirrored image tells them nothing."""

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
    """Chooses this section."""
    depth: Annotated[int, Field(gt=0, le=2000)] = 56
    """9n + 2 for n units in each of the three stages."""
    widening: Positive = 12
    """k: multiplies the stages' channels."""
    concat_depth: Count | Literal["full"] = 1
    """d: units at the start of each stage whose output is concatenated instead of added."""

    @model_validator(mode="after")
    def _depth_fits(self) -> CifarImageModel:
        if self.depth % 9 != 2 or self.depth < 11:
            raise ValueError(f"depth {self.depth} must be 9n + 2, as 11, 20, 29, 38, 47, 56")
        _check_concat_depth(self.concat_depth, (self.depth - 2) // 9)
        return self


class GoogLeNetImageModel(Section):
    """D of the NeuralTalk2 baseline: GoogLeNet with batch normalisation (`mdnet_dist/model/googlenet.py`)."""

    form: Literal["googlenet"] = "googlenet"
    """Chooses this section."""
    width: Annotated[float, Field(gt=0.0, le=8.0)] = 1.0
    """Multiplies all channels, rounded to multiples of 4; 1 is the published network."""
    pretrained: str | None = None
    """File of weights that a new run starts from, as torchvision publishes them for its googlenet: .pth or
    .safetensors, nothing of which is executed. Its classifiers (fc, aux1, aux2) are ignored. Null: from scratch."""

    @model_validator(mode="after")
    def _pretrained_fits(self) -> GoogLeNetImageModel:
        if self.pretrained is not None and self.width != 1.0:
            raise ValueError(f"width {self.width} contradicts pretrained {self.pretrained}; such weights have width 1")
        return self


def _check_concat_depth(concat_depth: int | str, most_units: int) -> None:
    if isinstance(concat_depth, int) and concat_depth > most_units:
        raise ValueError(f"concat_depth {concat_depth} exceeds the {most_units} units of the longest stage; write full")


class LanguageModelConfig(Section):
    """L: the LSTM that says each topic's sentence (docs/design.md section 1)."""

    embedding: Positive = 256
    """Size of word and topic embeddings."""
    hidden: Positive = 512
    """H: units of the LSTM."""
    attention: Count = 256
    """Size of the space in which a map position meets the LSTM's state. 0: no attention; the image then enters through
    the LSTM's first input alone, as in NeuralTalk."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.3
    """Share of word-embedding and output features dropped in training."""


class ModelConfig(Section):
    """The network."""

    image: Annotated[
        Annotated[MedicalImageModel, Tag("medical")]
        | Annotated[CifarImageModel, Tag("cifar")]
        | Annotated[GoogLeNetImageModel, Tag("googlenet")],
        chosen_by("form", "medical"),
    ] = MedicalImageModel()
    """D; `form` chooses among medical, cifar and googlenet."""
    language: LanguageModelConfig = LanguageModelConfig()
    """L."""
    sharpening: Literal["cam", "none"] = "cam"
    """cam: the spread of the class activation maps over the classes goes into L's attention; none: Show-Attend-Tell
    attention."""
    sharpness: NotNegative = 2.0
    """cam: what a position's score in the attention gains where that spread lies one standard deviation above its mean;
    0 is as none."""

    @model_validator(mode="after")
    def _something_to_sharpen(self) -> ModelConfig:
        if not self.language.attention and self.sharpening != "none":
            raise ValueError(
                f"sharpening {self.sharpening} contradicts language.attention 0: there is nothing to sharpen; "
                "set sharpening none"
            )
        return self


# --------------------------------------------------------------------------------------------------------------- blend


class ConstantBeta(Section):
    """beta(t) = value."""

    kind: Literal["constant"]
    """Chooses this section."""
    value: Fraction = 0.5
    """beta throughout training."""


class LinearBeta(Section):
    """A straight line from start to end."""

    kind: Literal["linear"]
    """Chooses this section."""
    start: Fraction = 0.1
    """beta at the start of training."""
    end: Fraction = 0.9
    """beta at its end."""


class CosineBeta(Section):
    """Half a cosine from start to end: slow, fast, slow."""

    kind: Literal["cosine"]
    """Chooses this section."""
    start: Fraction = 0.1
    """beta at the start of training."""
    end: Fraction = 0.9
    """beta at its end."""


class SigmoidBeta(Section):
    """A logistic curve through the middle of start and end at the fraction `midpoint`."""

    kind: Literal["sigmoid"]
    """Chooses this section."""
    start: Fraction = 0.1
    """beta long before `midpoint`."""
    end: Fraction = 0.9
    """beta long after it."""
    midpoint: Fraction = 0.5
    """Fraction of training done where beta is halfway."""
    steepness: PositiveFloat = 12.0
    """Slope of the logistic's argument, per unit of the fraction of training done."""


class DelayedStepBeta(Section):
    """start until the fraction `at`, end from there on."""

    kind: Literal["delayed_step"]
    """Chooses this section."""
    start: Fraction = 0.1
    """beta before the step."""
    end: Fraction = 0.9
    """beta from the step on."""
    at: Fraction = 0.5
    """Fraction of training done at which beta steps."""


class PiecewiseBeta(Section):
    """Straight lines between knots."""

    kind: Literal["piecewise"]
    """Chooses this section."""
    knots: list[list[Fraction]]
    """[[fraction of training done, beta], ...], fractions rising; constant before the first and after the last."""

    @model_validator(mode="after")
    def _knots_rise(self) -> PiecewiseBeta:
        _check_knots(self.knots, "beta")
        return self


def _check_knots(knots: list[list[float]], ordinate: str) -> None:
    """Refuse what is not pairs, and fractions outside 0..1 or out of order."""
    if not knots or any(len(knot) != 2 for knot in knots):
        raise ValueError(f"knots {knots} must be pairs [fraction, {ordinate}]")
    fractions = [knot[0] for knot in knots]
    if any(later <= earlier for earlier, later in itertools.pairwise(fractions)):
        raise ValueError(f"knots' fractions {fractions} must rise")
    if fractions[-1] > 1:
        raise ValueError(f"knots' fractions {fractions} must not exceed 1")


BetaSchedule = Annotated[
    Annotated[ConstantBeta, Tag("constant")]
    | Annotated[LinearBeta, Tag("linear")]
    | Annotated[CosineBeta, Tag("cosine")]
    | Annotated[SigmoidBeta, Tag("sigmoid")]
    | Annotated[DelayedStepBeta, Tag("delayed_step")]
    | Annotated[PiecewiseBeta, Tag("piecewise")],
    chosen_by("kind", None),
]


class PiecewiseEta(Section):
    """Straight lines in log eta between knots: halfway between knots of 1 and 4, eta is 2."""

    kind: Literal["piecewise"]
    """piecewise, the one kind of schedule that eta has."""
    knots: list[list[NotNegative]]
    """[[fraction of training done, eta], ...], fractions rising, eta above 0; constant before the first and after the
    last."""

    @model_validator(mode="after")
    def _knots_rise(self) -> PiecewiseEta:
        _check_knots(self.knots, "eta")
        if any(eta <= 0 for _, eta in self.knots):
            raise ValueError(f"knots {self.knots} must have eta above 0")
        return self


EtaSchedule = Annotated[
    Annotated[PositiveFloat | Literal["balanced"], Tag("value")] | Annotated[PiecewiseEta, Tag("piecewise")],
    Discriminator(lambda value: "piecewise" if isinstance(value, dict | PiecewiseEta) else "value"),
]


class BlendConfig(Section):
    """Eq. 12: theta_D <- theta_D - lambda ((1 - beta) dL_M + beta eta dL_L)."""

    beta: BetaSchedule = ConstantBeta(kind="constant", value=0.5)
    """Weight of the language loss on the image model, as a function of the fraction of training done."""
    eta: EtaSchedule = 1.0
    """Factor on the language gradient; balanced: the running ratio of both gradients' norms where they enter D; a
    section: a function of the fraction of training done."""
    eta_memory: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.98
    """Share of the running norms that one step keeps; used by `eta: balanced` only."""


# ----------------------------------------------------------------------------------------------------------- optimizer


class ScheduleConfig(Section):
    """Learning rate as a function of the fraction of training done."""

    kind: Literal["cosine", "step", "constant"] = "cosine"
    """Shape behind the warm-up."""
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
    """Learning rate, before the schedule."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Share of the last step's velocity that is kept."""
    nesterov: bool = True
    """Look ahead along the velocity; without momentum it changes nothing."""
    weight_decay: NotNegative = 5e-4
    """Added to the gradient, as classic SGD does."""
    schedule: ScheduleConfig = ScheduleConfig()
    """What becomes of the rate as training goes on."""


class AdamGroup(Section):
    """Adam with decoupled weight decay."""

    lr: NotNegative = 1e-3
    """Learning rate, before the schedule."""
    betas: list[Fraction] = [0.9, 0.999]
    """Shares of the running means of gradient and squared gradient that one step keeps."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the mean squared gradient."""
    weight_decay: NotNegative = 0.0
    """Decoupled (AdamW)."""
    schedule: ScheduleConfig = ScheduleConfig()
    """What becomes of the rate as training goes on."""

    @model_validator(mode="after")
    def _two_betas(self) -> AdamGroup:
        if len(self.betas) != 2 or max(self.betas) >= 1.0:
            raise ValueError(f"betas {self.betas} must be two numbers below 1")
        return self


class SgdAdamConfig(Section):
    """SGD for the image model, Adam for class head and language model."""

    kind: Literal["sgd_adam"] = "sgd_adam"
    """Chooses this section."""
    image: SgdGroup = SgdGroup()
    """theta_D."""
    head: AdamGroup = AdamGroup()
    """theta_M."""
    language: AdamGroup = AdamGroup()
    """theta_L."""


class AdamWConfig(Section):
    """AdamW for all three."""

    kind: Literal["adamw"]
    """Chooses this section."""
    image: AdamGroup = AdamGroup()
    """theta_D."""
    head: AdamGroup = AdamGroup()
    """theta_M."""
    language: AdamGroup = AdamGroup()
    """theta_L."""


class SgdConfig(Section):
    """SGD for all three, as image classifiers are trained."""

    kind: Literal["sgd"]
    """Chooses this section."""
    image: SgdGroup = SgdGroup()
    """theta_D."""
    head: SgdGroup = SgdGroup()
    """theta_M."""
    language: SgdGroup = SgdGroup()
    """theta_L."""


OptimizerConfig = Annotated[
    Annotated[SgdAdamConfig, Tag("sgd_adam")] | Annotated[AdamWConfig, Tag("adamw")] | Annotated[SgdConfig, Tag("sgd")],
    chosen_by("kind", "sgd_adam"),
]


# ------------------------------------------------------------------------------------------------------------ training


class TrainConfig(Section):
    """How long, in which batches, with which arithmetic."""

    epochs: Positive = 100
    """Passes over the training part."""
    global_batch: Positive = 64
    """Images in one update of the weights, over all ranks and accumulation steps."""
    micro_batch: Positive = 16
    """Most images a rank puts through the network at once; smaller where the ranks' shares of the batch are."""
    seed: Count = 0
    """Of initial weights, sample order, augmentation, report choice and dropout."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """bf16: autocast; weights, BatchNorm and optimiser state stay fp32. auto: bf16 where the device multiplies matrices
    of it (GPUs from Ampere on, CPUs with AMX), else fp32; the same seed then scores a little differently elsewhere."""
    compile: bool = False
    """torch.compile of the image model: fuses what lies between convolutions. For GPUs; on CPUs it gains nothing. The
    first step takes a minute or more."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """ZeRO: 0 replicates all; 1 shards the optimiser's state, 2 gradients too, 3 weights too."""
    clip_norm: NotNegative = 0.0
    """Largest norm of the whole gradient; 0 does not clip."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Of L_M: share of the probability spread over all classes."""
    log_every_steps: Positive = 10
    """Steps from one printed and logged line to the next."""
    max_bad_steps: Positive = 5
    """Steps in a row with a loss or gradient that is not finite (all ranks skip each) before training stops with 3."""
    keep_last: Positive = 2
    """Newest checkpoints kept."""
    keep_best: Count = 1
    """Best checkpoints by the validation score kept besides."""
    checkpoint_every_epochs: Positive = 1
    """Epochs from one checkpoint to the next; a new best score and the end are saved besides."""
    checkpoint_every_steps: Count = 0
    """Steps from one checkpoint to the next inside an epoch, for long epochs; 0: none."""
    patience_seconds: PositiveFloat = 900.0
    """Longest time without a step, a scored batch or a checkpoint before a rank counts as hanging and the job ends with
    code 3."""
    ledger: bool = False
    """Write the keys of each step's images into samples.jsonl of the run's folder, for audits."""


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
    pictures: Count = 4
    """Sample reports drawn with their attention and logged as artifacts."""


class TrackingConfig(Section):
    """MLflow."""

    uri: str | None = None
    """Tracking URI; null: MLFLOW_TRACKING_URI where set, else sqlite at runs/mlflow.db of the checkout. One with a
    password is refused, for a run keeps its configuration; it belongs into MLFLOW_TRACKING_URI, or user and password
    into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""
    experiment: str = "mdnet"
    """MLflow experiment that the run belongs to."""

    @model_validator(mode="after")
    def _no_password(self) -> TrackingConfig:
        uri = self.uri or ""
        if _holds_password(uri) or re.search(r"(?i)^https?:[^?#]*[?#]|[?&#;].*(passw|pwd|token|secret)", uri):
            raise ValueError(
                "uri was given with a password, which would be written into the run's configuration; put it into the "
                "environment variable MLFLOW_TRACKING_URI instead, or user and password into MLFLOW_TRACKING_USERNAME "
                "and MLFLOW_TRACKING_PASSWORD"
            )
        return self


class RunConfig(Section):
    """One training run."""

    name: FileName
    """Of the run's folder and of its MLflow run."""
    runs_folder: str = "runs"
    """Where run folders are made."""
    data: DataConfig
    """Which samples are read and how they become tensors."""
    augment: AugmentConfig = AugmentConfig()
    """Random changes to training images."""
    model: ModelConfig = ModelConfig()
    """The network."""
    blend: BlendConfig = BlendConfig()
    """How the two losses share the image model."""
    optimizer: OptimizerConfig = SgdAdamConfig()
    """How the weights move; `kind` chooses between sgd_adam, adamw and sgd."""
    train: TrainConfig = TrainConfig()
    """How long, in which batches, with which arithmetic."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Generation and scoring."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""
    deepspeed: dict[str, JsonValue] = {}
    """Merged over the generated DeepSpeed dictionary, for experts; the batch keys are refused, they have one owner."""

    @model_validator(mode="after")
    def _one_owner(self) -> RunConfig:
        if self.train.micro_batch > self.train.global_batch:
            raise ValueError(
                f"train.micro_batch {self.train.micro_batch} exceeds train.global_batch {self.train.global_batch}"
            )
        if self.augment.shift_px >= self.data.image_size:
            raise ValueError(
                f"augment.shift_px {self.augment.shift_px} must be less than data.image_size {self.data.image_size}"
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
        zero = self.deepspeed.get("zero_optimization", {})
        if not isinstance(zero, dict):
            raise ValueError(f"deepspeed.zero_optimization {zero!r} must be a mapping")
        if (stage := zero.get("stage", self.train.zero_stage)) != self.train.zero_stage:
            raise ValueError(
                f"deepspeed.zero_optimization.stage {stage} contradicts train.zero_stage "
                f"{self.train.zero_stage}; set the latter"
            )
        return self


# ------------------------------------------------------------------------------------------------------------- reading


MAX_CHARACTERS = 1 << 18
"""Longest configuration file that is read."""
COMMAND_LINE = ""
"""Where a key comes from that no file gives."""


class _Loader(yaml.SafeLoader):
    """Safe YAML without what a configuration does not need, and with one thing that it does.

    1e-3 is a number: YAML 1.1 wants 1.0e-3 and makes the other a string. A key given twice is an error: one of its
    values would be lost. So is an alias: with a few of them ten lines stand for billions of values.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()
            raise ConstructorError(problem=f"alias *{event.anchor}; write the value out", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        given: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in given:
                    raise ConstructorError(problem=f"key '{key.value}' is given twice", problem_mark=key.start_mark)
                given.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Puts in quotes what `_Loader` would take for a number."""


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
    )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, change it as overrides say, in their order, and check the result.

    Args:
        path: the YAML file.
        overrides: `dotted.key=value`, the value written as in YAML; or the name of an overlay, a YAML file with a part
            of a configuration, which is laid over what came before (`merged`).

    Raises:
        InputError: no such file, not YAML, an unknown key, a wrong type or value, or a contradiction.
    """
    values = read_yaml(path)
    origins: dict[str, str] = {}
    for override in overrides:
        if is_overlay(override):
            over = read_yaml(override)
            values = merged(values, over)
            changed = dict.fromkeys(_leaves(over), override)
        else:
            apply_override(values, override)
            changed = {override.partition("=")[0]: COMMAND_LINE}
        origins = {key: origin for key, origin in origins.items() if key not in changed} | changed
    return check_config(values, str(path), origins)


def is_overlay(override: str) -> bool:
    """Whether an override names a YAML file rather than a key and its value."""
    return "=" not in override and override.endswith((".yaml", ".yml"))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, loaded safely.

    Raises:
        InputError: no such file, not YAML, or not a mapping.
    """
    values = parse_yaml(_read_text(path), str(path))
    if not isinstance(values, dict):
        raise InputError(f"{path}: must hold a mapping of keys to values")
    return values


def key_lines(path: str | Path) -> dict[str, int]:
    """The line, from 1, in which each key and each item of a list begins in a YAML file, by dotted key.

    Raises:
        InputError: as `read_yaml`.
    """
    read_yaml(path)  # what can be composed below is no valid configuration yet
    root = yaml.compose(_read_text(path), _Loader)
    lines: dict[str, int] = {}
    below: list[tuple[str, yaml.Node | None]] = [("", root)]
    while below:
        prefix, node = below.pop()
        if isinstance(node, yaml.MappingNode):
            entries = [(str(key.value), key, value) for key, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            entries = [(str(number), item, item) for number, item in enumerate(node.value)]
        else:
            continue
        for name, start, value in entries:
            lines[f"{prefix}{name}"] = start.start_mark.line + 1
            below.append((f"{prefix}{name}.", value))
    return lines


def _read_text(path: str | Path) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name a YAML file such as launch/configs/demo.yaml") from error
    except ValueError as error:  # not UTF-8, or a NUL in the path
        raise InputError(f"{path}: not a YAML file: {error}") from error
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"{path}: longer than {MAX_CHARACTERS:,} characters; a configuration is a page or two")
    return text


def parse_yaml(text: str, where: str) -> Any:
    """What is written in YAML, loaded safely.

    Raises:
        InputError: not YAML, beginning with `where`.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{where}: not valid YAML{line}: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{where}: not valid YAML: {error}") from error
    except RecursionError:
        raise InputError(f"{where}: nested too deeply") from None


def apply_override(values: dict[str, Any], override: str, section: type[Section] = RunConfig) -> None:
    """Set one `dotted.key=value` in a nested mapping, in place; a mapping is merged into the one that is there.

    Args:
        section: what `values` are, for `merged`.

    Raises:
        InputError: no equals sign, a value that is not YAML, or a key below something that is not a mapping.
    """
    key, equals, text = override.partition("=")
    where = f"override '{_cut(override)}'"
    if not equals or not key:
        raise InputError(f"{where}: must be dotted.key=value, as train.epochs=3, or a YAML file")
    over = parse_yaml(text, where)
    *above, last = key.split(".")
    below: Any = values
    for name in above:
        below = below.get(name, {})
        if not isinstance(below, dict):
            raise InputError(f"{where}: '{name}' is {_shown(below)}, not a mapping")
    for name in reversed([*above, last]):
        over = {name: over}
    try:
        values.update(merged(values, over, section))
    except RecursionError:
        raise InputError(f"{where}: nested too deeply") from None


def merged(
    below: Mapping[str, Any], over: Mapping[str, Any], section: type[Section] | None = RunConfig
) -> dict[str, Any]:
    """One part of a configuration laid over another: mappings are merged key by key, all else is replaced.

    Where a tag (`kind`, `form`) chooses among sections and `over` gives another than the one below, its mapping
    replaces the one below whole: the keys of one kind mean nothing, or something else, in another.

    Args:
        section: what both are a part of; None where the configuration does not say what keys there are.
    """
    result = dict(below)
    for key, value in over.items():
        known = result.get(key)
        result[key] = value
        if not isinstance(value, dict) or not isinstance(known, dict):
            continue
        field = section.model_fields.get(key) if section else None
        choices = sections_in(field) if field else []
        if field and len(choices) > 1:
            name = tag_key(choices[0])
            tag = known.get(name, getattr(field.default, name))
            if value.get(name, tag) != tag:
                continue
            choices = [choice for choice in choices if section_tag(choice) == tag]
        result[key] = merged(known, value, choices[0] if choices else None)
    return result


def _leaves(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The dotted keys of a nested mapping's values that are not mappings."""
    leaves = []
    for name, value in values.items():
        key = f"{prefix}{name}"
        leaves += _leaves(value, f"{key}.") if isinstance(value, dict) else [key]
    return leaves


def check_config(values: Mapping[str, Any], source: str, origins: Mapping[str, str] | None = None) -> RunConfig:
    """Turn a nested mapping into a checked configuration: `check_section` for a whole run."""
    return check_section(RunConfig, values, source, origins)


def check_section(
    section: type[AnySection],
    values: Mapping[str, Any],
    source: str,
    origins: Mapping[str, str] | None = None,
    lines: Mapping[str, int] | None = None,
) -> AnySection:
    """Turn a nested mapping into a checked section.

    Args:
        section: what the file describes.
        values: as read from YAML.
        source: file name for messages.
        origins: {dotted key: the overlay's file name, or `COMMAND_LINE`} of what does not come from `source`, in the
            order in which it was applied; for messages.
        lines: {dotted key: its line in `source`} (`key_lines`), where messages are to name it.

    Raises:
        InputError: the first thing that is wrong, with its dotted key.
    """
    try:
        return section.model_validate(dict(values))
    except ValidationError as error:
        raise InputError(_first_error(section, error, source, origins or {}, lines or {})) from None
    except RecursionError:
        raise InputError(f"{source}: nested too deeply") from None


def _first_error(
    section: type[Section], error: ValidationError, source: str, origins: Mapping[str, str], lines: Mapping[str, int]
) -> str:
    """One line for pydantic's first error; unknown keys come first, because a misspelt key causes others."""
    details = sorted(error.errors(include_url=False), key=lambda detail: detail["type"] != "extra_forbidden")
    detail = details[0]
    holder, names = _locate(detail["loc"], section)
    kind = detail["type"]
    place = place_of(names, source, origins, lines, missing=kind == "missing")
    if kind == "extra_forbidden":
        return f"{place}: unknown key; {nearest(names[-1], holder.model_fields)}"
    if kind == "missing":
        return f"{place}: missing; {describe_field(holder, names[-1])}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        sections = sections_in(holder.model_fields[names[-1]])
        return f"{place}: {tag_key(sections[0])} must be one of {', '.join(map(section_tag, sections))}"
    if kind == "value_error":
        return f"{place}: {detail['msg'].removeprefix('Value error, ')}"
    # A field that may be one of several types has one message for each.
    wanted = dict.fromkeys(
        _wanted(other["type"], other["msg"]) for other in details if _locate(other["loc"], section)[1] == names
    )
    if names and (field := holder.model_fields.get(names[-1])) and _has_branches(field):
        wanted |= {f"a mapping with {tag_key(section)}: {section_tag(section)}": None for section in sections_in(field)}
    return f"{place}: must be {' or '.join(wanted)}, but it is {_shown(detail['input'])}"


def place_of(
    names: Sequence[str],
    source: str,
    origins: Mapping[str, str],
    lines: Mapping[str, int] | None = None,
    *,
    missing: bool = False,
) -> str:
    """Where what is wrong was written: the file and the line, or the command line, and the dotted key.

    Args:
        names: the key's parts.
        source, origins, lines: as for `check_section`.
        missing: nothing was written there, so the section that lacks it has to do.
    """
    key = ".".join(names)
    for dotted, origin in reversed(list(origins.items())):
        if key == dotted or key.startswith(f"{dotted}."):
            return f"override '{_cut(key)}'" if origin == COMMAND_LINE else f"{origin}: {_cut(key)}"
    # What is missing, or contradicts itself, may be so because of all the files that speak of its section.
    section = ".".join(names[:-1] if missing else names)
    within = f"{section}." if section else ""
    files = [origin for dotted, origin in origins.items() if origin != COMMAND_LINE and dotted.startswith(within)]
    known = [".".join(names[:count]) for count in range(len(names), 0, -1)]
    line = next((lines[part] for part in known if part in lines), None) if lines else None
    place = " with ".join(dict.fromkeys([f"{source} line {line}" if line else source, *files]))
    return f"{place}: {_cut(key)}" if key else place


def _wanted(kind: str, message: str) -> str:
    """What pydantic wanted, as it goes on behind "must be"."""
    if kind in ("model_type", "dict_type"):
        return "a mapping of keys to values"
    if kind == "invalid-json-value":
        return "made of numbers, strings, lists and mappings"
    return message.replace("Input should be ", "").replace("String should match pattern", "a string that matches")


def _shown(value: Any) -> str:
    try:
        return _cut(repr(value))
    except (ValueError, RecursionError):  # a number of thousands of digits, mappings nested as deep
        return f"a {type(value).__name__} too large to show"


def _cut(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:97]}..."


def _locate(location: tuple[int | str, ...], root: type[Section]) -> tuple[type[Section], list[str]]:
    """The section that owns a pydantic error location, and the location as the user writes it: without union tags."""
    holder = root
    choices = [root]
    names: list[str] = []
    at_branch = False
    for step in location:
        if at_branch:  # pydantic names the branch of a union here, the user does not
            choices = [section for section in choices if section_tag(section) == step]
            at_branch = False
        elif choices:
            holder = choices[0]
            names.append(str(step))
            field = holder.model_fields.get(str(step))
            choices = sections_in(field) if field else []
            at_branch = field is not None and _has_branches(field)
        elif isinstance(step, int):
            names.append(str(step))
    return holder, names


def _has_branches(field: FieldInfo) -> bool:
    """Whether a field holds one of several sections, or a section or something else."""
    return bool(sections_in(field)) and len(get_args(field.annotation)) > 1


def sections_in(annotation: Any) -> list[type[Section]]:
    """The sections that a field, or a type, can hold: one, several of which a tag chooses, or none."""
    annotation = getattr(annotation, "annotation", annotation)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for argument in get_args(annotation) for section in sections_in(argument)]


def tag_key(section: type[Section]) -> str:
    """The key whose value chooses this section among others."""
    return "form" if "form" in section.model_fields else "kind"


def section_tag(section: type[Section]) -> str:
    """The value of that key."""
    return str(get_args(section.model_fields[tag_key(section)].annotation)[0])


def first_problem(error: ValidationError) -> str:
    """The first thing that pydantic found wrong in a file of ours, with its place there."""
    detail = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, detail["loc"]))
    message = detail["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message


def describe_field(section: type[Section], name: str) -> str:
    """A field's docstring on one line."""
    return " ".join((section.model_fields[name].description or name).split())


# ------------------------------------------------------------------------------------------------------------- writing


def as_yaml(config: Section) -> str:
    """The resolved configuration, every default written out; `load_config` reads it back."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def flatten(config: Section) -> dict[str, Any]:
    """`{"train.epochs": 3, ...}`: one entry a leaf, lists whole."""

    def leaves(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for name, value in values.items():
            key = f"{prefix}{name}"
            flat.update(leaves(f"{key}.", value) if isinstance(value, dict) and value else {key: value})
        return flat

    return leaves("", config.model_dump(mode="json"))
