"""Whether streams wait for each other: torch's CUDA sanitizer, which knows what every operator reads and writes."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def ordered() -> Iterator[None]:
    """Raise ``CUDASanitizerErrors`` in the block if streams use the same memory and one does not wait for the other.

    What is captured is passed over: it does not run then.
    """
    from torch.cuda._sanitizer import CUDASanitizer  # imported here: from then on torch reports every call to Python

    torch.cuda.init()
    sanitizer = CUDASanitizer()
    handler = sanitizer.dispatch.event_handler
    launched = handler._handle_kernel_launch
    handler._handle_kernel_launch = lambda *launch: (
        [] if torch.cuda.is_current_stream_capturing() else launched(*launch)
    )
    sanitizer.enable()
    try:
        yield
    finally:
        sanitizer.disable()
