"""What reads and writes training data, of the `train` extra; UserError where it is not installed."""

from __future__ import annotations

from dit_jax.config import UserError

try:
    import grain
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
    from grain.sources import ArrayRecordDataSource
except ImportError as missing:
    raise UserError(
        f'training data need {missing.name}, which is not installed: pip install "dit-jax[train]"'
    ) from missing

__all__ = ["ArrayRecordDataSource", "ArrayRecordReader", "ArrayRecordWriter", "grain"]
