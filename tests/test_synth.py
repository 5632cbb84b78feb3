"""The synthetic bladder set: what its images show, what its reports say, how well its readers agree."""

from __future__ import annotations

import io
import itertools
import statistics
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocoevalcap.bleu.bleu_scorer import BleuScorer

from data_shards import synth_nuclei
from data_shards.synth import GRADE_SHARES, draw_grades, plan_images, synthesize
from data_shards.synth_reports import (
    CLASSES,
    GRADES,
    HIGH_GRADE,
    INSUFFICIENT,
    LOW_GRADE,
    NORMAL,
    READERS,
    TOPICS,
    WORDINGS,
    conclusion,
    write_reports,
)
from data_shards.synth_tissue import INSUFFICIENT_KINDS, Field, draw_field, draw_style, nuclear_radius_px
from data_shards.writer import write_shards
from mdnet_dist.errors import InputError
from mdnet_dist.shards import CONCLUSION, load_manifest
from mdnet_dist.vocabulary import tokenize

LOW = dict(zip(GRADES, ("mild", "mild", "partially lost", "rare", "inconspicuous")), conclusion=LOW_GRADE)


def fields(count: int, size_px: int = 128, **grades: str) -> list[Field]:
    """Fields of several patients; those of two calls differ in nothing but the grades."""
    return [
        draw_field({**LOW, **grades}, draw_style(np.random.default_rng([7, n])), size_px, np.random.default_rng([8, n]))
        for n in range(count)
    ]


def brightness(field: Field) -> np.ndarray:
    """(S, S) mean of the channels; absorbing stain is dark."""
    return field.image.astype(float).mean(axis=2)


# The set as a whole


@pytest.fixture(scope="module")
def samples() -> list:
    return list(synthesize(images=36, patients=6, size_px=64, seed=3, folds=False, processes=1))


def test_same_bytes_whatever_the_number_of_processes(samples):
    assert list(synthesize(images=36, patients=6, size_px=64, seed=3, folds=False, processes=2)) == samples


def test_another_seed_is_another_set(samples):
    other = list(synthesize(images=6, patients=6, size_px=64, seed=4, folds=False, processes=1))
    assert not {sample.image for sample in other} & {sample.image for sample in samples}


def test_more_images_leave_the_first_ones_as_they_are(samples):
    longer = itertools.islice(synthesize(images=60, patients=6, size_px=64, seed=3, folds=True, processes=1), 36)
    assert [(s.key, s.image, s.mask, s.record) for s in longer] == [(s.key, s.image, s.mask, s.record) for s in samples]


def test_a_reader_that_stops_early_ends_the_processes():
    stream = synthesize(images=64, patients=4, size_px=64, seed=0, folds=True, processes=2)
    assert next(stream).key == "p001-0001"
    stream.close()


def test_samples_are_what_the_format_asks_for(samples, tmp_path):
    for sample in samples:
        image, mask = Image.open(io.BytesIO(sample.image)), Image.open(io.BytesIO(sample.mask))
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 64))
        assert (mask.format, mask.mode, mask.size) == ("PNG", "L", (64, 64))
        assert set(np.unique(mask)) == {0, 255}
        assert sample.record.label == sample.record.grades[CONCLUSION]
        assert len(sample.record.reports) == READERS
        assert ("mitosis" in sample.extra_masks) or sample.record.grades.get("mitosis") in ("rare", None)
    write_shards(samples, tmp_path / "set", name="synthetic", topics=TOPICS, classes=CLASSES)
    manifest = load_manifest(tmp_path / "set")
    assert sum(part.samples for part in manifest.parts.values()) == 36
    assert manifest.topics == list(TOPICS)


@pytest.mark.parametrize(("images", "patients"), [(300, 32), (1200, 40), (1000, 24)])
def test_splits_hold_whole_patients_and_every_class(images, patients):
    for seed in range(3):
        plans = plan_images(images, patients, 128, seed, folds=False)
        splits = defaultdict(set)
        for plan in plans:
            splits[plan.patient].add(plan.split)
        assert len(splits) == patients
        assert all(len(of_patient) == 1 for of_patient in splits.values())
        share = {split: count / images for split, count in Counter(plan.split for plan in plans).items()}
        assert share["train"] == pytest.approx(0.7, abs=0.1)
        assert share["val"] == pytest.approx(0.1, abs=0.07)
        assert share["test"] == pytest.approx(0.2, abs=0.07)
        held = {(plan.split, plan.grades[CONCLUSION]) for plan in plans}
        assert held == set(itertools.product(("train", "val", "test"), CLASSES))


