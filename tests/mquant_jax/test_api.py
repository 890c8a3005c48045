"""Converting and quantising from Python."""

import dataclasses

import pytest

import mquant_jax as mq
from mquant_jax.samples import BUNDLED_CALIBRATION, DEMO_ASSETS, read_samples

SOURCE = DEMO_ASSETS / "model"
SHORT = dataclasses.replace(
    mq.PRESETS["w8a8"],
    calibration=dataclasses.replace(mq.PRESETS["w8a8"].calibration, max_samples=4),
)


@pytest.fixture(scope="module")
def float_model(tmp_path_factory):
    dst = tmp_path_factory.mktemp("float") / "dst"
    manifest = mq.convert(str(SOURCE), dst)
    assert manifest["recipe"]["name"] == "float" and dst.is_dir()
    return mq.load(dst)


def test_a_model_quantised_in_memory_is_the_converted_one(tmp_path, float_model) -> None:
    samples = read_samples(BUNDLED_CALIBRATION, 4)
    quantised = mq.quantize(float_model, SHORT, samples)
    mq.convert(SOURCE, tmp_path / "dst", SHORT)
    question = {"images": [samples[0].images[0]], "prompt": samples[0].question}
    expected = mq.load(tmp_path / "dst").generate(**question, max_new_tokens=4)
    assert quantised.generate(**question, max_new_tokens=4) == expected
    assert quantised.manifest["report"]["points"]
    with pytest.raises(mq.UserError, match="quantised already"):
        mq.quantize(quantised, "w8a8", samples)


def test_what_cannot_be_quantised(float_model) -> None:
    with pytest.raises(mq.UserError, match="neither a preset"):
        mq.quantize(float_model, "w3a3")
    for samples in ([], ["cat"]):
        with pytest.raises(mq.UserError, match="samples: expected"):
            mq.quantize(float_model, SHORT, samples)
    with pytest.raises(mq.UserError, match="exists already"):
        mq.convert(SOURCE, SOURCE)
