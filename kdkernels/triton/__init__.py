"""Triton: jit code only. Importing this package does not import triton; its modules do."""

from __future__ import annotations


def require() -> None:
    """Raises ImportError, with the remedy, where triton cannot be imported."""
    try:
        import triton  # type: ignore[import-untyped]  # noqa: F401
    except ImportError as error:
        message = f"kdkernels.triton needs triton, which does not import here ({error}); pip install triton, or"
        raise ImportError(f'{message} use backend="cpp" or "eager"') from error