def test_with_folds_nobody_is_split():
    assert {plan.split for plan in plan_images(20, 5, 128, 0, folds=True)} == {None}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"images": 5}, "images: 5"),
        ({"patients": 0}, "patients: 0"),
        ({"patients": 2}, "patients: 2"),
        ({"size_px": 63}, "size: 63"),
        ({"size_px": 5000}, "size: 5000"),
        ({"seed": -1}, "seed: -1"),
        ({"processes": 0}, "processes: 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, named):
    with pytest.raises(InputError, match=named):
        synthesize(**{"images": 12, "patients": 6, "size_px": 64, "seed": 0, "folds": False, **arguments})


# Grades and conclusion


def test_grades_follow_the_tissue():
    """More atypical tissue has higher grades in every topic, but no topic tells the tissue for certain."""
    rng = np.random.default_rng(0)
    drawn = {
        tissue: [g for g in (draw_grades(tissue, rng) for _ in range(600)) if len(g) > 1] for tissue in GRADE_SHARES
    }
    for topic, steps in GRADES.items():
        means = [statistics.mean(steps.index(g[topic]) for g in drawn[tissue]) for tissue in GRADE_SHARES]
        assert means == sorted(means)
        assert means[2] - means[0] > 0.5
        assert {g[topic] for g in drawn[LOW_GRADE]} & {g[topic] for g in drawn[HIGH_GRADE]}
    unclear = 1 - statistics.mean(len(of_tissue) for of_tissue in drawn.values()) / 600
    assert unclear == pytest.approx(0.09, abs=0.03)


@pytest.mark.parametrize(
    ("grades", "expected"),
    [
        (("normal", "normal", "not lost", "rare", "inconspicuous"), NORMAL),  # 0 points
        (("mild", "normal", "not lost", "rare", "inconspicuous"), NORMAL),  # 1
        (("normal", "normal", "not lost", "rare", "prominent"), NORMAL),  # 1
        (("mild", "mild", "not lost", "rare", "inconspicuous"), LOW_GRADE),  # 2
        (("normal", "normal", "completely lost", "rare", "inconspicuous"), LOW_GRADE),  # 2
        (("mild", "mild", "partially lost", "infrequent", "prominent"), LOW_GRADE),  # 5
        (("moderate", "mild", "partially lost", "infrequent", "prominent"), HIGH_GRADE),  # 6
        (("severe", "severe", "not lost", "rare", "inconspicuous"), HIGH_GRADE),  # 6
        (("severe", "severe", "completely lost", "frequent", "prominent"), HIGH_GRADE),  # 11
    ],
)
def test_the_conclusion_is_a_rule(grades, expected):
    assert conclusion(dict(zip(GRADES, grades, strict=True))) == expected


def test_nothing_seen_is_insufficient_information():
    assert conclusion({}) == INSUFFICIENT


@given(st.tuples(*(st.integers(0, len(steps) - 1) for steps in GRADES.values())), st.sampled_from(list(GRADES)))
def test_a_higher_grade_never_lowers_the_conclusion(steps, topic):
    grades = {name: GRADES[name][step] for name, step in zip(GRADES, steps)}
    here = GRADES[topic].index(grades[topic])
    worse = {**grades, topic: GRADES[topic][min(here + 1, len(GRADES[topic]) - 1)]}
    assert CLASSES.index(conclusion(worse)) >= CLASSES.index(conclusion(grades))


# Reports


def test_wordings_tell_the_grades_apart():
    for topic, grades in WORDINGS.items():
        assert tuple(grades) == (GRADES[topic] if topic != CONCLUSION else CLASSES)
        sentences = [" ".join(tokenize(sentence)) for wordings in grades.values() for sentence in wordings]
        assert 8 <= len(sentences) <= 20
        assert len(set(sentences)) == len(sentences)
        for wordings in grades.values():
            assert sum(wordings.values()) == 100
            assert len(set(wordings.values())) > 1, "frequencies are unequal"


def test_a_field_that_cannot_be_judged_has_only_a_conclusion():
    for report in write_reports({CONCLUSION: INSUFFICIENT}, np.random.default_rng(0)):
        assert list(report) == [CONCLUSION]
        assert report[CONCLUSION] in WORDINGS[CONCLUSION][INSUFFICIENT]


def test_readers_disagree_now_and_then_by_one_grade():
    grade_of = {(t, s): g for t, grades in WORDINGS.items() for g, wordings in grades.items() for s in wordings}
    rng, steps_off = np.random.default_rng(1), Counter()
    for report in itertools.chain.from_iterable(write_reports(LOW, rng) for _ in range(400)):
        assert list(report) == list(TOPICS)
        assert grade_of[CONCLUSION, report[CONCLUSION]] == LOW_GRADE
        for topic, steps in GRADES.items():
            steps_off[abs(steps.index(grade_of[topic, report[topic]]) - steps.index(LOW[topic]))] += 1
    assert set(steps_off) == {0, 1}
    assert 0.01 < steps_off[1] / sum(steps_off.values()) < 0.05


def corpus_bleu4(pairs: list[tuple[str, list[str]]]) -> float:
    scorer = BleuScorer(n=4)
    for said, references in pairs:
        scorer += (said, references)
    scores, _ = scorer.compute_score(option="closest", verbose=0)
    return scores[3]


@pytest.mark.parametrize(("images", "patients", "seed"), [(300, 30, 0), (1000, 32, 1), (2000, 60, 2)])
def test_readers_agree_as_on_real_reports(images, patients, seed):
    """The two scores that a trained network is put beside, and the size of the language, as measured on real reports:
    people 0.68, oracle 0.76, 112 words, 35 words a report."""
    plans = plan_images(images, patients, 128, seed, folds=False)
    reports = [plan.reports() for plan in plans]
    said_in_training = defaultdict(Counter)
    for plan, of_image in zip(plans, reports):
        if plan.split == "train":
            for report in of_image:
                for topic, sentence in report.items():
                    said_in_training[topic, plan.grades[topic]][sentence] += 1
    captions = [[" ".join(tokenize(" ".join(report.values()))) for report in of_image] for of_image in reports]
    oracle = [
        " ".join(" ".join(tokenize(said_in_training[item].most_common(1)[0][0])) for item in plan.grades.items())
        for plan in plans
    ]
    assert 0.65 <= corpus_bleu4([(first, others) for first, *others in captions]) <= 0.71
    assert 0.73 <= corpus_bleu4(list(zip(oracle, captions))) <= 0.78
    words = [caption.split() for of_image in captions for caption in of_image]
    assert 105 <= len(set(itertools.chain.from_iterable(words))) <= 118
    assert statistics.median(map(len, words)) == pytest.approx(35, abs=1)


# Pixels


def test_crowding_covers_more_of_the_urothelium():
    """Counted in nuclei, and measured in dark pixels."""
    density, darkness = [], []
    for grade in GRADES["crowding"]:
        drawn = fields(6, crowding=grade)
        density.append(statistics.mean(len(f.nuclei) / f.urothelium.sum() for f in drawn))
        darkness.append(statistics.mean(-brightness(f)[f.urothelium].mean() for f in drawn))
    for lower, higher in itertools.pairwise(density):
        assert higher > 1.2 * lower
    assert darkness == sorted(darkness)


def test_pleomorphism_spreads_sizes_and_shades():
    sizes, shades = [], []
    for grade in GRADES["pleomorphism"]:
        drawn = fields(6, pleomorphism=grade)
        sizes.append(statistics.mean(float(np.std(np.log(f.nuclei.long * f.nuclei.short) / 2)) for f in drawn))
        at_centres = [brightness(f)[f.nuclei.y.astype(int), f.nuclei.x.astype(int)] for f in drawn]
        shades.append(statistics.mean(float(np.std(values)) for values in at_centres))
    for lower, higher in itertools.pairwise(sizes):
        assert higher > 1.4 * lower
    assert shades == sorted(shades)


def test_polarity_is_how_far_neighbours_lie_alike():
    """Near 1 where each nucleus is parallel to its nearest neighbour, about 0 where directions are random."""
    alike = []
    for grade in GRADES["polarity"]:
        values = []
        for nuclei in (field.nuclei for field in fields(8, polarity=grade)):
            distance = np.hypot(nuclei.x[:, None] - nuclei.x, nuclei.y[:, None] - nuclei.y)
            np.fill_diagonal(distance, np.inf)
            values.append(np.cos(2 * (nuclei.angle - nuclei.angle[distance.argmin(axis=1)])).mean())
        alike.append(statistics.mean(values))
    assert alike[0] > 0.7
    assert 0.2 < alike[1] < 0.6
    assert abs(alike[2]) < 0.2


def test_mitotic_figures_follow_the_grade_and_lie_in_their_mask():
    counts = {}
    for grade in GRADES["mitosis"]:
        drawn = fields(8, mitosis=grade)
        counts[grade] = [len(field.figures) for field in drawn]
        for field in drawn:
            assert field.mitoses.any() == (len(field.figures) > 0)
            if not len(field.figures):
                continue
            rows, columns = np.nonzero(field.mitoses)
            distance = np.hypot(field.figures.y[:, None] - rows, field.figures.x[:, None] - columns)
            r = nuclear_radius_px(128)
            assert (distance.min(axis=1) < r).all(), "each figure is marked"
            assert (distance.min(axis=0) < 2 * r).all(), "and nothing but figures"
            others = brightness(field)[field.nuclei.y.astype(int), field.nuclei.x.astype(int)]
            assert brightness(field)[field.mitoses].mean() < others.mean() - 15, "chromosomes are the darkest"
    assert max(counts["rare"]) <= 2
    assert max(counts["rare"]) <= min(counts["infrequent"])
    assert max(counts["infrequent"]) < min(counts["frequent"])


def test_prominent_nucleoli_are_dark_spots_in_pale_nuclei():
    contrast = {}
    for grade in GRADES["nucleoli"]:
        values = []
        for field in fields(6, nucleoli=grade, pleomorphism="normal", crowding="normal"):
            light, n = brightness(field), field.nuclei
            inside = (n.x > 8) & (n.x < 119) & (n.y > 8) & (n.y < 119)
            for x, y, angle, long in zip(n.x[inside], n.y[inside], n.angle[inside], n.long[inside]):
                along = np.linspace(-0.8, 0.8, 9)[:, None] * long * np.array([np.sin(angle), np.cos(angle)]) + (y, x)
                profile = light[tuple(along.round().astype(int).T)]
                values.append(np.median(profile) - profile[3:7].min())
        contrast[grade] = statistics.mean(values)
    assert contrast["prominent"] > contrast["inconspicuous"] + 10


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([64, 96, 128, 200]),
    st.integers(0, 2**32 - 1),
    st.tuples(*(st.sampled_from(steps) for steps in GRADES.values())),
)
def test_any_field_has_urothelium_with_its_nuclei(size_px, seed, drawn):
    grades = dict(zip(GRADES, drawn))
    rng = np.random.default_rng(seed)
    field = draw_field({**grades, CONCLUSION: conclusion(grades)}, draw_style(rng), size_px, rng)
    assert field.image.shape == (size_px, size_px, 3)
    assert field.image.dtype == np.uint8
    assert field.urothelium.mean() > 0.15
    assert len(field.nuclei) >= 5
    for nuclei in (field.nuclei, field.figures):
        assert field.urothelium[nuclei.y.astype(int), nuclei.x.astype(int)].all()
    assert len(field.figures) >= synth_nuclei.LEAST_MITOSES[grades["mitosis"]]


