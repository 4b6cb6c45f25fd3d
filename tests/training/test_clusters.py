"""The clusters stage: what it writes into its folder, and which folders it refuses."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from ctf.common.errors import UserError
from ctf.models import clusters
from ctf.models.clusters import Clusters, ClustersConfig
from ctf.models.tokenizer import TokenizerConfig, VQModel
from ctf.pipelines.folder import CLUSTERS, save_clusters
from ctf.training.clusters import fit_clusters

CONFIG = TokenizerConfig(
    image_size=8, codebook_size=64, channels=8, multipliers=(1, 2), blocks=1, latent_channels=8,
    groups=4,
)  # fmt: skip
KMEANS = ClustersConfig(count=8, restarts=2)


@pytest.fixture(scope="module")
def tokenizer() -> VQModel:
    torch.manual_seed(0)
    return VQModel(CONFIG)


@pytest.fixture(scope="module")
def codes_BL() -> Tensor:
    return torch.randint(64, (12, 16), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", ["kmeans", "identity", "random"])
def test_stage_writes_three_files_and_loads_them_again(
    tmp_path: Path, tokenizer: VQModel, codes_BL: Tensor, method: Any
) -> None:
    config = dataclasses.replace(KMEANS, method=method)
    fitted = fit_clusters(tmp_path / "new", tokenizer, codes_BL, config, "abc")
    files = {p.name: p.read_bytes() for p in (tmp_path / "new").iterdir()}
    assert set(files) == {"clusters.safetensors", "report.json", "swaps.png"}
    study = json.loads(files["report.json"])
    assert (study["method"], study["tokenizer"], study["clusters"]) == (method, "abc", fitted.count)
    assert Image.open(tmp_path / "new" / "swaps.png").width == 4 + 10 * 68
    # Again: loads. After a kill between the files: the same bytes.
    (tmp_path / "new" / "report.json").unlink()
    (tmp_path / "new" / "swaps.png").unlink()
    again = fit_clusters(tmp_path / "new", tokenizer, codes_BL, config, "abc")
    assert torch.equal(again.labels_V, fitted.labels_V)
    assert {p.name: p.read_bytes() for p in (tmp_path / "new").iterdir()} == files


def test_finished_stage_is_loaded(tmp_path: Path, tokenizer: VQModel, codes_BL: Tensor) -> None:
    # Clusters that no k-means would find: they are loaded, not fitted again.
    fitted = Clusters.from_labels(torch.arange(64) % 8)
    config = json.dumps(dataclasses.asdict(KMEANS))
    save_clusters(fitted, tmp_path / CLUSTERS, {"tokenizer": "abc", "config": config})
    loaded = fit_clusters(tmp_path, tokenizer, codes_BL, KMEANS, "abc")
    assert torch.equal(loaded.labels_V, fitted.labels_V)


def test_other_folders_are_refused(tmp_path: Path, tokenizer: VQModel, codes_BL: Tensor) -> None:
    def fit(config: ClustersConfig = KMEANS, tokenizer_hash: str = "abc") -> Clusters:
        return fit_clusters(tmp_path, tokenizer, codes_BL, config, tokenizer_hash)

    (tmp_path / "report.json").write_text("mine")
    with pytest.raises(UserError, match=r"is not a folder of clusters \(no clusters.safetensors\)"):
        fit()
    assert (tmp_path / "report.json").read_text() == "mine"
    (tmp_path / "report.json").unlink()
    fit()
    with pytest.raises(UserError, match='tokenizer was "abc", now "def"'):
        fit(tokenizer_hash="def")
    with pytest.raises(UserError, match="count was 8, now 9"):
        fit(dataclasses.replace(KMEANS, count=9))
    save_clusters(clusters.identity(64), tmp_path / CLUSTERS)
    with pytest.raises(UserError, match="of a saved or converted pipeline"):
        fit()
