"""Run by test_hostile_uploads.py: decodes damaged uploads, bounded as uploads.py bounds them, until one misbehaves.

mutated_uploads.py FOLDER COUNT SEED   the folder's files, so many mutants of each; prints how many were pictures
and how many not
"""

import random
import signal
import sys
from pathlib import Path

import av
from PIL import Image

from dit_jax.config import UserError
from infer import uploads

LIMITS = uploads.UploadLimits(pixels=2**20)
SECONDS = 60  # after which a mutant hangs, on a busy machine too


def mutant(data, chance):
    """The data with a few bytes, bits or numbers changed, a piece lost, doubled or moved, or its end missing."""
    data = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 5, 20))):
        place, length = chance.randrange(len(data) or 1), chance.choice((1, 2, 4, 8))
        match chance.randrange(6):
            case 0:
                data[place : place + 1] = bytes(byte ^ 1 << chance.randrange(8) for byte in data[place : place + 1])
            case 1:
                data[place : place + length] = chance.randbytes(length)
            case 2:
                data[place : place + length] = chance.choice((b"\0", b"\xff", b"\x7f")) * length
            case 3:
                del data[place : place + length]
            case 4:
                data[place:place] = data[place : place + 16 * length]
            case 5 if chance.random() < 0.3:
                del data[max(place, 1) :]
    return bytes(data)


def main(folder, count, seed):
    files = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
    Image.MAX_IMAGE_PIXELS = None
    av.logging.set_level(None)
    pictures = refusals = 0
    uploads._confine(uploads.UploadLimits(seconds=3000))
    for number in range(count):
        for name, data in files.items():
            upload = mutant(data, random.Random(f"{seed} {number} {name}"))
            signal.alarm(SECONDS)
            try:
                kind = uploads._kind(upload, LIMITS)
                picture = uploads.decoded(upload, kind, LIMITS)
            except (UserError, MemoryError):
                refusals += 1
            except BaseException as error:
                raise RuntimeError(f"mutant {number} of {name}, seed {seed}") from error
            else:
                assert picture.mode == "RGB" and 0 < picture.width * picture.height <= LIMITS.pixels, (name, number)
                picture.load()
                pictures += 1
    print(pictures, refusals)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
