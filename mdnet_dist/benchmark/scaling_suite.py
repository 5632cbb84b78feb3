"""One rank against two, with one thread each on CPUs and a GPU each where there are two.

Four things run in turn, in processes that wait meanwhile: one rank with the other core idle; two jobs of one rank at
the same time, which exchange nothing; two ranks of one job with as many images each (weak scaling); and with as many
together (strong scaling). Two busy cores share clock and memory, and that costs without any exchange: the second says
how much. Where other programs run, processor time says what would be without them. Batches lie in memory, because a
loader would want a core too. A rank's interval begins behind a barrier and ends with its last step; the job's from the
first rank's begin to the last one's end.

The same numbers check `cluster_plan`: from steps of one rank, and exchanges of the gradient's size alone, it has to
foretell the steps of two.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mdnet_dist.benchmark.cluster_plan import BYTES_A_WEIGHT, HALVES, Links, Work, batch_norms_of, step_of
from mdnet_dist.benchmark.ranks import Group, Steps, interval, started, together
from mdnet_dist.benchmark.rows import Row
from mdnet_dist.benchmark.subject import Subject
from mdnet_dist.benchmark.timing import Spread

EFFICIENCY = 0.9
PLAN_ERROR = 0.15
QUIET = 0.05
"""Share of its time that a rank may lose to other programs."""
FEWEST_ROUNDS = 4
LARGE_PX = 200
"""Side of images of which a step on one core takes too long for a benchmark."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """Seconds a step, of neighbours in time."""

    alone: float
    busy: float  # alone, while another job does the same on the other device
    weak: float  # a micro-batch on each of two ranks
    half: float  # alone, of half a micro-batch
    strong: float  # one micro-batch over two ranks
    exchanging: float  # share of a weak step, mean of the ranks, waiting included
    alone_processor: float  # seconds of processor time, whatever other programs did
    weak_processor: float  # of the rank that took more
    held_up: float = 0.0  # largest share of a rank's time that other programs took


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What two ranks were found to do."""

    images: int  # of a micro-batch
    rounds: list[Round]
    exchange_gradients: list[float]  # seconds, by itself, of ranks that come at the same time
    exchange_small: list[float]
    exchanges: int  # a step
    exchanged_bytes: int  # a step and rank
    weights: int

    def all(self, name: str) -> list[float]:
        """A field of all rounds."""
        return [getattr(one, name) for one in self.rounds]

    def median(self, name: str) -> float:
        """Its median."""
        return statistics.median(self.all(name))


def measure(subject: Subject) -> list[Row]:
    """The rows of a configuration; none where there are no two devices, or where a step takes too long on a core."""
    on_gpu = subject.device.type == "cuda"
    if (on_gpu and torch.cuda.device_count() < 2) or (not on_gpu and subject.config.data.image_size >= LARGE_PX):
        return []
    subject = subject.changed(
        data={"workers": 0},
        train={"epochs": 1000, "zero_stage": 0},  # so that no measured step is behind the end of training
    )
    with started(subject.config, [2, 1, 1]) as (pair, alone, other):
        found = measured(pair, alone, other, subject.batch, seconds=20.0 if subject.short else 90.0, on_gpu=on_gpu)
    batch_norms = batch_norms_of(subject.data.card.build()) if on_gpu else 0
    return rows_of(found, subject.name, batch_norms)


