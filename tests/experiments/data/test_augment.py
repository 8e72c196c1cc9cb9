"""What training does to images, and what evaluation does not."""

import numpy as np
import pytest
from PIL import Image

from experiments.data.augment import AugmentConfig, Preprocess, PreprocessConfig, _random_box, erase, mix


def picture(width=12, height=8):
    """Each pixel says where it is: red across, green down."""
    across, down = np.meshgrid(np.arange(width) * 20, np.arange(height) * 20)
    return Image.fromarray(np.stack([across, down, np.full_like(across, 7)], axis=-1).astype(np.uint8))


def generator(seed=0):
    return np.random.default_rng(seed)


def test_evaluation_takes_the_middle_and_normalises():
    preprocess = Preprocess(PreprocessConfig(mean=(0.5, 0.5, 0.0), std=(0.5, 0.25, 1.0)), 8, 3)
    array = preprocess(picture())
    assert array.shape == (8, 8, 3)
    assert array.dtype == np.float32
    across = np.arange(2, 10) * 20 / 255  # the middle 8 of 12 columns
    np.testing.assert_allclose(array[0, :, 0], (across - 0.5) / 0.5, atol=1e-6)
    np.testing.assert_allclose(array[:, 3, 1], (np.arange(8) * 20 / 255 - 0.5) / 0.25, atol=1e-6)
    np.testing.assert_allclose(array[..., 2], 7 / 255, atol=1e-6)


def test_crop_fraction_is_a_share_of_the_shorter_side():
    small = Preprocess(PreprocessConfig((0.0,), (1.0,), crop_fraction=0.5), 4, 3)(picture())
    np.testing.assert_allclose(small[0, :, 0] * 255, np.arange(4, 8) * 20, atol=1e-3)
    np.testing.assert_allclose(small[:, 0, 1] * 255, np.arange(2, 6) * 20, atol=1e-3)


def test_grey_images_become_colours_and_back():
    grey = Image.fromarray(np.full((4, 4), 51, np.uint8))
    plain = PreprocessConfig((0.0,), (1.0,))
    np.testing.assert_allclose(Preprocess(plain, 4, 3)(grey), np.full((4, 4, 3), 0.2), atol=1e-6)
    assert Preprocess(plain, 8, 1)(picture()).shape == (8, 8, 1)


@pytest.mark.parametrize("change", [{}, {"crop": "shift"}, {"crop": "resized"}, {"rotate": 20.0}, {"erase": 1.0}])
def test_training_is_a_function_of_the_generator(change):
    preprocess = Preprocess(PreprocessConfig(), 8, 3, AugmentConfig(**change))
    once, again, other = (preprocess(picture(), generator(seed)) for seed in (1, 1, 2))
    assert np.array_equal(once, again)
    assert np.array_equal(once, other) == (not change)
    assert np.array_equal(preprocess(picture()), Preprocess(PreprocessConfig(), 8, 3)(picture()))


def test_a_flip_swaps_left_and_right():
    preprocess = Preprocess(PreprocessConfig(), 8, 3, AugmentConfig(flip=1.0))
    np.testing.assert_array_equal(preprocess(picture(), generator()), preprocess(picture())[:, ::-1])


def test_a_shift_moves_by_whole_pixels_and_brings_in_black():
    preprocess = Preprocess(PreprocessConfig((0.0,), (1.0,)), 8, 3, AugmentConfig(crop="shift", shift=0.25))
    before = preprocess(picture())
    moves = set()
    for seed in range(40):
        after = preprocess(picture(), generator(seed))
        rows, columns = (np.flatnonzero(after[..., 2].any(axis=axis)) for axis in (1, 0))
        down = rows[0] if rows[0] else rows[-1] - 7
        across = columns[0] if columns[0] else columns[-1] - 7
        source = before[max(0, -down) : 8 - max(0, down), max(0, -across) : 8 - max(0, across)]
        np.testing.assert_allclose(after[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], source, atol=1e-6)
        moves.add((int(down), int(across)))
    assert {down for down, _ in moves} == {across for _, across in moves} == {-2, -1, 0, 1, 2}


def test_erasing_leaves_the_rest_as_it_is():
    shares = []
    for seed in range(50):
        array = np.full((20, 20, 1), 9.0, np.float32)
        changed = erase(array, generator(seed)) != array
        rows, columns = (np.flatnonzero(changed.any(axis=axis)) for axis in ((1, 2), (0, 2)))
        assert changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert (array == 9).all()
        shares.append(changed.mean())
    assert 0.01 < min(shares) < 0.06
    assert 0.28 < max(shares) < 0.37


