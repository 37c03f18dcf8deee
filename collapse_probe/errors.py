"""Every exception that collapse_probe raises on purpose, and the exit code the shell sees for each.

CollapseProbeError                    1   also a ValueError or RuntimeError where that helps callers
├── UsageError                        2   an argument or an option is wrong
├── ModelError                        3   the model source was rejected
│   ├── UnknownModelError                 no such architecture
│   ├── UnsafeFileError                   the file would need unpickling of foreign objects
│   ├── DamagedFileError                  the file is truncated, empty or not what it claims to be
│   ├── WeightsMismatchError              keys or shapes do not fit the architecture
│   ├── WeightsUnavailableError           the name is known, its weights are not at hand
│   └── CaptureError                      the model ran and no attention map could be captured
├── ImagesError                       4   no images, too few, or too many unreadable ones
│   └── ImageFileError                    one file is no picture that can be read
├── OutputError                       5   results cannot be written
├── ResourceError                     6   out of memory even with one image at a time
└── ConditionError                    7   a condition that the caller set failed
"""

from __future__ import annotations


class CollapseProbeError(Exception):
    """Base of the tree. The message is one or two sentences: what is wrong, with what, and what to do."""

    exit_code = 1


class UsageError(CollapseProbeError, ValueError):
    """An argument is out of range, or two arguments contradict each other."""

    exit_code = 2


class ModelError(CollapseProbeError):
    """The model source was rejected."""

    exit_code = 3


class UnknownModelError(ModelError):
    """The architecture's name is not known to timm nor to the bundled models."""


class UnsafeFileError(ModelError):
    """Reading the file would mean unpickling arbitrary objects."""


class DamagedFileError(ModelError):
    """The file is empty, truncated, or not a checkpoint at all."""


class WeightsMismatchError(ModelError):
    """The weights do not fit the architecture."""


class WeightsUnavailableError(ModelError):
    """A name is known but its pretrained weights are neither cached nor downloadable."""


class CaptureError(ModelError, RuntimeError):
    """The model ran, and no attention map could be captured from it."""


class ImagesError(CollapseProbeError):
    """The image source is empty, too small, or too damaged."""

    exit_code = 4


class ImageFileError(ImagesError):
    """One file is no picture that can be read. The message is the reason alone, without the path."""


class OutputError(CollapseProbeError):
    """Results cannot be written where they were asked for."""

    exit_code = 5


class ResourceError(CollapseProbeError):
    """Memory ran out even at the smallest batch."""

    exit_code = 6


class ConditionError(CollapseProbeError):
    """A condition set by the caller, such as `--fail-on attention-collapse`, failed."""

    exit_code = 7


#: How PyTorch's allocators say it where they raise nothing but a RuntimeError: on CPUs (Linux, Windows), CUDA, MPS.
_OUT_OF_MEMORY = (
    "can't allocate memory", "not enough memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED",
    "MPS backend out of memory", "HIP out of memory",
)  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, NumPy or PyTorch means that memory ran out; torch need not be there to tell."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError" or any(words in str(error) for words in _OUT_OF_MEMORY)
    )