def measured(
    pair: Group, alone: Group, other: Group, images: int, *, seconds: float, steps: int = 2, on_gpu: bool = False
) -> Measured:
    """Measure in turn for some seconds, the first round left out."""

    def one_round() -> tuple[Round, list[Steps]]:
        one = alone.steps(images, steps)
        both = together([alone, other], images, steps)
        weak = pair.steps(2 * images, steps)
        half = alone.steps(images // 2, steps)
        strong = pair.steps(images, steps)
        waited = pair.steps(2 * images, steps, True) if on_gpu else weak
        found = Round(
            alone=interval(one) / steps,
            busy=statistics.fmean(job.seconds for job in both) / steps,
            weak=interval(weak) / steps,
            half=interval(half) / steps,
            strong=interval(strong) / steps,
            exchanging=statistics.fmean(rank.exchanging / rank.seconds for rank in waited),
            alone_processor=one[0].processor / steps,
            weak_processor=max(rank.processor for rank in weak) / steps,
            held_up=0.0 if on_gpu else max(rank.held_up for ranks in (one, both, weak, half, strong) for rank in ranks),
        )
        return found, waited

    one_round()
    rounds: list[Round] = []
    begun = time.monotonic()
    while len(rounds) < FEWEST_ROUNDS or time.monotonic() - begun < seconds:
        found, last = one_round()
        rounds.append(found)
    pair.ask("weights")
    weights = pair.answers()[0]
    exchange = {}
    for numbers in (1, weights):
        pair.ask("exchange", numbers, 40)
        # The last rank to come starts the exchange: the shorter time is that of the exchange, without waiting.
        exchange[numbers] = [min(both) for both in zip(*pair.answers())][5:]
    return Measured(
        images=images,
        rounds=undisturbed(rounds),
        exchange_gradients=exchange[weights],
        exchange_small=exchange[1],
        exchanges=sum(last[0].exchanges.values()),
        exchanged_bytes=sum(last[0].exchanged_bytes.values()),
        weights=weights,
    )


def undisturbed(rounds: Sequence[Round]) -> list[Round]:
    """The rounds in which other programs left the ranks their cores; where those are too few, the least disturbed."""
    ordered = sorted(rounds, key=lambda one: one.held_up)
    quiet = [one for one in ordered if one.held_up <= QUIET]
    return quiet if len(quiet) >= FEWEST_ROUNDS else ordered[:FEWEST_ROUNDS]


def rows_of(found: Measured, config: str, batch_norms: int) -> list[Row]:
    """What was measured, as ratios. Args: batch_norms: that exchange their statistics (on GPUs)."""

    def row(name: str, values: list[float], unit: str = "", note: str = "", target: float | None = None) -> Row:
        return Row.of(Spread.of(values), suite="scaling", config=config, name=name, unit=unit, note=note, target=target)

    def ratios(above: list[float], below: list[float]) -> list[float]:
        return [a / b for a, b in zip(above, below)]

    gradients, small = statistics.median(found.exchange_gradients), statistics.median(found.exchange_small)
    exchanging = gradients + (found.exchanges - 1) * small
    alone, busy, weak = found.all("alone"), found.all("busy"), found.all("weak")
    held_up = found.all("held_up")
    disturbed = "" if max(held_up) <= QUIET else "OTHER PROGRAMS RAN: measure again on an idle machine"
    added = [seconds + exchanging for seconds in found.all("weak_processor")]
    rows = [
        row(
            "weak scaling, 2 ranks: images/s by 2 x one rank's", ratios(alone, weak), target=EFFICIENCY, note=disturbed
        ),
        row("  the same of two jobs that exchange nothing", ratios(alone, busy), note="clock and memory"),
        row("  2 ranks by two jobs that exchange nothing", ratios(busy, weak), note="exchange and waiting"),
        row(
            "  by processor time, exchange added",
            ratios(found.all("alone_processor"), added),
            note="what remains where other programs take part of the cores; of CPUs alone",
        ),
        row(
            "share of a step in exchanges",
            found.all("exchanging"),
            note=f"{found.exchanges} a step, {found.exchanged_bytes / 1e6:.2f} MB a rank; with waiting for the other",
        ),
        row("  of them without waiting", [exchanging / seconds for seconds in weak], note="timed by themselves"),
        row("strong scaling, 2 ranks: times one rank's images/s", ratios(alone, found.all("strong")), unit="x"),
        row("  one rank's step by one of half the batch", ratios(alone, found.all("half")), unit="x", note="its limit"),
        row("share of the cores that other programs took", held_up, note="largest of a round's ranks"),
    ]
    for name, images, one, two in (
        ("2 ranks from one rank", 2 * found.images, found.median("alone"), found.median("weak")),
        ("2 ranks from two that exchange nothing", 2 * found.images, found.median("busy"), found.median("weak")),
        ("2 ranks with half the batch each", found.images, found.median("busy"), found.median("strong")),
    ):
        predicted = foretold(found, one, images, batch_norms)
        rows.append(
            Row(
                suite="scaling",
                config=config,
                name=f"plan's error, {name}",
                value=abs(predicted / two - 1),
                unit="",
                count=len(found.rounds),
                target=PLAN_ERROR,
                better="less",
                note=f"predicted / measured {predicted / two:.2f}",
            )
        )
    return rows


def foretold(found: Measured, micro_batch_seconds: float, global_batch: int, batch_norms: int) -> float:
    """Seconds a step of two ranks, by `cluster_plan`.

    Args:
        micro_batch_seconds: of a micro-batch on one rank, whatever the other does meanwhile.
    """
    alone, half = found.median("alone"), found.median("half")
    slower = micro_batch_seconds / alone
    an_image = slower * (alone - half) / (found.images - found.images // 2)
    small = statistics.median(found.exchange_small)
    once = max(statistics.median(found.exchange_gradients) - small, 1e-9)
    work = Work(
        seconds_an_image=an_image,
        start_seconds=micro_batch_seconds - found.images * an_image,
        weights=found.weights,
        batch_norms=batch_norms,
    )
    nbytes = found.weights * BYTES_A_WEIGHT
    links = Links(inside_bytes_per_second=HALVES[0] * nbytes / 2 / once, inside_latency=small)
    return step_of(work, global_batch, found.images, 2, 2, links).seconds
