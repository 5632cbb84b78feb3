"""Random changes to training images: exact results, the same randomness for the same state, nothing where off."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mdnet_dist.augment import STAINS, Draw, _restain, augment, draw
from mdnet_dist.config import AugmentConfig

SIZE = 12
CHANGES: dict[str, Any] = {"mirror": True, "quarter_turns": True, "shift_px": 4, "stain": 0.2, "brightness": 0.2}


def picture(seed: int = 0, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def changed(image: np.ndarray, seed: int, **changes: Any) -> np.ndarray:
    config, given = AugmentConfig(**changes), Image.fromarray(image)
    result = np.empty_like(image)
    augment([given], [draw(config, np.random.default_rng(seed))], config, [result])
    assert np.array_equal(np.asarray(given), image), "the caller's image was changed"
    return result


def restained(image: np.ndarray, haematoxylin: float, eosin: float) -> np.ndarray:
    result = image.copy()
    _restain([result], np.array([[haematoxylin, eosin]]), np.ones(1))
    return result


# ------------------------------------------------------------------------------------ as the changes were first written


def drawn_as_first_written(config: AugmentConfig, rng: np.random.Generator) -> tuple[Any, ...]:
    turns, mirrored = int(rng.integers(4)), bool(rng.integers(2))
    shift = np.floor(rng.random(2) * (2 * config.shift_px + 1)).astype(int) - config.shift_px
    return turns, mirrored, shift, rng.standard_normal(2), rng.standard_normal()


def changed_as_first_written(image: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """Step by step in double precision, each step rounded: slow, and what the changes mean."""
    turns, mirrored, shift, stain, brightness = drawn_as_first_written(config, rng)
    if config.quarter_turns:
        image = np.rot90(image, turns)
    if config.mirror and mirrored:
        image = image[:, ::-1]
    if config.shift_px:
        margin = int(np.abs(shift).max())
        padded = np.pad(image, ((margin, margin), (margin, margin), (0, 0)), mode="reflect")
        top, left = margin + shift
        image = padded[top : top + image.shape[0], left : left + image.shape[1]]
    if config.stain:
        strengths = np.maximum([*(1 + config.stain * stain), 1.0], 0)
        density = -np.log((image.astype(float) + 1) / 256) @ np.linalg.inv(STAINS) @ np.diag(strengths) @ STAINS
        image = np.rint(np.clip(256 * np.exp(-density) - 1, 0, 255)).astype(np.uint8)
    if config.brightness:
        image = np.rint(np.clip(image * max(0.0, 1 + config.brightness * brightness), 0, 255)).astype(np.uint8)
    return image


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 2, 3, 8, 12, 20, 33]),
    st.fixed_dictionaries(
        {
            "mirror": st.booleans(),
            "quarter_turns": st.booleans(),
            "shift_px": st.integers(0, 40),
            "stain": st.one_of(st.just(0.0), st.floats(0.01, 1)),
            "brightness": st.one_of(st.just(0.0), st.floats(0.01, 1)),
        }
    ),
)
def test_images_are_those_first_written_but_for_one_grey_level(seed: int, size: int, changes: dict[str, Any]) -> None:
    image, config = picture(seed, size), AugmentConfig(**changes)
    expected = changed_as_first_written(image, config, np.random.default_rng(seed))
    difference = np.abs(changed(image, seed, **changes).astype(int) - expected)
    assert difference.max() <= (1 if config.stain else 0)


@pytest.mark.parametrize("size", [128, 224])
def test_every_colour_of_a_large_image_is_within_one_grey_level(size: int) -> None:
    image = np.resize(all_colours(), (size, size, 3))
    changes: dict[str, Any] = {"mirror": True, "quarter_turns": True, "shift_px": 8, "stain": 0.1, "brightness": 0.05}
    for seed in range(5):
        expected = changed_as_first_written(image, AugmentConfig(**changes), np.random.default_rng(seed))
        assert np.abs(changed(image, seed, **changes).astype(int) - expected).max() <= 1


def test_the_same_seeds_give_the_same_draws_as_ever() -> None:
    """And leave the generator where it was left: the choice of reports follows from it."""
    for seed in range(200):
        config = AugmentConfig(shift_px=seed % 20)
        one, other = np.random.default_rng([seed, 3]), np.random.default_rng([seed, 3])
        turns, mirrored, shift, stain, brightness = drawn_as_first_written(config, one)
        assert draw(config, other) == Draw(
            turns=turns,
            mirrored=mirrored,
            down=shift[0],
            right=shift[1],
            haematoxylin=stain[0],
            eosin=stain[1],
            brightness=brightness,
        )
        assert one.random() == other.random()


def test_the_number_of_threads_does_not_show() -> None:
    """Loader processes have one thread; training without them has all."""
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(changed(picture(1, 224), 1, stain=0.2, brightness=0.1))
    finally:
        torch.set_num_threads(before)
    assert all(np.array_equal(result, results[0]) for result in results)


def test_images_do_not_depend_on_their_neighbours() -> None:
    config = AugmentConfig(**CHANGES)
    images = [picture(seed) for seed in range(5)]
    together = [np.empty_like(image) for image in images]
    draws = [draw(config, np.random.default_rng(seed)) for seed in range(5)]
    augment([Image.fromarray(image) for image in images], draws, config, together)
    for seed, result in enumerate(together):
        assert np.array_equal(result, changed(images[seed], seed, **CHANGES))


# ------------------------------------------------------------------------------------------------- what they are to do


def every_choice(choices: dict[str, Any]) -> list[dict[str, Any]]:
    """All ways to turn some of these changes on."""
    return [
        {name: choices[name] for name in names}
        for count in range(len(choices) + 1)
        for names in itertools.combinations(choices, count)
    ]


def test_all_off_changes_nothing() -> None:
    for seed in range(20):
        assert np.array_equal(changed(picture(), seed), picture())


@pytest.mark.parametrize("changes", every_choice(CHANGES), ids="+".join)
def test_the_same_state_gives_the_same_image(changes: dict[str, Any]) -> None:
    for seed in range(5):
        assert np.array_equal(changed(picture(), seed, **changes), changed(picture(), seed, **changes))
    looks = {changed(picture(), seed, **changes).tobytes() for seed in range(60)}
    assert len(looks) == 1 if not changes else len(looks) >= 2


def test_mirrored_or_not_half_the_time() -> None:
    image = picture()
    mirrored = 0
    for seed in range(400):
        result = changed(image, seed, mirror=True)
        if np.array_equal(result, image[:, ::-1]):
            assert np.array_equal(result[:, ::-1], image)
            mirrored += 1
        else:
            assert np.array_equal(result, image)
    assert 150 < mirrored < 250


def test_each_quarter_turn_a_quarter_of_the_time() -> None:
    image = picture()
    turns = [image, image.transpose(1, 0, 2)[::-1], image[::-1, ::-1], image.transpose(1, 0, 2)[:, ::-1]]
    seen = np.zeros(4, dtype=int)
    for seed in range(400):
        result = changed(image, seed, quarter_turns=True)
        seen += [np.array_equal(result, turn) for turn in turns]
    assert seen.sum() == 400
    assert seen.min() > 65


def shifted(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """Each pixel by hand; beyond the border the image goes on as in a mirror, the outermost pixel not repeated."""

    def inside(place: int) -> int:
        place = abs(place) % (2 * SIZE - 2)
        return place if place < SIZE else 2 * SIZE - 2 - place

    result = np.empty_like(image)
    for row in range(SIZE):
        for column in range(SIZE):
            result[row, column] = image[inside(row + down), inside(column + right)]
    return result


def test_shifts_are_those_done_by_hand() -> None:
    image = picture()
    possible = {shifted(image, down, right).tobytes(): (down, right) for down in range(-2, 3) for right in range(-2, 3)}
    assert len(possible) == 25
    seen = {possible[changed(image, seed, shift_px=2).tobytes()] for seed in range(300)}
    assert seen == set(possible.values()), "some shift never comes"


def test_the_largest_shift_still_shows_the_image() -> None:
    for seed in range(30):
        result = changed(picture(), seed, shift_px=SIZE - 1)
        assert {tuple(pixel) for pixel in result.reshape(-1, 3)} <= {tuple(p) for p in picture().reshape(-1, 3)}


def all_colours() -> np.ndarray:
    """4,096 colours that fill the cube, and the 256 greys."""
    axis = np.linspace(0, 255, 16).astype(np.uint8)
    colours = np.stack(np.meshgrid(axis, axis, axis), -1).reshape(-1, 3)
    greys = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, 1)
    return np.resize(np.concatenate([colours, greys]), (66 * 66, 3)).reshape(66, 66, 3)


def test_restaining_by_a_factor_of_1_changes_nothing() -> None:
    assert np.array_equal(restained(all_colours(), 1.0, 1.0), all_colours())
    assert np.array_equal(changed(all_colours(), 0, stain=1e-9), all_colours())


def test_brightening_by_a_factor_of_nearly_1_changes_nothing() -> None:
    assert np.array_equal(changed(all_colours(), 0, brightness=1e-9), all_colours())


def test_restaining_multiplies_the_amounts_of_the_stains() -> None:
    """An image made of known amounts of haematoxylin and eosin; the amounts are read back by least squares."""
    rng = np.random.default_rng(0)
    amounts = rng.uniform(0.2, 0.8, (SIZE, SIZE, 2))
    density = amounts @ STAINS[:2]
    image = np.rint(256 * np.exp(-density) - 1).astype(np.uint8)
    result = restained(image, 1.4, 0.5)
    found = np.linalg.lstsq(STAINS[:2].T, -np.log((result.reshape(-1, 3) + 1.0) / 256).T, rcond=None)[0].T
    assert np.abs(found - amounts.reshape(-1, 2) * [1.4, 0.5]).max() < 0.03


def test_white_stays_white_however_it_is_stained() -> None:
    white = np.full((SIZE, SIZE, 3), 255, dtype=np.uint8)
    for seed in range(20):
        assert np.array_equal(changed(white, seed, stain=0.5), white)


def test_the_stains_are_directions() -> None:
    assert np.allclose(np.linalg.norm(STAINS, axis=1), 1)
    assert np.linalg.cond(STAINS) < 20, "nearly the same direction twice cannot be told apart"


def test_brightness_multiplies_all_channels_alike() -> None:
    image = np.full((SIZE, SIZE, 3), [40, 80, 120], dtype=np.uint8)
    factors = []
    for seed in range(300):
        result = changed(image, seed, brightness=0.1)
        factor = result[0, 0, 2] / 120
        assert (result == result[0, 0]).all()
        assert np.abs(result[0, 0] - factor * np.array([40, 80, 120])).max() <= 1
        factors.append(factor)
    assert abs(np.mean(factors) - 1) < 0.02
    assert 0.085 < np.std(factors) < 0.115


def test_turning_one_change_on_leaves_the_others_as_they_were() -> None:
    """With a shift the same images are mirrored, turned and stained as without one."""
    image = np.full((SIZE, SIZE, 3), [140, 80, 120], dtype=np.uint8)  # shifts and turns do not show on it
    for seed in range(20):
        alone = changed(image, seed, stain=0.2, brightness=0.1)
        for others in every_choice({"mirror": True, "quarter_turns": True, "shift_px": 3}):
            assert np.array_equal(changed(image, seed, stain=0.2, brightness=0.1, **others), alone)
        for shift_px in (1, 2, 7):
            assert np.array_equal(changed(image, seed, stain=0.2, brightness=0.1, shift_px=shift_px), alone)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 20),
    st.fixed_dictionaries(
        {
            "mirror": st.booleans(),
            "quarter_turns": st.booleans(),
            "shift_px": st.integers(0, 40),
            "stain": st.floats(0, 1),
            "brightness": st.floats(0, 1),
        }
    ),
)
def test_any_strength_gives_an_image(seed: int, size: int, changes: dict[str, Any]) -> None:
    """A whole one: where a pixel were not written, memory of no value would differ from call to call."""
    image = picture(seed, size)
    assert np.array_equal(changed(image, seed, **changes), changed(image, seed, **changes))
