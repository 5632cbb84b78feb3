"""Under every ZeRO stage, on one rank and on two, with accumulation and without: the same weights as plain PyTorch.

The reference is one process without DeepSpeed: `torch.optim.SGD` and `torch.optim.AdamW`, the whole global batch in one
forward pass, losses that are means over it, and two backward passes whose gradients are blended by hand.

BatchNorm is frozen here (fixed statistics, trained scale and shift): with statistics of a micro-batch no two ways of
cutting a global batch agree, in any program.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdnet_dist.config import RunConfig
from mdnet_dist.data import Batch
from mdnet_dist.distributed import rank, world_size
from mdnet_dist.export import ModelCard
from mdnet_dist.model.mdnet import NO_LABEL
from mdnet_dist.plan import accumulation_steps, micro_batches
from mdnet_dist.run_data import open_data
from mdnet_dist.shards import SampleRecord
from mdnet_dist.trainer import StepReport, Trainer
from mdnet_dist.vocabulary import PAD, SPECIAL_WORDS
from tests.networks import freeze_batch_norm, one_thread, ragged_tokens  # noqa: F401 (one_thread is a fixture)
from tests.ranks import run_ranks
from tests.tiny import CLASSES, TOPICS, WORDS, tiny_config, tiny_set

GLOBAL_BATCH, STEPS = 7, 3  # seven does not divide by two ranks, nor by three micro-batches
BETA, ETA = 0.3, 5.0
SIDE_PX = 32
Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """One way of computing the same updates."""

    stage: int
    accumulation: int = 3
    clip_norm: float = 0.0
    from_shards: bool = False  # the batches of the tiny set through the reader, instead of `global_batches`

    def config(self, ranks: int, shards: Path, runs: Path) -> RunConfig:
        micro_batch = next(
            size
            for size in range(GLOBAL_BATCH, 0, -1)
            if accumulation_steps(GLOBAL_BATCH, size, ranks) == self.accumulation
        )
        constant = {"kind": "constant", "warmup": 0.0}
        # A large epsilon: with a small one Adam's first step has the size of the rate whatever the gradient, and would
        # turn the rounding of gradients that are nearly zero into differences of weights.
        adam = {"lr": 0.02, "eps": 1e-3, "weight_decay": 0.01, "schedule": constant}
        overrides = {
            "data.reports_per_image": 2,
            "model.language.dropout": 0.0,
            "blend": {"beta": {"kind": "constant", "value": BETA}, "eta": ETA},
            "optimizer.image": {"lr": 0.05, "weight_decay": 5e-3, "schedule": constant},
            "optimizer.head": adam,
            "optimizer.language": adam,
            "train.global_batch": GLOBAL_BATCH,
            "train.micro_batch": micro_batch,
            "train.zero_stage": self.stage,
            "train.clip_norm": self.clip_norm,
            # ZeRO 3 would keep weights as small as these whole on every rank.
            "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
        }
        return tiny_config(shards, runs, overrides)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set") / "shards"
    tiny_set(folder, train=GLOBAL_BATCH * STEPS + 2, val=1, test=1, side_px=SIDE_PX)
    return folder


def global_batches() -> list[Batch]:
    """Three global batches: ragged, and with what a rank may find in its share of them.

    With two ranks the first three images are the first rank's. In the first batch these have no label and in the second
    no report; in the third the last two images, which are a micro-batch with accumulation, have neither.
    """
    batches = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        words = len(WORDS) + len(SPECIAL_WORDS)
        tokens, lengths = ragged_tokens(step, GLOBAL_BATCH, 2, len(TOPICS), longest=6, words=words)
        labels = torch.randint(0, len(CLASSES), (GLOBAL_BATCH,), generator=generator)
        images = torch.randint(0, 256, (GLOBAL_BATCH, 3, SIDE_PX, SIDE_PX), generator=generator)
        none, first_three, last_two = slice(0, 0), slice(0, 3), slice(5, 7)
        unlabelled, silent = [(first_three, none), (none, first_three), (last_two, last_two)][step]
        labels[unlabelled] = NO_LABEL
        labels[4] = NO_LABEL
        tokens[silent], lengths[silent] = PAD, 0
        batches.append(
            Batch(
                keys=[f"{step}-{number}" for number in range(GLOBAL_BATCH)],
                records=[SampleRecord(patient="p", label=None, reports=[])] * GLOBAL_BATCH,
                images=images.to(torch.uint8),
                labels=labels,
                tokens=tokens,
                lengths=lengths,
                masks=[None] * GLOBAL_BATCH,
            )
        )
    return batches


def cut(batch: Batch, piece: slice) -> Batch:
    """A micro-batch as the loader would make it: no longer and with no more reports than its own samples need."""
    lengths = batch.lengths[piece]
    reports = 1 + max([0, *lengths.sum((0, 2)).nonzero().flatten().tolist()])
    longest = max(1, int(lengths.max()))
    return replace(
        batch,
        keys=batch.keys[piece],
        records=batch.records[piece],
        images=batch.images[piece],
        labels=batch.labels[piece],
        tokens=batch.tokens[piece, :reports, :, :longest],
        lengths=lengths[:, :reports],
        masks=batch.masks[piece],
    )


def share_of(batches: Iterable[Batch], config: RunConfig) -> Iterator[Batch]:
    """This rank's micro-batches of some global batches."""
    pieces = micro_batches(config.train.global_batch, config.train.micro_batch, world_size(), rank())
    return (cut(batch, piece) for batch in batches for piece in pieces)


