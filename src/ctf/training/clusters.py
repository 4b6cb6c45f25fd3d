"""The clusters of a run: fitted to the tokenizer's codebook, studied, and written to its folder."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from ctf.common import claims, storage
from ctf.common.config import to_json
from ctf.common.errors import UserError
from ctf.evaluation.redundancy import SHEET_COLUMNS, redundancy_study, swap_sheet
from ctf.models import clusters as clustering
from ctf.models.clusters import Clusters, ClustersConfig
from ctf.models.tokenizer import VQModel
from ctf.pipelines.folder import CLUSTERS, read_clusters, save_clusters

WHAT = "a folder of clusters"


def fit_clusters(
    folder: Path,
    tokenizer: VQModel,
    codes_BL: Tensor,
    config: ClustersConfig,
    tokenizer_hash: str,
    taken_over: Clusters | None = None,
) -> Clusters:
    """Write clusters.safetensors, report.json and swaps.png, those that `folder` doesn't have yet.

    Args:
        folder: Of the clusters alone.
        tokenizer: Whose codes are clustered.
        codes_BL: Codes of held-out images, for the redundancy study.
        config: How to cluster; only its seed is used if clusters are taken over.
        tokenizer_hash: SHA-256 of the tokenizer's weights.
        taken_over: Clusters of the pipeline that the run starts from, instead of new ones.

    Raises:
        UserError: The folder holds something else, or clusters of another tokenizer or
            configuration; or see `models.clusters.fit`.
    """
    with claims.hold(folder, CLUSTERS, what=WHAT):
        path, report, sheet = folder / CLUSTERS, folder / "report.json", folder / "swaps.png"
        made = to_json(config)
        if taken_over is not None:
            made = {"taken_over": clustering.fingerprint(taken_over), "count": taken_over.count}
        description = {"tokenizer": tokenizer_hash, **made}
        storage.remove_temporaries(folder)
        if path.is_file():
            clusters, metadata = read_clusters(path)
            if "tokenizer" not in metadata:
                raise UserError(
                    f"{folder} has the {clusters.count} clusters of a saved or converted pipeline\n"
                    "put the new ones into another run: --out"
                )
            stored = {"tokenizer": metadata["tokenizer"], **json.loads(metadata["config"])}
            expected = {"taken_over": None, **description}
            stored = {key: stored.get(key) for key in expected}
            claims.check_same(folder, stored, expected, what=WHAT)
        else:
            clusters = taken_over or clustering.fit(tokenizer.codebook(), config)
            metadata = {"tokenizer": tokenizer_hash, "config": json.dumps(made)}
            save_clusters(clusters, path, metadata)
        control = clustering.random_like(clusters, config.seed + 1)
        if not report.exists():
            study = redundancy_study(tokenizer, clusters, control, codes_BL, seed=config.seed)
            storage.save_json(report, {**description, **study})
        if not sheet.exists():
            shown_BL = codes_BL[:SHEET_COLUMNS]
            image = swap_sheet(tokenizer, clusters, control, shown_BL, seed=config.seed)
            storage.save_png(sheet, image)
        return clusters
