"""What people run: pipelines, generation, evaluation."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from infer.loading import load_pipeline

__all__ = ["load_pipeline"]


def __getattr__(name: str):
    if name == "load_pipeline":
        from infer.loading import load_pipeline

        return load_pipeline
    raise AttributeError(f"module 'infer' has no attribute {name!r}")