# -------------------------------------------------------------------------------------------------------- plain PyTorch


@dataclass(frozen=True)
class PlainStep:
    """What the reference has after a step."""

    weights: dict[str, Tensor]
    loss_m: float
    loss_l: float
    norm_m: float  # of dL_M with respect to the map
    norm_l: float
    gradient_norm: float  # of the whole blended gradient, before clipping


def plain_pytorch(card: ModelCard, config: RunConfig, batches: Sequence[Batch]) -> list[PlainStep]:
    """The same training by ordinary means; first what it starts from, then what each step gives."""
    torch.manual_seed(config.train.seed)
    network = card.build()
    freeze_batch_norm(network)
    d, m, l = (list(part.parameters()) for part in network.parts().values())  # noqa: E741 (the paper's name)
    sgd, adam = config.optimizer.image, config.optimizer.head
    optimizers = [
        torch.optim.SGD(d, lr=sgd.lr, momentum=sgd.momentum, nesterov=True, weight_decay=sgd.weight_decay),
        torch.optim.AdamW([*m, *l], lr=adam.lr, betas=(0.9, 0.999), eps=adam.eps, weight_decay=adam.weight_decay),
    ]
    nan = math.nan
    steps = [PlainStep(whole_state(network), nan, nan, nan, nan, nan)]
    for batch in batches:
        features = network.image_model(card.normalise(batch.images))
        logits, sharpening_map = network.class_maps(features)
        loss_m = F.cross_entropy(logits, batch.labels, ignore_index=NO_LABEL)  # mean over those with a label
        told = network.language_model(features, sharpening_map, batch.tokens, batch.lengths)
        words = told.targets != PAD
        loss_l = F.cross_entropy(told.logits[words], told.targets[words])  # mean over the words
        map_m, *gradients_m = torch.autograd.grad(loss_m, [features, *d, *m], retain_graph=True)
        map_l, *gradients_l = torch.autograd.grad(loss_l, [features, *d, *l])
        for weight, of_m, of_l in zip(d, gradients_m, gradients_l):
            weight.grad = (1 - BETA) * of_m + BETA * ETA * of_l
        for weight, gradient in zip([*m, *l], [*gradients_m[len(d) :], *gradients_l[len(d) :]], strict=True):
            weight.grad = gradient
        norm = nn.utils.clip_grad_norm_([*d, *m, *l], config.train.clip_norm or math.inf)
        for optimizer in optimizers:
            optimizer.step()
        steps.append(
            PlainStep(
                whole_state(network),
                loss_m.item(),
                loss_l.item(),
                map_m.norm().item(),
                map_l.norm().item(),
                norm.item(),
            )
        )
    return steps


