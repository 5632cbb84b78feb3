"""Eq. 12 in one backward pass equals two separate backward passes blended by hand."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mdnet_dist.config import AdamGroup, ScheduleConfig, SgdAdamConfig, SgdGroup
from mdnet_dist.model.blend import GradientBlend
from mdnet_dist.model.mdnet import NO_LABEL, MDNet
from mdnet_dist.optimizer import PartOptimizer
from mdnet_dist.vocabulary import PAD
from tests.networks import (
    Inputs,
    gradient_of,
    language_model_of,
    one_thread,  # noqa: F401 (a fixture)
    ragged_tokens,
    random_inputs,
    relative_difference,
    tiny_network,
)

CASES = [*product([0.0, 0.3, 1.0], [1.0, 5.0])]


def to(dtype: torch.dtype, network: MDNet, inputs: Inputs) -> tuple[MDNet, Inputs]:
    return network.to(dtype), inputs._replace(images=inputs.images.to(dtype))


def counts(inputs: Inputs) -> tuple[int, int]:
    """Labelled images and real tokens, by which the sums become means."""
    return int((inputs.labels != NO_LABEL).sum()), int(inputs.lengths.sum())


def blended(network: MDNet, inputs: Inputs, beta: float, eta: float) -> dict[str, Tensor]:
    """Gradients by name after one pass through the network as training uses it."""
    network.zero_grad()
    network.blend.set(beta, eta)
    labelled, tokens = counts(inputs)
    losses = network(*inputs)
    (losses.m / labelled + losses.l / tokens).backward()
    return {name: gradient_of(weight).clone() for name, weight in network.named_parameters()}


def separate(network: MDNet, inputs: Inputs) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """dL_M and dL_L by name, each by a backward pass of its own and without the blend, and their norms at the map."""
    labelled, tokens = counts(inputs)
    names, weights = zip(*network.named_parameters(), strict=True)
    gradients, squared_norms = [], []
    for which in ("m", "l"):
        features = network.image_model(inputs.images)
        logits, sharpening_map = network.class_maps(features)
        if which == "m":
            loss = F.cross_entropy(logits.float(), inputs.labels, ignore_index=NO_LABEL, reduction="sum") / labelled
        else:
            told = language_model_of(network)(
                features, sharpening_map if network.sharpen else None, inputs.tokens, inputs.lengths
            )
            loss = language_model_of(network).word_losses(told).sum() / tokens
        at_map, *found = torch.autograd.grad(loss, [features, *weights], allow_unused=True)
        gradients.append({name: value for name, value in zip(names, found) if value is not None})
        squared_norms.append(float(at_map.square().sum()))
    return gradients[0], gradients[1], squared_norms


def by_hand(network: MDNet, inputs: Inputs, beta: float, eta: float) -> dict[str, Tensor]:
    gradients_m, gradients_l, _ = separate(network, inputs)
    assert not any(name.startswith("language") for name in gradients_m)
    assert not any(name.startswith("class_maps") for name in gradients_l), "L must not train M's classifier"
    return {
        name: (1 - beta) * gradients_m[name] + beta * eta * gradients_l[name]
        if name.startswith("image_model")
        else gradients_m[name]
        if name in gradients_m
        else gradients_l[name]
        for name in {**gradients_m, **gradients_l}
    }


@pytest.mark.parametrize("sharpening", ["cam", "none"])
@pytest.mark.parametrize(("beta", "eta"), CASES)
def test_one_pass_equals_two_passes_blended_by_hand(beta: float, eta: float, sharpening: str) -> None:
    network, inputs = to(torch.double, tiny_network(1, sharpening=sharpening), random_inputs(1))
    ours, reference = blended(network, inputs, beta, eta), by_hand(network, inputs, beta, eta)
    assert ours.keys() == reference.keys() == {name for name, _ in network.named_parameters()}
    for name, expected in reference.items():
        assert expected.abs().sum() > 0
        assert relative_difference(ours[name], expected) < 1e-9, name


@pytest.mark.parametrize(("beta", "eta"), CASES)
def test_it_holds_to_1e_6_in_single_precision(beta: float, eta: float) -> None:
    network, inputs = tiny_network(2), random_inputs(2)
    ours, reference = blended(network, inputs, beta, eta), by_hand(network, inputs, beta, eta)
    for part in ("image_model", "class_maps", "language_model"):
        names = [name for name in reference if name.startswith(part)]
        difference = relative_difference(
            torch.cat([ours[name].flatten() for name in names]),
            torch.cat([reference[name].flatten() for name in names]),
        )
        assert difference < 1e-6, part


def test_the_norms_are_those_of_the_separate_gradients_at_the_map() -> None:
    network, inputs = to(torch.double, tiny_network(3), random_inputs(3))
    *_, expected = separate(network, inputs)
    for beta, eta in CASES:
        blended(network, inputs, beta, eta)
        assert network.blend.squared_norms.tolist() == pytest.approx(expected, rel=1e-5), "before either is scaled"


def test_the_norms_add_up_over_micro_batches_until_they_are_set_anew() -> None:
    blend = GradientBlend()
    blend.set(0.25, 2.0)
    expected = torch.zeros(2)
    for scale in (1.0, 3.0):
        features = torch.ones(2, 3, 1, 1, requires_grad=True)
        for_m, for_l = blend(features)
        (scale * for_m.sum() + 2 * scale * for_l.sum()).backward()
        assert torch.allclose(gradient_of(features), torch.full_like(features, 0.75 * scale + 0.5 * 2 * scale))
        expected += torch.tensor([6 * scale**2, 24 * scale**2])
    assert torch.equal(blend.squared_norms, expected)
    blend.set(0.25, 2.0)
    assert not blend.squared_norms.any()


def test_a_loss_that_does_not_use_its_map_counts_as_zero() -> None:
    blend = GradientBlend()
    blend.set(0.25, 2.0)
    features = torch.ones(1, 2, 1, 1, requires_grad=True)
    blend(features)[0].sum().backward()
    assert torch.equal(gradient_of(features), torch.full_like(features, 0.75))
    assert blend.squared_norms.tolist() == [2.0, 0.0]


def test_beta_and_eta_are_buffers_outside_the_saved_state() -> None:
    network = tiny_network()
    assert not any("blend" in name for name in network.state_dict())
    assert {"beta", "eta", "squared_norms"} == {name for name, _ in network.blend.named_buffers()}


# --------------------------------------------------------------------------------------------- beta = 0 and beta = 1


def image_weights_after_two_steps(inputs: Inputs, beta: float) -> list[Tensor]:
    """theta_D after two updates of the network from the same initial weights."""
    network = tiny_network(5)
    constant = ScheduleConfig(kind="constant", warmup=0.0)
    optimizer = PartOptimizer(
        {name: part.parameters() for name, part in network.parts().items()},
        SgdAdamConfig(
            image=SgdGroup(schedule=constant),
            head=AdamGroup(schedule=constant, lr=0.0),
            language=AdamGroup(schedule=constant, lr=0.0),
        ),
    )
    optimizer.schedule(0.5)
    for _ in range(2):
        blended(network, inputs, beta, 5.0)
        optimizer.step()
    return list(network.image_model.parameters())


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_beta_0_leaves_the_update_of_d_independent_of_the_text() -> None:
    inputs = random_inputs(4)
    tokens, lengths = ragged_tokens(99, images=4, reports=3)
    other_text = inputs._replace(tokens=tokens, lengths=lengths)
    assert same(image_weights_after_two_steps(inputs, 0.0), image_weights_after_two_steps(other_text, 0.0))
    assert not same(image_weights_after_two_steps(inputs, 0.3), image_weights_after_two_steps(other_text, 0.3))


def test_beta_1_leaves_the_update_of_d_independent_of_the_labels() -> None:
    inputs = random_inputs(4)
    other_labels = inputs._replace(labels=torch.where(inputs.labels == NO_LABEL, 0, (inputs.labels + 1) % 3))
    assert not (other_labels.labels == inputs.labels).any()
    assert same(image_weights_after_two_steps(inputs, 1.0), image_weights_after_two_steps(other_labels, 1.0))
    assert not same(image_weights_after_two_steps(inputs, 0.3), image_weights_after_two_steps(other_labels, 0.3))


# -------------------------------------------------------------------------------------------------- nothing to learn


def test_a_batch_without_labels_gives_zero_loss_and_zero_gradients_of_m() -> None:
    network, inputs = tiny_network(6), random_inputs(6)
    unlabelled = inputs._replace(labels=torch.full_like(inputs.labels, NO_LABEL))
    for label_smoothing in (0.0, 0.1):
        network.zero_grad()
        losses = network(*unlabelled, label_smoothing)
        assert losses.m.item() == 0.0
        (losses.m + losses.l).backward()
        gradients = {name: gradient_of(weight) for name, weight in network.named_parameters()}
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        assert not gradients["class_maps.weight"].any() and not gradients["class_maps.bias"].any()
        assert gradients["language_model.output.weight"].any()


def test_a_batch_without_reports_gives_zero_loss_and_a_gradient_on_every_weight() -> None:
    network, inputs = tiny_network(7), random_inputs(7)
    silent = inputs._replace(tokens=torch.full_like(inputs.tokens, PAD), lengths=torch.zeros_like(inputs.lengths))
    losses = network(*silent)
    assert losses.l.item() == 0.0
    (losses.m + losses.l).backward()
    for name, weight in network.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all(), name
        assert weight.grad.any() != name.startswith("language_model"), name
    assert network.blend.squared_norms[1] == 0.0


def test_label_smoothing_spreads_the_likelihood_over_the_classes() -> None:
    network, inputs = tiny_network(8).eval(), random_inputs(8)
    chosen = inputs.labels != NO_LABEL
    log_likelihoods = network.see(inputs.images).logits.log_softmax(1)[chosen]
    picked = log_likelihoods.gather(1, inputs.labels[chosen, None])[:, 0]
    expected = -(0.8 * picked + 0.2 * log_likelihoods.mean(1)).sum()
    assert network(*inputs, 0.2).m.item() == pytest.approx(expected.item(), rel=1e-5)
