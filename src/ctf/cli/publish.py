"""Commands that serve pipelines, push them to the Hub, and convert those of other projects."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ctf.cli import options
from ctf.cli.common import command, open_device, open_progress, show
from ctf.common.errors import UserError


@command("studio")
def studio(
    models: Annotated[tuple[str, ...], Positional, arg(metavar="MODEL ...", help_behavior_hint="")],
    /,
    *,
    port: int = 7860,
    host: str = "127.0.0.1",
    token: options.Maybe[str] = None,
    allowed_hosts: Annotated[tuple[str, ...], arg(metavar="NAME ...", help_behavior_hint="")] = (),
    root_path: str = "",
    embed_in: Annotated[tuple[str, ...], arg(metavar="ORIGIN ...", help_behavior_hint="")] = (),
    engine: Literal["auto", "eager"] = "auto",
    window: options.Window = "auto",
    device: options.Device = "auto",
) -> None:
    """Open a web page that shows images while they are generated, with an HTTP API.

    Example: ctf studio fashion-mnist --port 7860

    Args:
        models: one or several to compare: fashion-mnist, eurosat, folders of runs or pipelines, or
            org/name[@revision] on the Hugging Face Hub
        port: port to listen on; 0 is any free one
        host: address to listen on; by default, only this machine can connect
        token: secret that requests to the API must contain; by default $CTF_STUDIO_TOKEN, if set
        allowed_hosts: names under which the studio is reached behind a proxy, e.g.
            studio.example.org; *.example.org is any subdomain, '*' any name
        root_path: path that a proxy puts before all others without removing it, e.g. /ctf
        embed_in: origins of web pages that may show the studio in a frame, e.g.
            https://huggingface.co
        engine: auto is the fastest, equal up to rounding; eager uses plain PyTorch operators
    """
    from ctf.pipelines.arguments import check_window

    try:
        from ctf.studio import guard, server
        from ctf.studio.tasks import Limits
    except ImportError:
        raise UserError("the studio is not installed: pip install 'ctf[studio]'") from None

    for origin in embed_in:
        if not re.fullmatch(r"https?://[\w.:*-]+", origin):
            raise UserError(f"--embed-in {origin}: expected an origin, e.g. https://huggingface.co")
    if root_path and not re.fullmatch(r"(/[^/?#]+)+/?", root_path):
        raise UserError(f"--root-path {root_path}: expected a path, e.g. /ctf")
    allowed = [guard.allowed_host(name) for name in allowed_hosts]
    if not models:
        raise UserError("got no model, expected e.g. ctf studio fashion-mnist")
    token = token or os.environ.get("CTF_STUDIO_TOKEN") or None
    limits, is_local, torch_device = Limits(), host in guard.LOOPBACK, open_device(device)
    listening = server.listen(host, port)
    any_host = "*" in allowed or not (allowed or is_local)
    workers = server.start_workers(models, torch_device, engine, limits, check_window(window))
    app = server.create_app(
        workers,
        limits,
        hosts=None if any_host else {*guard.LOOPBACK, host, *allowed},
        token=token,
        embedders=embed_in,
        root_path=root_path,
    )
    running = server.create_server(app)
    with running.capture_signals():
        address = f"[{host}]" if ":" in host else host
        show(f"{', '.join(models)}: http://{address}:{listening.getsockname()[1]}")
        if not is_local and token is None:
            show("anyone who can reach this address can generate images; --token restricts access")
        server.serve(running, workers, listening)


@command("push")
def push(
    model: options.Model,
    /,
    *,
    to: str,
    license: options.Maybe[str] = None,
    private: bool = False,
    half: bool = False,
    sheet: Annotated[bool, arg(name="picture", aliases=("--sheet",))] = True,
    evaluation: options.Maybe[Path] = None,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
) -> None:
    """Push a pipeline to the Hugging Face Hub, with a model card.

    Example: ctf push run --to me/discs --license apache-2.0

    Args:
        to: org/name or org/name@branch; created if it does not exist
        license: identifier of the license of the weights, as on the Hub; by default the pipeline's
        private: make the repository private if it is created
        half: store the weights in half precision
        sheet: sample a contact sheet for the model card
        evaluation: report.json of an evaluation, or its folder, whose scores the model card shows;
            by default the newest of this pipeline in evaluations/, if there is one
    """
    from ctf.pipelines import card, hub
    from ctf.pipelines.folder import find_pipeline, hash_pipeline
    from ctf.pipelines.pipeline import Pipeline

    folder = find_pipeline(model)
    pipe = Pipeline.from_pretrained(folder, open_device(device))
    edited = card.load_edited(folder)
    sheet = sheet and (edited is None or card.IMAGE in edited)
    section = _evaluation_section(evaluation, model, hash_pipeline(folder), edited is not None)
    if dry_run:
        files = "a new README.md" if edited is None else f"{folder / card.FILE}"
        files += f" and {card.IMAGE}" if sheet else ""
        show(f"would push the pipeline, {files} to {hub.target(to)}")
        return
    address = pipe.push_to_hub(
        to,
        half=half,
        license=license,
        image=sheet,
        card=edited,
        evaluation=section,
        private=private or None,
        progress=open_progress,
    )
    show(address)


def _evaluation_section(
    path: Path | None, model: str, pipeline_hash: str, edited: bool
) -> str | None:
    """Return what a new model card says about an evaluation of the pipeline, if there is one."""
    from ctf.evaluation import report

    if edited:
        if path is not None:
            raise UserError(
                f"--evaluation {path}: the model card was edited, and is pushed as it is"
            )
        return None
    path = path or report.find(pipeline_hash)
    if path is None:
        return None
    result = report.load(path)
    if result.subject.hash != pipeline_hash:
        raise UserError(f"--evaluation {path}: of {result.subject.name}, not of {model} as it is")
    show(f"the model card has the scores of {path}")
    return report.card_section(result)


@command("convert llamagen")
def convert_llamagen(
    *,
    vq: Path,
    gpt: options.Maybe[Path] = None,
    out: Path,
    size: options.Maybe[options.LlamaGenSize] = None,
    image_size: options.Maybe[int] = None,
    grid: options.Maybe[int] = None,
    heads: options.Maybe[int] = None,
    groups: options.Maybe[int] = None,
    codebook_norm: options.Maybe[Literal["l2", "none"]] = None,
    vq_weights: options.Maybe[options.LlamaGenWeights] = None,
    gpt_weights: options.Maybe[options.LlamaGenWeights] = None,
    dry_run: options.DryRun = False,
) -> None:
    """Convert LlamaGen weights, released or your own, to a full-vocabulary pipeline.

    Example: ctf convert llamagen --vq vq_ds16_c2i.pt --gpt c2i_B_256.pt --out llamagen-B

    Files may be .pt or .safetensors, of any size; --dry-run shows what was understood.

    Args:
        vq: file of the tokenizer
        gpt: file of a class-conditional transformer; without it, only the tokenizer is converted,
            for runs on images of your own
        out: folder of the pipeline
        size: check that the transformer is of this released size
        image_size: side in pixels of the images that the transformer was trained on; by default
            inferred from its file, else 256 for the released sizes
        grid: codes per side of these images, instead of --image-size
        heads: heads of the transformer; by default inferred from its file, else as in the released
            sizes, else width / 64
        groups: groups of the tokenizer's normalization; by default 32, as in LlamaGen
        codebook_norm: l2 looks codes up by cosine, none by distance; by default as in the
            arguments of the training, else l2
        vq_weights: which weights of the tokenizer's file, e.g. ema; by default model
        gpt_weights: which weights of the transformer's file, e.g. ema; by default model
    """
    from ctf.pipelines import llamagen

    show(
        llamagen.convert(
            vq, gpt, out, size=size, image_size=image_size, grid=grid, heads=heads, groups=groups,
            codebook_norm=codebook_norm, vq_weights=vq_weights, gpt_weights=gpt_weights,
            dry_run=dry_run,
        )
    )  # fmt: skip
