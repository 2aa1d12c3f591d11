"""The releases of transformers whose behaviour the tests pin; importing this refuses all others."""

from __future__ import annotations

from ...core.shapes import refuse

OLDEST, NEWEST = "5.4", "6"  # supported: OLDEST <= release < NEWEST

try:
    import transformers  # noqa: F401
    from packaging.version import Version
except ImportError as error:
    text = f"streamkernels needs transformers >= {OLDEST}, < {NEWEST} for this: pip install 'streamkernels[hf]'"
    raise ImportError(text) from error


def check_release(op: str) -> None:
    """Refuse a transformers release outside the range: NotImplementedError."""
    # the module of now: transformers puts a second one in its place when its processors are first imported
    import transformers

    if not Version(OLDEST) <= Version(transformers.__version__) < Version(NEWEST):
        expected = f"a release >= {OLDEST} and < {NEWEST}, the range that is tested"
        refuse(op, "transformers", expected, transformers.__version__, NotImplementedError)


check_release("streamkernels.integrations.transformers")
