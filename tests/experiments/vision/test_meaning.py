"""What a folder says of a model's inputs and outputs."""

import json
import math

import numpy as np
import pytest

from experiments.data.augment import PreprocessConfig
from experiments.vision.meaning import read_preprocess


def test_published_preprocessing_is_read(tmp_path):
    default = PreprocessConfig()
    assert read_preprocess(tmp_path, default) is default
    stated = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "size": 256, "crop_size": 224}
    for change, fraction in (({"do_center_crop": True}, 0.875), ({"do_center_crop": False}, 1.0)):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated | change))
        assert read_preprocess(tmp_path, default) == PreprocessConfig((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), fraction)
    sizes = {"size": {"height": 224, "width": 224}, "crop_size": None, "do_center_crop": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated | sizes))
    assert read_preprocess(tmp_path, default).crop_fraction == 1.0


STATED = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.2, 0.1], "size": 8}


@pytest.mark.parametrize(
    "change",
    [
        {"do_normalize": False},
        {"do_rescale": False},
        {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3},
        {"rescale_factor": 1 / 127.5},
        {"rescale_factor": 1 / 127.5, "do_normalize": False},
    ],
)
def test_pixels_are_scaled_as_the_file_says(change, tmp_path):
    """As transformers does it: times rescale_factor, then less image_mean, over image_std; each unless switched off."""
    said = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True} | STATED | change
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(STATED | change))
    read = read_preprocess(tmp_path, PreprocessConfig())
    pixels = np.array([[0, 51, 255], [255, 128, 1]], float)
    right = pixels * said["rescale_factor"] if said["do_rescale"] else pixels
    right = (right - said["image_mean"]) / said["image_std"] if said["do_normalize"] else right
    np.testing.assert_allclose((pixels / 255 - read.mean) / read.std, right, atol=1e-9)


@pytest.mark.parametrize(
    "change",
    [{"image_std": [0, 1, 1]}, {"image_std": [math.nan] * 3}, {"image_mean": [math.inf] * 3}, {"rescale_factor": 0}],
)
def test_what_makes_no_numbers_of_pixels_is_refused(change, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(STATED | change))
    with pytest.raises(ValueError, match=r"preprocessor_config\.json cannot be read: (std|mean|float division)"):
        read_preprocess(tmp_path, PreprocessConfig())


def test_another_way_to_resize_is_said(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(STATED | {"resample": 2}))
    with pytest.warns(UserWarning, match="resample=2, but images are resized by 3"):
        read_preprocess(tmp_path, PreprocessConfig())
