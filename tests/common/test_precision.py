"""Precision of products."""

import torch

from ctf.common.precision import without_tf32


def test_without_tf32_on_a_gpu_alone_and_only_within() -> None:
    places = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [place.allow_tf32 for place in places]
    assert before == [True, False]  # PyTorch's own
    with without_tf32(torch.device("cuda")):
        assert [place.allow_tf32 for place in places] == [False, False]
    assert [place.allow_tf32 for place in places] == before
    with without_tf32(torch.device("cpu")):
        assert [place.allow_tf32 for place in places] == before
