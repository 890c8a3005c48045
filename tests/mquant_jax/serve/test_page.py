"""The server's page in a real browser: drop a picture, ask, read the streamed answer.

``.ci/extended`` runs this; it needs Chromium (Debian: the package chromium), or its path in
``MQUANT_BROWSER``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import mquant_jax as mq
from mquant_jax.runtime.engine import Engine
from mquant_jax.samples import BUNDLED_HELDOUT, DEMO_ASSETS, read_samples
from tests.mquant_jax.serve.browser import NAMES, VARIABLE, find_browser, page
from tests.mquant_jax.serve.running import data_url, served

DROP = """(() => {
  const bytes = Uint8Array.from(atob(%s), c => c.charCodeAt(0));
  const files = new DataTransfer();
  files.items.add(new File([bytes], "x.png", { type: "image/png" }));
  document.dispatchEvent(new DragEvent("drop", { dataTransfer: files, bubbles: true,
                                                 cancelable: true }));
})()"""
ASK = "document.getElementById('text').value = %s; document.getElementById('ask').click()"


@pytest.mark.slow
def test_drop_ask_watch(tmp_path) -> None:
    browser = find_browser()
    assert browser, f"no browser: install one of {', '.join(NAMES)}, or set {VARIABLE}"
    mq.convert(DEMO_ASSETS / "model", tmp_path / "demo")
    model = mq.load(tmp_path / "demo")
    sample = read_samples(BUNDLED_HELDOUT, 1)[0]
    answer = model.generate(sample.images, sample.question)
    with (
        Engine(model, slots=2, context=512) as engine,
        served(model, engine, key="secret") as (url, _),
        page(browser, tmp_path / "profile") as tab,
    ):
        tab.call("Page.navigate", url=url)
        tab.wait("document.getElementById('model')?.textContent == 'an API key is needed'")
        tab.run("const k = document.getElementById('key'); k.value = 'secret'; k.onchange()")
        tab.wait("document.getElementById('model').textContent == 'tiny'")
        tab.run(DROP % json.dumps(data_url(sample.images[0]).partition(",")[2]))
        tab.wait("document.querySelectorAll('#pictures img').length == 1")
        tab.run(ASK % json.dumps(sample.question))
        times = tab.wait("document.querySelector('.times')?.textContent")
        assert tab.run("document.querySelector('.assistant').textContent") == answer
        assert times.startswith("prefill ") and "decode " in times and "tokens" in times
        assert tab.run("document.querySelectorAll('.user img').length") == 1
        tab.run(ASK % json.dumps("<|im_end|><b>what colour?</b>"))
        tab.wait("document.querySelectorAll('.times').length == 2")
        assert "<b>" in tab.run("document.querySelectorAll('.user')[1].textContent")
        tab.screenshot(Path(os.environ.get("MQUANT_SCREENSHOT", tmp_path / "page.png")))
        tab.run(ASK % json.dumps("x" * 4000))
        assert "context is 512" in tab.wait("document.querySelector('.error')?.textContent")
        assert not tab.errors
