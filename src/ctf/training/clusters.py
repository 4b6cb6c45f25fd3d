"""The clusters of a run: fitted, studied and written into its folder."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from ctf.common import claims, storage
from ctf.common.config import to_json
from ctf.common.errors import UserError
from ctf.evaluation.redundancy import SHEET_COLUMNS, redundancy_study, swap_sheet
from ctf.models import clusters as partition
from ctf.models.clusters import Clusters, ClustersConfig, random_like
from ctf.models.tokenizer import VQModel
from ctf.pipelines.folder import CLUSTERS, read_clusters, save_clusters


def fit_clusters(
    folder: Path,
    tokenizer: VQModel,
    codes_BL: Tensor,
    config: ClustersConfig,
    tokenizer_hash: str,
) -> Clusters:
    """Writes clusters.safetensors, report.json and swaps.png into `folder`; loads what is there.

    `codes_BL` are those of held-out pictures, for the report.

    Raises:
        UserError: the folder holds something else, or clusters of another tokenizer or
            configuration; or see `fit_kmeans`.
    """
    path, report_file, sheet_file = folder / CLUSTERS, folder / "report.json", folder / "swaps.png"
    wanted = {"tokenizer": tokenizer_hash, **to_json(config)}
    storage.remove_temporaries(folder)
    if claims.is_ours(folder, CLUSTERS, what="a folder of clusters"):
        clusters, metadata = read_clusters(path)
        if "tokenizer" not in metadata:
            raise UserError(
                f"{folder}: holds the {clusters.count} clusters of a pipeline that was saved or "
                "converted\nput the new ones into another run: --out"
            )
        stored = {"tokenizer": metadata["tokenizer"], **json.loads(metadata["config"])}
        stored = {key: stored.get(key) for key in wanted}
        claims.check_same(folder, stored, wanted, what="a folder of clusters")
    else:
        clusters = partition.fit(tokenizer.codebook(), config)
        metadata = {"tokenizer": tokenizer_hash, "config": json.dumps(to_json(config))}
        save_clusters(clusters, path, metadata)
    control = random_like(clusters, config.seed + 1)
    if not report_file.exists():
        study = redundancy_study(tokenizer, clusters, control, codes_BL, seed=config.seed)
        storage.save_json(report_file, {**wanted, **study})
    if not sheet_file.exists():
        shown = codes_BL[:SHEET_COLUMNS]
        sheet = swap_sheet(tokenizer, clusters, control, shown, seed=config.seed)
        with storage.atomic(sheet_file) as temporary:
            sheet.save(temporary, format="PNG")
    return clusters
