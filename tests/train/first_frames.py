"""demo-wan as a model that makes videos of text and of first frames."""

import json
import shutil
from pathlib import Path

from convert.checkpoint import INDEX, open_checkpoint


def text_or_image(out: Path) -> str:
    """Its folder."""
    shutil.copytree(open_checkpoint("demo-wan").place, out)
    settings = json.loads((out / INDEX).read_text())
    (out / INDEX).write_text(json.dumps(settings | {"expand_timesteps": True}))
    return str(out)
