"""What the step suite compares with and divides by: the straightforward program, the roofline, the limits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mdnet_dist.benchmark.limits import ConvolutionShape, Limits, measure_limits
from mdnet_dist.benchmark.roofline import Layer, Watched
from mdnet_dist.benchmark.rows import Row, number, table
from mdnet_dist.benchmark.straightforward import Straightforward
from mdnet_dist.benchmark.timing import Spread, Times, in_turn
from mdnet_dist.config import OptimizerConfig, SgdAdamConfig
from mdnet_dist.data import Batch
from mdnet_dist.model.mdnet import NO_LABEL
from tests.networks import one_thread, random_inputs, tiny_network  # noqa: F401 (one_thread is a fixture)

CPU = torch.device("cpu")


def batch_of(seed: int, reports: int) -> tuple[torch.Tensor, Batch]:
    inputs = random_inputs(seed, reports=reports)
    batch = Batch(
        keys=[],
        records=[],
        images=torch.empty(0),
        labels=inputs.labels,
        tokens=inputs.tokens,
        lengths=inputs.lengths,
        masks=[],
    )
    return inputs.images, batch


@pytest.mark.parametrize(("beta", "eta"), [(0.5, 1.0), (0.2, 3.0)])
@pytest.mark.parametrize("reports", [1, 3])
@pytest.mark.parametrize("sharpening", ["cam", "none"])
def test_the_straightforward_program_computes_the_same_gradients(
    beta: float, eta: float, reports: int, sharpening: str
) -> None:
    """Twice as many backward passes, copies for every sentence, a loop over words: another way to the same numbers."""
    ours, theirs = tiny_network(sharpening=sharpening), tiny_network(sharpening=sharpening)
    images, batch = batch_of(3, reports)
    ours.blend.set(beta, eta)
    losses = ours(images.contiguous(memory_format=torch.channels_last), batch.labels, batch.tokens, batch.lengths)
    (losses.m / int((batch.labels != NO_LABEL).sum()) + losses.l / int(batch.lengths.sum())).backward()
    config: OptimizerConfig = SgdAdamConfig()
    Straightforward(theirs, config, beta=beta, eta=eta).backward(images, batch)
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None, name
        scale = float(other.grad.abs().max()) + 1e-6
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=2e-5 * scale, msg=name)


def test_it_moves_every_weight() -> None:
    network = tiny_network()
    before = [weight.detach().clone() for weight in network.parameters()]
    program = Straightforward(network, SgdAdamConfig(), clip_norm=1.0)
    program.schedule(0.5)
    images, batch = batch_of(0, 2)
    program.step(images, batch)
    assert not any(torch.equal(old, new) for old, new in zip(before, network.parameters(), strict=True))


def test_flops_and_bytes_of_layers_worked_out_by_hand() -> None:
    """8 images of 16 x 10 x 10 through a 3x3 convolution to 32 channels, ReLU and a linear layer."""
    network = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(3200, 4))
    images = torch.randn(8, 16, 10, 10, requires_grad=True)
    with Watched() as watched:
        network(images).sum().backward()
    found = {layer.name: layer for layer in watched.layers}
    forward = 2 * 8 * 100 * 32 * 16 * 9
    assert found["convolution"].flops == forward
    assert found["convolution"].bytes == 4 * (8 * 16 * 100 + 32 * 16 * 9 + 8 * 32 * 100)
    assert found["convolution_backward"].flops == 2 * forward
    assert found["relu"].flops == 0 and found["relu"].bytes == 4 * 2 * 8 * 32 * 100
    assert found["addmm"].flops == 2 * 8 * 3200 * 4
    assert watched.flops == 3 * forward + 3 * 2 * 8 * 3200 * 4
    [shape] = watched.convolutions
    assert shape == ConvolutionShape((8, 16, 10, 10), (32, 16, 3, 3), (1, 1), (1, 1)) and shape.flops == forward


def test_the_lstm_is_counted() -> None:
    lstm = nn.LSTM(5, 7, batch_first=True)
    with Watched() as watched:
        lstm(torch.randn(3, 4, 5))[0].sum().backward()
    assert watched.flops == 3 * 2 * (3 * 4) * (5 * 28 + 7 * 28)


def test_a_step_of_the_network_is_counted_whole() -> None:
    """Three times the forward arithmetic of D, but for the gradient of the images, and something for L besides."""
    network = tiny_network()
    images, batch = batch_of(1, 2)
    with torch.no_grad(), Watched() as forward:
        network.image_model(images)
    with Watched() as step:
        losses = network(images, batch.labels, batch.tokens, batch.lengths)
        (losses.m + losses.l).backward()
    convolutions = sum(layer.flops for layer in step.layers if layer.name.startswith("convolution"))
    assert convolutions == 3 * forward.flops - forward.layers[0].flops
    assert step.flops > convolutions


def limits(flops: float, copy: float) -> Limits:
    rates = {torch.float32: Spread.of([flops]), torch.bfloat16: Spread.of([2 * flops])}
    return Limits(
        matrix_flops=rates, convolution_flops=rates, copy_bytes=Spread.of([copy]), near_copy_bytes=Spread.of([copy])
    )


def test_the_roofline_is_the_larger_of_arithmetic_and_traffic_layer_by_layer() -> None:
    watched = Watched()
    watched.layers = [
        Layer("a", torch.float32, 100, 1),
        Layer("b", torch.bfloat16, 100, 1),
        Layer("c", torch.float32, 1, 60),
    ]
    assert watched.seconds(limits(100.0, 20.0)) == pytest.approx(1.0 + 0.5 + 3.0)


def test_limits_are_measured() -> None:
    found = measure_limits(CPU, [ConvolutionShape((2, 8, 16, 16), (8, 8, 3, 3), (1, 1), (1, 1))], 1 << 16, rounds=2)
    assert found.peak(torch.float32) > 1e9 and found.copy_bytes.median > 1e8
    assert found.peak(torch.float32) >= found.convolution_flops[torch.float32].median


def test_things_run_in_turn_and_the_warm_up_is_not_counted() -> None:
    calls: list[str] = []
    times = in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, CPU, warm_up=2, rounds=3)
    assert "".join(calls) == "ab" * 5
    assert len(times.seconds["a"]) == len(times.seconds["b"]) == 3


def test_a_ratio_is_of_neighbours() -> None:
    """One slow minute for both changes neither ratio."""
    times = Times(seconds={"slow": [4.0, 40.0, 4.4], "fast": [2.0, 20.0, 2.0]})
    assert times.ratio("slow", "fast").median == pytest.approx(2.0)


def test_quartiles_and_rates() -> None:
    spread = Spread.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (spread.low, spread.median, spread.high, spread.count) == (2.0, 3.0, 4.0, 5)
    rate = 12 / spread
    assert (rate.low, rate.median, rate.high) == (3.0, 4.0, 6.0)
    assert Spread.of([7.0]).median == 7.0


def test_rows_say_whether_targets_are_met() -> None:
    rows = [
        Row(suite="step", config="demo", name="speed", value=4.5, unit="x", target=4.0),
        Row(suite="step", config="demo", name="share", value=0.5, unit="", target=0.1, better="less"),
        Row.of(Spread.of([1.0, 2.0, 3.0]), suite="data", config="demo", name="rate", unit="images/s"),
    ]
    assert [row.met for row in rows] == [True, False, None]
    lines = table(rows).splitlines()
    assert lines[0] == "step  demo" and "at least 4: met" in lines[1] and "at most 0.1: MISSED" in lines[2]
    assert "2 images/s" in lines[-1] and "(1.5 to 2.5)" in lines[-1]
    assert rows[1].as_json()["met"] is False


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1234567.0, "1.23e+06"), (12345.6, "12346"), (0.01234, "0.0123"), (2e-5, "2.00e-05")],
)
def test_numbers_are_written_as_people_write_them(value: float, text: str) -> None:
    assert number(value) == text
