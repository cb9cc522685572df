"""`metalr data`: list, prepare, import and remove datasets."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro

from metalr.errors import ConfigError, DataError

Json = Annotated[bool, tyro.conf.arg(name="json")]
ABOUT = "Datasets: list, prepare, import, remove."


def list_datasets(json_: Json = False) -> None:
    """List the datasets that are ready to use, and what they take on the disk.

    They stand in METALR_CACHE_DIR, by default ~/.cache/metalr.

    Args:
      json_: print JSON.
    """
    from metalr import data

    rows = []
    for name in data.names():
        try:
            rows.append(data.load(name))
        except DataError as error:
            print(f"metalr: {name} is left out: {error}", file=sys.stderr)
    if json_:
        print(
            json.dumps(
                [
                    {"name": d.name, "classes": d.classes, "source": d.source, "sha256": d.sha256}
                    | {"bytes": data.stored_bytes(d.name)}
                    for d in rows
                ]
            )
        )
        return
    for dataset in rows:
        size = data.stored_bytes(dataset.name)
        print(f"{dataset}{f', {size / 2**20:.1f} MiB' if size else ''}")


def remove(name: tyro.conf.Positional[str]) -> None:
    """Remove a prepared or imported dataset from the cache.

    Args:
      name: as `metalr data list` shows it.
    """
    from metalr import data

    print(f"removed {data.remove(name)}")


def prepare(name: tyro.conf.Positional[str], idx: Path | None = None, data_dir: Path | None = None) -> None:
    """Bring a dataset into metalr's cache: the full MNIST, or any prepared TFDS image-classification set.

    Args:
      name: mnist, or the name of a TFDS dataset that is prepared in the TFDS folder: NAME, NAME/CONFIG or
        NAME/CONFIG:VERSION.
      idx: folder with MNIST's four IDX files (gzipped or not); checked by sha256.
      data_dir: TFDS folder; default TFDS_DATA_DIR, then ~/tensorflow_datasets.
    """
    from metalr.data import sources

    print(sources.prepare(name, idx=idx, data_dir=data_dir))


def import_images(
    source: tyro.conf.Positional[Path],
    name: str | None = None,
    min_per_class: int = 0,
    size: int | None = None,
    gray: bool = False,
    overwrite: bool = False,
) -> None:
    """Check your own images and labels, and keep them under a name.

    Args:
      source: a folder of pictures with a folder for each class; or a folder of IDX files, as Fashion-MNIST comes; or an
        .npz with images and labels, numbers or names (and optionally test_images, test_labels, class_split), or with
        images [classes, n, height, width] alone.
      name: what --data calls it; default: the name of the file or folder.
      min_per_class: leave out classes with fewer images.
      size: pictures: resize to that many pixels, square.
      gray: pictures: one channel in place of three.
      overwrite: replace other data of that name. Runs that were begun with those cannot go on then.
    """
    from metalr import data
    from metalr.data import sources

    called = name or (source.resolve().name if source.is_dir() else source.stem)
    data.cached_path(called, "--name")
    if called in (data.BUNDLED, "mnist"):
        raise ConfigError(f"--name: expected another name than {data.BUNDLED} and mnist, got {called!r}")
    if source.is_dir() and not sources.holds_idx(source):
        dataset = sources.read_folder(source, size=size, gray=gray, min_per_class=min_per_class, name=called)
    elif size is not None or gray:
        raise ConfigError(f"size, gray: expected a folder of pictures with them, got {source}")
    elif source.is_dir():
        dataset = sources.read_idx(source, min_per_class=min_per_class, name=called)
    else:
        dataset = data.from_npz(source, called, min_per_class=min_per_class)
    data.write_cache(dataset, overwrite=overwrite)
    print(dataset)


COMMANDS: dict[str, Callable[..., None]] = {
    "list": list_datasets,
    "prepare": prepare,
    "import": import_images,
    "remove": remove,
}