def test_mixing_says_what_is_left_of_each_image():
    images = np.zeros((4, 6, 6, 1), np.float32) + np.arange(4, dtype=np.float32)[:, None, None, None]
    labels = np.arange(4, dtype=np.int32)
    untouched = mix(images, labels, AugmentConfig(), generator())
    assert np.array_equal(untouched.images, images)
    assert (untouched.share == 1).all()
    kinds = set()
    for seed in range(30):
        mixed = mix(images, labels, AugmentConfig(mixup=0.8, cutmix=1.0), generator(seed))
        expected = mixed.share * labels + (1 - mixed.share) * mixed.partners
        np.testing.assert_allclose(mixed.images.mean(axis=(1, 2, 3)), expected, atol=1e-5)
        assert mixed.partners.tolist() == [3, 2, 1, 0]
        kinds.add("cutmix" if set(np.unique(mixed.images[0])) <= {0.0, 3.0} else "mixup")
    assert kinds == {"mixup", "cutmix"}


def test_rand_augment_is_a_function_of_the_generator_in_the_colour_of_the_mean():
    preprocess = Preprocess(PreprocessConfig((0.485, 0.456, 0.406), (0.2,)), 8, 3, AugmentConfig(rand_augment=2))
    arrays = [preprocess(picture(), generator(seed)) for seed in (0, 0, *range(1, 8))]
    assert np.array_equal(arrays[0], arrays[1])
    assert any(not np.array_equal(arrays[0], array) for array in arrays[2:])
    assert preprocess.rand_augment.fill == (124, 116, 104)
    assert (preprocess.rand_augment.magnitude, preprocess.rand_augment.std) == (9, 0.5)


def test_erasing_and_mixing_are_of_the_sizes_that_timm_draws():
    """Means and quantiles of 6,000 draws of timm 1.0.31: RandomErasing(mode="pixel"), Mixup(0.8, 1.0), 56 x 56."""
    random = generator()
    shares = [float((erase(np.full((56, 56, 1), 9, np.float32), random) != 9).mean()) for _ in range(3000)]
    assert np.mean(shares) == pytest.approx(0.175, abs=0.006)
    np.testing.assert_allclose(np.quantile(shares, [0.05, 0.5, 0.95]), [0.035, 0.176, 0.315], atol=0.012)
    images, labels = np.zeros((2, 56, 56, 1), np.float32), np.arange(2, dtype=np.int32)
    images[1] = 1
    left: dict[bool, list] = {True: [], False: []}
    for _ in range(3000):
        mixed = mix(images, labels, AugmentConfig(mixup=0.8, cutmix=1.0), random)
        left[set(np.unique(mixed.images)) <= {0.0, 1.0}].append(float(mixed.share[0]))
    assert len(left[True]) == pytest.approx(1500, abs=120)
    np.testing.assert_allclose(np.quantile(left[True], [0.1, 0.5, 0.9]), [0.4375, 0.705, 0.928], atol=0.035)
    np.testing.assert_allclose(np.quantile(left[False], [0.1, 0.5, 0.9]), [0.068, 0.495, 0.924], atol=0.06)


def test_a_crop_that_does_not_fit_is_the_middle_of_a_shape_that_does():
    for size, box in (((100, 10), (43.333, 0, 56.667, 10)), ((12, 120), (0, 52, 12, 68)), ((9, 10), (0, 0, 9, 10))):
        fits = _random_box(size, 1.0, _Whole())
        assert fits == pytest.approx(box, abs=1e-3)


class _Whole:
    """A generator that always draws the most."""

    def uniform(self, low, high):
        return high * 1.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AugmentConfig(crop="middle"), "crop='middle', expected 'none', 'shift' or 'resized'"),
        (lambda: AugmentConfig(flip=2.0), "flip=2.0, expected 0 to 1"),
        (lambda: AugmentConfig(mixup=-1.0), "mixup=-1.0, expected at least 0"),
        (lambda: AugmentConfig(magnitude=31), "magnitude=31, expected 0 to 30"),
        (lambda: AugmentConfig(repeats=0), "repeats=0, expected at least 1"),
        (lambda: AugmentConfig(magnitude_std=-1.0), "magnitude_std=-1.0, expected at least 0"),
        (lambda: PreprocessConfig(background=(1, 2)), r"background=\(1, 2\), expected one or three numbers"),
        (lambda: AugmentConfig(min_area=0.0), "min_area=0.0, expected above 0"),
        (lambda: PreprocessConfig(crop_fraction=1.5), "crop_fraction=1.5, expected above 0"),
        (lambda: PreprocessConfig(std=(0.0,)), r"std=\(0.0,\), expected more than 0"),
        (lambda: Preprocess(PreprocessConfig(), 8, 2), "channels=2, expected 1 or 3"),
        (lambda: Preprocess(PreprocessConfig(mean=(0.1, 0.2)), 8, 3), r"mean=\(0.1, 0.2\), expected 1 or 3 numbers"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
