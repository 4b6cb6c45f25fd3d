"""The model card."""

import dataclasses
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from PIL import Image

from ctf.common.errors import UserError
from ctf.pipelines import card
from ctf.pipelines.pipeline import Pipeline


def test_a_card_has_all_that_the_pipeline_says(pipe: Pipeline, tmp_path: Path) -> None:
    pipe.origin["license"] = "apache-2.0"
    path = tmp_path / "README.md"
    path.write_text(card.text(pipe, "me/discs", with_image=True))
    assert metadata_load(path) == {
        "library_name": "ctf",
        "license": "apache-2.0",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["arxiv:2503.16194", "arxiv:2406.06525", "autoregressive", "class-conditional"],
    }
    text = ModelCard.load(path).text
    assert "# discs\n" in text and "blue; green; red" in text and "`apache-2.0`" in text
    assert 'Pipeline.from_pretrained("me/discs")' in text and "ctf sample me/discs --out" in text
    assert "](samples.png)" in text
    (block,) = re.findall(r"```json\n(.*?)\n```", text, re.DOTALL)
    assert json.loads(block) == {
        key: value for key, value in pipe.origin.items() if key not in ("metrics", "license")
    }
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", text, re.MULTILINE))
    for stage, values in pipe.origin["metrics"].items():
        for name, value in values.items():
            assert float(rows[f"{stage} {name}"]) == pytest.approx(value, rel=1e-5)
    assert rows["clusters"].startswith(f"{pipe.clusters.count} of up to")


def test_a_card_says_nothing_that_the_pipeline_does_not(pipe: Pipeline) -> None:
    pipe.origin = {}
    text = card.text(pipe)
    assert "## Metrics" not in text and "## How it was made" not in text
    assert "license:" not in text and "Not stated." in text and "samples.png" not in text
    pipe.origin = {"converted_from": {"project": "LlamaGen", "size": "B"}, "metrics": 3}
    assert '"size": "B"' in card.text(pipe)
    pipe.class_names = tuple(f"class {i}" for i in range(1000))
    assert "class 19; and 980 more" in card.text(pipe)
    pipe.origin = {"images": "fashion-mnist"}
    assert "- zalando-datasets/fashion_mnist" in card.text(pipe)
    pipe.origin = {"images": "eurosat"}
    assert "- timm/eurosat-rgb" in card.text(pipe)


def test_the_python_of_a_card_runs(
    run: Path, pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", card.text(pipe, str(run)), re.DOTALL)
    assert len(code.strip().splitlines()) == 3
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    with Image.open("image.png") as image:
        expected = pipe.sample(["blue"], seed=0).images[0]
        assert np.array_equal(np.asarray(image), np.asarray(expected))


def test_only_an_edited_card_is_kept(pipe: Pipeline, tmp_path: Path) -> None:
    path = tmp_path / "saved" / "README.md"
    pipe.save_pretrained(path.parent)
    assert card.load_edited(path.parent) is None
    other = dataclasses.replace(pipe, origin={**pipe.origin, "note": "another origin"})
    other.save_pretrained(path.parent)
    assert "another origin" in path.read_text()
    edited = path.read_text().replace("# A pipeline of ctf", "# Mine")
    path.write_text(edited)
    pipe.save_pretrained(path.parent)
    assert path.read_text() == card.load_edited(path.parent) == edited
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match="not text in UTF-8"):
        pipe.save_pretrained(path.parent)


def test_an_unedited_card_of_an_older_version_is_replaced(pipe: Pipeline, tmp_path: Path) -> None:
    """The last line, by which a card is recognised, must never change."""
    path, old = tmp_path / "saved" / "README.md", "# Another text\n"
    pipe.save_pretrained(path.parent)
    digest = hashlib.sha256(old.encode()).hexdigest()
    path.write_text(f"{old}\n<!-- Made by ctf, and kept once it is edited: {digest} -->\n")
    assert card.load_edited(path.parent) is None
    pipe.save_pretrained(path.parent)
    assert "# A pipeline of ctf" in path.read_text()
