"""The tokenizer of a LlamaGen checkpoint: its shape, and its tensors by our names."""

from __future__ import annotations

from collections.abc import Iterable

from ctf.common.errors import UserError
from ctf.common.weights import init_empty_weights
from ctf.models.tokenizer import TokenizerConfig, VQModel
from ctf.pipelines.llamagen.checkpoint import CODEBOOK, Checkpoint, assign_weights

GROUPS = 32

VQ_NAMES = {
    "to_code": "quant_conv", "from_code": "post_quant_conv", "embedding": "quantize.embedding",
    "input": "conv_in", "norm": "norm_out", "output": "conv_out",
}  # fmt: skip
VQ_BLOCK_NAMES = {
    "skip": "nin_shortcut", "query": "q", "key": "k", "value": "v", "output": "proj_out",
}  # fmt: skip


def vq_name(name: str, shape: TokenizerConfig) -> str:
    """Return LlamaGen's name for a tensor of the tokenizer."""
    path, _, kind = name.rpartition(".")
    coder, *inner = path.split(".")
    if not inner:
        return f"{VQ_NAMES[coder]}.{kind}"
    if len(inner) == 1:
        return f"{coder}.{VQ_NAMES[inner[0]]}.{kind}"
    stack, number, part = inner
    block = f"mid.{number}" if stack == "middle" else _block_names(coder, shape)[int(number)]
    return f"{coder}.{block}.{VQ_BLOCK_NAMES.get(part, part)}.{kind}"


def _block_names(coder: str, shape: TokenizerConfig) -> list[str]:
    """Return LlamaGen's names for the modules of our `levels`.

    LlamaGen has two lists for each level, of residual and of attention blocks, and a resampling.
    """
    is_encoder = coder == "encoder"
    blocks = shape.blocks if is_encoder else shape.decoder_blocks or shape.blocks + 1
    last = len(shape.multipliers) - 1
    names = []
    for level in range(last + 1):  # from that of the lowest resolution in the decoder
        for block in range(blocks):
            names.append(f"conv_blocks.{level}.res.{block}")
            if shape.has_attention(level if is_encoder else last - level):
                names.append(f"conv_blocks.{level}.attn.{block}")
        if level < last:
            names.append(f"conv_blocks.{level}.{'downsample' if is_encoder else 'upsample'}")
    return names


def tokenizer_shape(
    vq: Checkpoint, groups: int | None = None, codebook_norm: str | None = None
) -> TokenizerConfig:
    """Return the shape of a tokenizer, for images of one code.

    Args:
        vq: Its checkpoint.
        groups: Of group normalization; by default LlamaGen's.
        codebook_norm: "l2" or "none"; by default as in the arguments of the training, else "l2".
            The tensors do not tell: lengths of code vectors change in training with both.

    Raises:
        UserError: It is none of LlamaGen's tokenizers.
    """
    vq.check_kind("tokenizer")
    if batch := [name for name in vq.weights if name.endswith("running_mean")]:
        raise UserError(
            f"{vq.path}: got batch normalization ({batch[0]!r}), expected group normalization"
        )
    channels = vq.shape("encoder.conv_in.weight", 4)[0]
    groups = GROUPS if groups is None else groups
    if groups < 1 or channels % groups:
        raise UserError(
            f"{vq.path}: got {channels} channels in {groups} groups, expected a multiple; "
            "choose --groups as in its training"
        )
    levels = max(vq.count("encoder.conv_blocks."), 1)
    if codebook_norm is None:
        codebook_norm = "l2" if vq.training_args.get("codebook_l2_norm", True) else "none"
    encoder = _multipliers(vq, channels, "encoder", range(levels))
    decoder = _multipliers(vq, channels, "decoder", reversed(range(levels)))
    attention = tuple(
        level
        for level in range(levels)
        if f"encoder.conv_blocks.{level}.attn.0.q.weight" in vq.weights
    )
    blocks = vq.count("encoder.conv_blocks.0.res.")
    decoder_blocks = vq.count("decoder.conv_blocks.0.res.")
    codebook_size, code_dim = vq.shape(CODEBOOK, 2)
    return TokenizerConfig(
        image_size=2 ** (levels - 1),
        codebook_size=codebook_size,
        code_dim=code_dim,
        channels=channels,
        multipliers=encoder,
        blocks=blocks,
        latent_channels=vq.shape("encoder.conv_out.weight", 4)[0],
        groups=groups,
        decoder_multipliers=None if decoder == encoder else decoder,
        decoder_blocks=None if decoder_blocks == blocks + 1 else decoder_blocks,
        attention=None if attention == (levels - 1,) else attention,
        middle_attention="encoder.mid.1.q.weight" in vq.weights,
        l2_norm=codebook_norm == "l2",
    )


def _multipliers(
    vq: Checkpoint, channels: int, coder: str, levels: Iterable[int]
) -> tuple[int, ...]:
    """Return the multiples of `channels` that the levels have."""
    names = [f"{coder}.conv_blocks.{level}.res.0.conv2.weight" for level in levels]
    for name in names:
        if (width := vq.shape(name, 4)[0]) % channels:
            raise UserError(
                f"{vq.path}: tensor {name!r} has {width} channels, expected a multiple of "
                f"{channels}, the channels of 'encoder.conv_in.weight'"
            )
    return tuple(vq.shape(name, 4)[0] // channels for name in names)


def load_tokenizer(vq: Checkpoint, shape: TokenizerConfig) -> VQModel:
    """Return the tokenizer of a checkpoint, in the precision of the file."""
    with init_empty_weights():
        model = VQModel(shape)
    names = {name: vq_name(name, shape) for name in model.state_dict()}
    if "encoder.mid.1.conv1.weight" in vq.weights:  # no attention between the residual blocks
        names = {ours: name.replace(".mid.2.", ".mid.1.") for ours, name in names.items()}
    assign_weights(model, names, vq)
    return model