def whole_state(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def assert_same_weights(ours: Weights, reference: dict[str, Tensor], before: dict[str, Tensor], what: str) -> None:
    """Equal to 1e-5 of how far each has moved, which is much finer than 1e-5 of the weight itself."""
    assert ours.keys() == reference.keys()
    for name, expected in reference.items():
        moved = (expected.double() - before[name].double()).norm()
        rounding = 1e-7 * expected.double().norm()  # of a weight in fp32
        difference = (torch.from_numpy(ours[name]).double() - expected.double()).norm()
        assert difference <= 1e-5 * moved + rounding, f"{what}: {name} is {difference:.1e} off after moving {moved:.1e}"


# ------------------------------------------------------------------------------------------------------- on the ranks


def new_trainer(config: RunConfig, *, resume: bool = False) -> Trainer:
    trainer = Trainer(config, resume=resume)
    trainer._stop = None
    freeze_batch_norm(trainer.network)
    return trainer


def finish(trainer: Trainer) -> None:
    """Make room for the next one; `Trainer.close` would also leave the group of ranks."""
    trainer.engine._engine.destroy()


def as_numpy(tensors: dict[str, Tensor]) -> Weights:
    return {name: value.numpy() for name, value in tensors.items()}


def batches_of(trainer: Trainer, case: Case, first: int = 0, last: int = STEPS) -> Iterator[Batch]:
    """This rank's micro-batches of the steps from `first` up to `last`."""
    if case.from_shards:
        return iter(trainer.data.training_batches(trainer.config, first, last, pin_memory=False))
    return share_of(global_batches()[first:last], trainer.config)


def train(cases: list[Case], shards: Path, runs: Path) -> list[list[tuple[Weights, StepReport | None]]]:
    """For each case the weights at the start and after each step, with what the step reported."""
    results = []
    for case in cases:
        trainer = new_trainer(case.config(world_size(), shards, runs))
        batches = batches_of(trainer, case)
        steps: list[tuple[Weights, StepReport | None]] = [(as_numpy(trainer.engine.weights()), None)]
        for _ in range(STEPS):
            report = trainer.train_step(batches)
            steps.append((as_numpy(trainer.engine.weights()), report))
        assert next(batches, None) is None
        results.append(steps)
        finish(trainer)
    return results


def assert_equal_to_plain_pytorch(cases: list[Case], ranks: int, shards: Path, runs: Path) -> None:
    by_rank = run_ranks(train, ranks, cases, shards, runs)
    for number, case in enumerate(cases):
        config = case.config(ranks, shards, runs)
        data = open_data(config)
        batches = global_batches()
        if case.from_shards:
            whole = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": GLOBAL_BATCH})})
            batches = list(data.training_batches(whole, 0, STEPS, pin_memory=False))
        reference = plain_pytorch(data.card, config, batches)
        if case.clip_norm:
            assert all(step.gradient_norm > 1.5 * case.clip_norm for step in reference[1:]), "clips nothing"
        for which in range(ranks):
            for index, ((weights, report), expected) in enumerate(zip(by_rank[which][number], reference, strict=True)):
                what = f"{case}, rank {which}, step {index}"
                assert_same_weights(weights, expected.weights, reference[max(0, index - 1)].weights, what)
                assert all(np.array_equal(weights[name], by_rank[0][number][index][0][name]) for name in weights), what
                if report:
                    assert report.finite and report.moved and not report.stop
                    assert report.loss_m == pytest.approx(expected.loss_m, rel=1e-5), what
                    assert report.loss_l == pytest.approx(expected.loss_l, rel=1e-5), what
                    assert report.gradient_norm_m == pytest.approx(expected.norm_m, rel=1e-4), what
                    assert report.gradient_norm_l == pytest.approx(expected.norm_l, rel=1e-4), what


def test_two_ranks_under_zero_2_equal_plain_pytorch(shards: Path, tmp_path: Path) -> None:
    """The quick one of the cases below."""
    assert_equal_to_plain_pytorch([Case(stage=2)], 2, shards, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_stage_and_accumulation_equals_plain_pytorch(ranks: int, shards: Path, tmp_path: Path) -> None:
    cases = [Case(stage, accumulation) for stage, accumulation in product(range(4), [1, 3])]
    cases += [Case(stage, clip_norm=0.2) for stage in range(4)]
    cases += [Case(stage, from_shards=True) for stage in (0, 3)]
    assert_equal_to_plain_pytorch(cases, ranks, shards, tmp_path)


# ------------------------------------------------------------------------------------------------- save and continue


def train_and_save(cases: list[Case], shards: Path, runs: Path) -> list[tuple[Weights, Weights, Weights]]:
    """Two steps, a checkpoint, one more step: weights and optimiser state at the checkpoint, weights at the end."""
    results = []
    for case in cases:
        trainer = new_trainer(case.config(world_size(), shards, runs_of(runs, case, world_size())))
        batches = batches_of(trainer, case)
        for _ in range(2):
            trainer.train_step(batches)
        trainer.save(None)
        saved = as_numpy(trainer.engine.weights()), as_numpy(trainer.engine.optimizer_state())
        trainer.train_step(batches)
        results.append((*saved, as_numpy(trainer.engine.weights())))
        finish(trainer)
    return results


def continue_from(origins: list[tuple[Case, int]], cases: list[Case], shards: Path, runs: Path) -> list[tuple]:
    """Each checkpoint continued under each case: what was loaded, and the weights after one more step."""
    results = []
    for (origin, ranks), case in product(origins, cases):
        trainer = new_trainer(case.config(world_size(), shards, runs_of(runs, origin, ranks)), resume=True)
        assert (trainer.step, trainer.updates) == (2, 2)
        loaded = as_numpy(trainer.engine.weights()), as_numpy(trainer.engine.optimizer_state())
        report = trainer.train_step(batches_of(trainer, case, first=2))
        assert report.moved
        results.append((*loaded, as_numpy(trainer.engine.weights())))
        finish(trainer)
    return results


def runs_of(runs: Path, case: Case, ranks: int) -> Path:
    return runs / f"stage{case.stage}-ranks{ranks}"


@pytest.mark.slow
def test_a_checkpoint_continues_under_any_stage_and_number_of_ranks(shards: Path, tmp_path: Path) -> None:
    uninterrupted: dict[tuple[Case, int], tuple[Weights, Weights, Weights]] = {}
    for ranks, origins in ((1, [Case(0)]), (2, [Case(1), Case(2), Case(3)])):
        by_rank = run_ranks(train_and_save, ranks, origins, shards, tmp_path)
        uninterrupted |= {(origin, ranks): result for origin, result in zip(origins, by_rank[0], strict=True)}
    for ranks, stages in ((1, [Case(0), Case(3)]), (2, [Case(stage) for stage in range(4)])):
        for continued in run_ranks(continue_from, ranks, list(uninterrupted), stages, shards, tmp_path):
            pairs = product(uninterrupted.items(), stages)
            for ((origin, (weights, state, final)), case), (loaded, loaded_state, continued_final) in zip(
                pairs, continued, strict=True
            ):
                what = f"from {origin} to {case} on {ranks} ranks"
                assert loaded.keys() == weights.keys() and loaded_state.keys() == state.keys(), what
                assert all(np.array_equal(loaded[name], weights[name]) for name in weights), what
                assert all(np.array_equal(loaded_state[key], state[key]) for key in state), what
                assert any(key.startswith("momentum_buffer/image_model") for key in state)
                assert any(key.startswith("exp_avg_sq/language_model") for key in state)
                assert_same_weights(continued_final, as_tensors(final), as_tensors(weights), what)


def as_tensors(weights: Weights) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in weights.items()}


# ------------------------------------------------------------------------------------------------------- not a number


def spoil(trainer: Trainer, what: str) -> Callable[[], None]:
    """Make this rank's loss, or only its gradient, not a number; returns what ends that."""
    if what == "loss":
        whole = trainer._images
        trainer._images = lambda batch: whole(batch) * math.nan
        return lambda: setattr(trainer, "_images", whole)

    def spoil_gradient(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(lambda gradient: gradient * math.nan)

    return trainer.network.image_model.stem.register_forward_hook(spoil_gradient).remove


def train_with_one_bad_step(stages: list[int], what: str, shards: Path, runs: Path) -> list[list[tuple]]:
    """Three steps, of which the second is spoilt on the last rank alone: weights and report of each."""
    results = []
    for case in map(Case, stages):
        trainer = new_trainer(case.config(world_size(), shards, runs))
        batches = batches_of(trainer, case)
        steps: list[tuple] = [(as_numpy(trainer.engine.weights()), None, trainer.updates, trainer.bad_steps)]
        for step in range(STEPS):
            restore = spoil(trainer, what) if step == 1 and rank() == world_size() - 1 else None
            report = trainer.train_step(batches)
            if restore:
                restore()
            steps.append((as_numpy(trainer.engine.weights()), report, trainer.updates, trainer.bad_steps))
        results.append(steps)
        finish(trainer)
    return results


@pytest.mark.slow
@pytest.mark.parametrize(("what", "ranks"), [("loss", 2), ("gradient", 2), ("gradient", 1)])
def test_where_one_rank_is_not_finite_no_rank_moves_and_training_goes_on(
    what: str, ranks: int, shards: Path, tmp_path: Path
) -> None:
    stages = [0, 1, 2, 3]
    by_rank = run_ranks(train_with_one_bad_step, ranks, stages, what, shards, tmp_path)
    first, _, third = global_batches()
    config = Case(0).config(ranks, shards, tmp_path)
    reference = plain_pytorch(open_data(config).card, config, [first, third])
    for which, (number, stage) in product(range(ranks), enumerate(stages)):
        place = f"{what} at stage {stage}, rank {which}"
        (_, *_), (after_first, good, *_), (after_bad, bad, updates, bad_steps), (at_end, last, *end) = by_rank[which][
            number
        ]
        assert good.moved and (updates, bad_steps) == (1, 1), place
        assert not bad.moved and bad.finite == (what == "gradient"), place
        assert all(np.array_equal(after_bad[name], after_first[name]) for name in after_first), place
        assert last.moved and last.finite and end == [2, 0], place
        assert_same_weights(at_end, reference[2].weights, reference[1].weights, place)
