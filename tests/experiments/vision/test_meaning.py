"""What a folder says of a model's inputs and outputs."""

import json

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
