"""Every error this package raises on purpose. Each message names the quantity, its value and what was expected."""

from __future__ import annotations


class FaninError(Exception):
    """Base of all errors raised on purpose by fanin_compile."""


class MaskError(FaninError, ValueError):
    """A mask or a masked weight that contradicts itself: shape, dtype, values."""


class FormatError(FaninError, ValueError):
    """A condensed weight whose parts do not fit together."""


class OptionError(FaninError, ValueError):
    """An option that does not exist, or a value outside its range."""


class BuildError(FaninError, RuntimeError):
    """The native kernels cannot be built or loaded here; the message names what is missing."""


class RewriteError(FaninError, RuntimeError):
    """A pass broke its contract, or strict=True met a failure that would otherwise fall back."""
