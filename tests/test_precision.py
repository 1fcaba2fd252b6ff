"""Precision of a forward pass and of the loss."""

import pytest
import torch

from utils.option_types import PRECISIONS
from utils.precision import autocast, matmul_precision, new_scaler

CPU = torch.device("cpu")


def tf32_flags():
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("precision", PRECISIONS)
def test_tf32_is_allowed_for_tf32_only_and_restored_after_an_error(precision):
    before = tf32_flags()
    with pytest.raises(KeyError), matmul_precision(precision):
        assert tf32_flags() == ((True, True) if precision == "tf32" else (False, False))
        raise KeyError
    assert tf32_flags() == before


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_autocast_dtype(precision, dtype):
    matrix = torch.eye(3)
    with autocast(precision, CPU):
        assert (matrix @ matrix).dtype == dtype
    assert (matrix @ matrix).dtype == torch.float32


@pytest.mark.parametrize("precision", PRECISIONS)
def test_only_fp16_scales_the_loss(precision):
    loss = torch.tensor(3.0)
    scaled = new_scaler(precision, CPU).scale(loss)
    assert (scaled > loss) == (precision == "fp16")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("precision", "strict"), [("fp32", True), ("bf16", True), ("tf32", False)])
def test_cuda_convolutions_use_tf32_only_if_allowed(precision, strict):
    torch.manual_seed(0)
    image, kernel = torch.randn(8, 64, 32, 32), torch.randn(64, 64, 3, 3)
    exact = torch.nn.functional.conv2d(image.double(), kernel.double())
    with matmul_precision(precision):
        error = (torch.nn.functional.conv2d(image.cuda(), kernel.cuda()).cpu() - exact).abs().max() / exact.abs().max()
    assert (error < 2e-5) == strict