def test_fields_that_cannot_be_judged_are_of_every_kind(monkeypatch):
    """Out of focus and crushed: no detail. Stroma and lumen: hardly any urothelium, but some."""
    judged = fields(6)
    detail = min(np.abs(np.diff(brightness(field)[field.urothelium])).mean() for field in judged)
    for kind in INSUFFICIENT_KINDS:
        monkeypatch.setattr("data_shards.synth_tissue.INSUFFICIENT_KINDS", (kind,))
        for n in range(6):
            rng = np.random.default_rng([9, n])
            field = draw_field({CONCLUSION: INSUFFICIENT}, draw_style(rng), 128, rng)
            assert field.urothelium.any()
            assert not field.mitoses.any()
            if kind in ("stroma", "lumen"):
                assert field.urothelium.mean() < 0.25
            if kind == "out of focus":
                assert np.abs(np.diff(brightness(field)[field.urothelium])).mean() < detail / 1.5


def test_stain_is_the_patients():
    """Two images of one patient are closer in colour than images of different patients are on average."""

    def colour(patient: int, index: int) -> np.ndarray:
        field = draw_field(LOW, draw_style(np.random.default_rng([1, patient])), 64, np.random.default_rng([2, index]))
        return field.image[field.urothelium].mean(axis=0)

    colours = np.array([[colour(patient, 2 * patient + i) for i in range(2)] for patient in range(10)])
    within = np.linalg.norm(colours[:, 0] - colours[:, 1], axis=1).mean()
    between = np.linalg.norm(colours[:, 0] - np.roll(colours[:, 1], 1, axis=0), axis=1).mean()
    assert between > 1.3 * within
