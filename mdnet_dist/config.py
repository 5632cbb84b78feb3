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
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, JsonValue, Tag, model_validator

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
    decoded_cache_mib: Count = 256
    """MiB of training images that each loader process keeps in memory as squares, which are then decoded and fitted
    once and not in each epoch: the first that it meets, until that is full. 128 px take 64 KiB, 224 px 196 KiB."""
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
