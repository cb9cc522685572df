"""Where data comes from: IDX files, TFDS folders, TFDS's download manager. Everything without TensorFlow.

The full MNIST always ends in two places: a genuine TFDS directory `mnist/3.0.1` (so that other programs can read
it too) and metalr's decoded, memory-mapped cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import io
import logging
import os
import re
import shutil
import socket
import tempfile
import urllib.parse
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from metalr.data import arrays
from metalr.errors import DataError, check_whole, one_line

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

# sha256 of the uncompressed content, magic number and dimensions of the four files of MNIST.
IDX_FILES = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
MNIST_URL = "https://storage.googleapis.com/cvdf-datasets/mnist/"  # TFDS's own source, with TFDS's checksums
MEND = "get the four MNIST files again, then run `metalr data prepare mnist --idx DIR`"


def read_mnist(folder: Path) -> arrays.Dataset:
    """The full MNIST from its four IDX files, gzipped or not.

    Raises:
      DataError: a file is missing, is no gzip (an HTML page, say), is cut short, or has another sha256.
    """
    content = {name: _read_checked(Path(folder), name, sha256) for name, sha256 in IDX_FILES.items()}
    train, test = (
        (_idx_array(content[f"{part}-images-idx3-ubyte"], 3), _idx_array(content[f"{part}-labels-idx1-ubyte"], 1))
        for part in ("train", "t10k")
    )
    return arrays.from_arrays(
        *train, test_images=test[0], test_labels=test[1], name="mnist", source=f"MNIST, IDX files in {folder}"
    )


def holds_idx(folder: Path) -> bool:
    """Whether a folder has images as IDX files, as MNIST and sets made in its likeness come."""
    return any(_IDX_IMAGES.search(file.name) and file.is_file() for file in folder.iterdir())


def read_idx(folder: Path, *, name: str | None = None, min_per_class: int = 0) -> arrays.Dataset:
    """Images that come in MNIST's layout: Fashion-MNIST, KMNIST, EMNIST, one's own. Gzipped or not.

    A folder with a file `…train-images-idx3-ubyte`, one `…train-labels-idx1-ubyte`, and the same two of the test part
    (`t10k` or `test`) or none. Format: http://yann.lecun.com/exdb/mnist, "file formats".

    Args:
      name: what the set is called; default: the folder's name.
      min_per_class: leave out classes with fewer images.

    Raises:
      DataError: a file is missing, there are several of a kind, or one is cut short or no IDX file of bytes.
    """
    parts: dict[str, dict[str, list[Path]]] = {"train": {}, "test": {}}
    unpacked = {file.name for file in folder.iterdir() if file.is_file()}
    for file in sorted(folder.iterdir()):
        if not file.is_file() or (file.suffix == ".gz" and file.stem in unpacked):  # the same file is there unpacked
            continue
        for kind, pattern in (("images", _IDX_IMAGES), ("labels", _IDX_LABELS)):
            if pattern.search(file.name):
                test = re.search(r"(^|[-_.])(t10k|test)[-_.]", file.name) is not None
                parts["test" if test else "train"].setdefault(kind, []).append(file)
    read: dict[str, dict[str, np.ndarray]] = {"train": {}, "test": {}}
    for part, files in parts.items():
        if part == "test" and not files:
            continue
        for kind, dimensions in (("images", 3), ("labels", 1)):
            found = files.get(kind, [])
            if len(found) != 1:
                names = ", ".join(file.name for file in found) or "none"
                wanted = f"one IDX file of the {part} part's {kind} (…-{kind}-idx{dimensions}-ubyte, gzipped or not)"
                raise DataError(f"{folder}: expected {wanted}, got {names}; keep one set in a folder of its own")
            try:
                read[part][kind] = _idx_array(_read_gzip(found[0], "get it again"), dimensions)
            except ValueError as error:
                raise DataError(f"{found[0]}: {error}; get it again") from error
    return arrays.from_arrays(
        read["train"]["images"],
        read["train"]["labels"],
        test_images=read["test"].get("images"),
        test_labels=read["test"].get("labels"),
        min_per_class=min_per_class,
        name=name or folder.resolve().name,
        source=f"IDX files in {folder.resolve().name}/",
    )


_IDX_IMAGES, _IDX_LABELS = (re.compile(rf"{kind}[-.]idx\d-ubyte(\.gz)?$") for kind in ("images", "labels"))


def _idx_array(content: bytes, dimensions: int) -> np.ndarray:
    """The array of an IDX file of unsigned bytes. Raises ValueError with what is wrong."""
    start = bytes([0, 0, 8, dimensions])
    if content[:4] != start:
        wanted = f"an IDX file of bytes in {dimensions} dimensions, which starts with {start!r}"
        raise ValueError(f"expected {wanted}, got {content[:4]!r}")
    if len(content) < 4 + 4 * dimensions:
        raise ValueError(f"expected an IDX file with its {dimensions} sizes, got one cut short")
    shape = tuple(int.from_bytes(content[at : at + 4], "big") for at in range(4, 4 + 4 * dimensions, 4))
    numbers = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
    if len(numbers) != np.prod(shape):
        raise ValueError(f"expected {' x '.join(map(str, shape))} bytes, as it says, got {len(numbers):,}")
    return numbers.reshape(shape)


def _read_checked(folder: Path, name: str, sha256: str) -> bytes:
    candidates = [folder / f"{name}.gz", folder / name, folder / name.replace("-idx", ".idx")]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        raise DataError(f"{candidates[0]}: expected the gzipped IDX file, found none; {MEND}")
    content = _read_gzip(path, MEND)
    got = hashlib.sha256(content).hexdigest()
    if got != sha256:
        raise DataError(f"{path}: expected sha256 {sha256[:16]}… of its content, got {got[:16]}…; {MEND}")
    return content


def _read_gzip(path: Path, mend: str) -> bytes:
    """What a file holds, unpacked if its name ends in .gz."""
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if path.suffix == ".gz" else raw
    except EOFError as error:
        raise DataError(f"{path}: expected a whole gzip file, got one cut short; {mend}") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        kind = "an HTML page" if raw.lstrip()[:1] == b"<" else f"a file that starts with {raw[:8]!r}"
        raise DataError(f"{path}: expected a gzip file, got {kind}; {mend}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {one_line(error)}") from error


def tfds_dir(given: Path | None = None) -> Path:
    """The TFDS data folder: the one given, TFDS_DATA_DIR, or TFDS's default."""
    return Path(given or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def prepare(name: str, *, idx: Path | None = None, data_dir: Path | None = None) -> arrays.Dataset:
    """Bring a dataset into the decoded cache and return it.

    Args:
      name: "mnist", or any TFDS image-classification set that is prepared in the TFDS folder, as in `read_tfds`.
      idx: a folder with MNIST's four IDX files.
      data_dir: the TFDS folder; default TFDS_DATA_DIR, then ~/tensorflow_datasets.

    Raises:
      DataError: nothing to read from, or what is there is damaged. Nothing partial is left behind.
    """
    if name == arrays.BUNDLED:
        return arrays.bundled()
    folder = tfds_dir(data_dir)
    if idx is not None:
        if name != "mnist":
            raise DataError(f"--idx: expected the name mnist with it, got {name!r}")
        write_tfds(read_mnist(idx), folder)
    elif name == "mnist" and not prepared_tfds(folder, name):
        with tempfile.TemporaryDirectory() as downloads:
            write_tfds(read_mnist(download_mnist(Path(downloads))), folder)
    elif not prepared_tfds(folder, name):
        raise DataError(
            f"data {name!r}: expected a prepared TFDS dataset in {folder}, found none; prepare it with TFDS "
            "(file_format='array_record'), or bring arrays with `metalr data import FILE.npz`"
        )
    arrays.write_cache(read_tfds(name, folder))  # always from TFDS: it shuffles, so every source gives the same order
    return arrays.read_cache(name)


def download_mnist(folder: Path, url: str = MNIST_URL) -> Path:
    """MNIST's four files by TFDS's download manager, with its checksums. Returns the folder.

    Raises:
      DataError: the host cannot be reached, or what came has another checksum.
    """
    parts = urllib.parse.urlsplit(url)
    offline = "give the four files with `metalr data prepare mnist --idx DIR`, or use the bundled mnist12k"
    try:  # the download manager itself retries a dead network for minutes
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), timeout=10).close()
    except OSError as error:
        raise DataError(f"{url}: cannot be reached ({one_line(error)}); {offline}") from error
    import tensorflow_datasets as tfds

    known = tfds.core.download.checksums.get_all_url_infos()
    infos = {f"{url}{name}.gz": known[f"{MNIST_URL}{name}.gz"] for name in IDX_FILES}
    manager = tfds.download.DownloadManager(
        download_dir=folder / "downloads", url_infos=infos, force_checksums_validation=True
    )
    try:
        paths = manager.download({name: f"{url}{name}.gz" for name in IDX_FILES})
    except Exception as error:  # TFDS, requests and urllib3 each have their own
        raise DataError(f"{url}: the download failed ({one_line(error)}); {offline}") from error
    for name in IDX_FILES:
        Path(paths[name]).rename(folder / f"{name}.gz")
    return folder


def write_tfds(dataset: arrays.Dataset, folder: Path) -> Path:
    """Write the full MNIST as the TFDS directory `mnist/3.0.1` (array_record), as TFDS's own builder lays it out.

    TFDS's builder needs TensorFlow to encode PNGs, so this one hands over encoded bytes. Returns the directory.
    """
    import tensorflow_datasets as tfds
    from PIL import Image

    target = folder / "mnist" / "3.0.1"
    if target.is_dir():  # read_tfds finds it out if this one is damaged
        return target

    class Mnist(tfds.core.GeneratorBasedBuilder):
        name = "mnist"
        VERSION = tfds.core.Version("3.0.1")
        pkg_dir_path = None

        def _info(self) -> Any:
            features = {
                "image": tfds.features.Image(shape=(28, 28, 1)),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                description="The MNIST database of handwritten digits.",
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
                homepage="http://yann.lecun.com/exdb/mnist/",
                license="CC BY-SA 3.0",
            )

        def _split_generators(self, _: Any) -> Any:
            return {part: self._generate_examples(part) for part in ("train", "test")}

        def _generate_examples(self, part: str) -> Iterator[tuple[int, dict[str, Any]]]:
            images, labels = getattr(dataset, f"{part}_images"), getattr(dataset, f"{part}_labels")
            for index, (image, label) in enumerate(zip(images, labels, strict=True)):
                png = io.BytesIO()
                Image.fromarray(image[..., 0]).save(png, "PNG")
                yield index, {"image": png.getvalue(), "label": int(label)}

    try:
        # Built beside its final place and moved there whole: a kill leaves no half-made dataset.
        folder.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".metalr-", dir=folder))
        try:
            tfds.disable_progress_bar()
            logging.getLogger("absl").setLevel(logging.ERROR)
            with contextlib.redirect_stdout(io.StringIO()):  # it would name the temporary folder
                Mnist(data_dir=part, file_format="array_record").download_and_prepare()
            target.parent.mkdir(parents=True, exist_ok=True)
            (part / "mnist" / "3.0.1").rename(target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise DataError(f"{target}: cannot write the TFDS directory: {one_line(error)}") from error
    return target


# Folders of parts, and not of classes.
PARTS_OF_OTHERS = {"train", "training", "val", "valid", "validation", "test", "testing"}
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


def read_folder(
    folder: Path, *, size: int | None = None, gray: bool = False, min_per_class: int = 0, name: str | None = None
) -> arrays.Dataset:
    """Pictures in folders, a folder a class: FOLDER/CLASS/*.png (or jpg and so on), deeper folders too.

    Args:
      size: resize to size x size pixels (the shorter side to `size`, then the middle of the longer one); None: all
        pictures must have one size already.
      gray: one channel; otherwise three.
      min_per_class: leave out classes with fewer pictures.
      name: what it is called; default: the folder's name.

    Transparent parts become white; of 16 bits, the 8 high ones are kept.

    Raises:
      DataError: no folder, no pictures, folders of parts (train, test) in place of classes, one that cannot be read or
        has 32 bits, or sizes that differ. ConfigError: a size below 1.
    """
    from PIL import ImageOps

    if size is not None:
        check_whole("size", size)
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder with a folder of pictures for each class, found none")
    files = [file for file in _files(folder) if file.suffix.lower() in PICTURES]
    in_class = [file for file in files if len(file.relative_to(folder).parts) > 1]
    if not in_class:
        raise DataError(f"{folder}: expected pictures in a folder for each class, FOLDER/CLASS/*.png, found none")
    top = {file.relative_to(folder).parts[0] for file in in_class}
    if len(top) > 1 and {name.lower() for name in top} <= PARTS_OF_OTHERS:
        raise DataError(
            f"{folder}: expected a folder for each class, got {', '.join(sorted(top))}, which would make several "
            f"classes of one; import one of them, such as {folder / min(top)}, or put each class's pictures together"
        )
    images, labels = [], []
    sizes: dict[tuple[int, int], Path] = {}
    for file in in_class:
        pixels = _pixels(file, "L" if gray else "RGB")
        if size is not None:
            pixels = ImageOps.fit(pixels, (size, size))
        sizes.setdefault(pixels.size, file)
        images.append(np.asarray(pixels))
        labels.append("/".join(file.relative_to(folder).parts[:-1]))
        if len(sizes) > 1:
            (one, first), (other, second) = list(sizes.items())[:2]
            raise DataError(
                f"{folder}: expected pictures of one size, got {one[0]}x{one[1]} ({first.name}) and "
                f"{other[0]}x{other[1]} ({second.name}); pass --size to resize them"
            )
    stacked = np.stack(images)
    return arrays.from_arrays(
        stacked if stacked.ndim == 4 else stacked[..., None],
        np.array(labels),
        min_per_class=min_per_class,
        name=name or folder.resolve().name,
        source=f"pictures in {folder.resolve().name}/",
    )


def _files(folder: Path) -> list[Path]:
    """All files in a folder and those below it, also behind links, sorted. What begins with a dot is left out."""
    found: list[Path] = []
    for place, folders, names in os.walk(folder, followlinks=True):
        inside = Path(place).resolve()
        above = {inside, *inside.parents}  # a link to one of these would go round for ever
        folders[:] = [name for name in folders if name[0] != "." and Path(place, name).resolve() not in above]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(file for file in found if file.is_file())


def _pixels(file: Path, mode: str) -> Picture:
    """A picture as 8-bit gray ("L") or colours ("RGB"); transparent parts are white. Raises DataError."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as picture:
            upright = ImageOps.exif_transpose(picture)
            kind = upright.mode
            if kind.startswith("I;16") or (kind == "I" and picture.format == "PNG"):  # the 8 high bits of 16
                return Image.fromarray((np.asarray(upright).astype(np.uint16) >> 8).astype(np.uint8)).convert(mode)
            if kind not in ("I", "F"):
                if upright.has_transparency_data:
                    with_alpha = upright.convert("RGBA")
                    upright = Image.alpha_composite(Image.new("RGBA", with_alpha.size, "white"), with_alpha)
                return upright.convert(mode)
    except Exception as error:  # Pillow's decoders raise many kinds for damaged files
        raise DataError(f"{file}: cannot be read as a picture: {one_line(error)}") from error
    raise DataError(
        f"{file}: expected a picture of 8 or 16 bits, got one of 32 (Pillow's mode {kind}), whose range nothing says; "
        "scale it to 0..1 and bring it in an .npz (metalr data import FILE.npz)"
    )


def prepared_tfds(folder: Path, name: str) -> dict[str, Path]:
    """The prepared folders that a TFDS name may mean, by their full names, NAME/CONFIG:VERSION."""
    match = arrays.TFDS_NAME.fullmatch(name)
    if match is None:
        raise DataError(f"data.name: expected NAME, NAME/CONFIG, NAME:VERSION or NAME/CONFIG:VERSION, got {name!r}")
    base, config, version = match.groups()
    found = {}
    for file in sorted((folder / base).glob("**/dataset_info.json")):
        *configs, its_version = file.parent.relative_to(folder / base).parts
        its_config = "/".join(configs)
        if config in (None, its_config) and version in (None, its_version):
            found[base + (f"/{its_config}" if its_config else "") + f":{its_version}"] = file.parent
    return found


def read_tfds(name: str, folder: Path) -> arrays.Dataset:
    """Decode a prepared TFDS image-classification set (one image feature, one class label).

    Args:
      name: NAME, NAME/CONFIG, NAME:VERSION or NAME/CONFIG:VERSION. `source` says what was read.

    Raises:
      DataError: it is not prepared, several are and none is named, it is stored as tfrecord, has other features, or its
        images vary in size.
    """
    import tensorflow_datasets as tfds

    prepared = prepared_tfds(folder, name)
    if not prepared:
        have = ", ".join(prepared_tfds(folder, name.partition("/")[0].partition(":")[0])) or "none"
        raise DataError(f"{folder}: expected the prepared TFDS dataset {name}, have {have}")
    if len(prepared) > 1:
        raise DataError(f"data {name!r}: expected one prepared TFDS dataset, found {', '.join(prepared)}; name one")
    ((full_name, place),) = prepared.items()
    try:
        builder = tfds.builder_from_directory(place)
        splits = list(builder.info.splits)
        image_key, label_key = builder.info.supervised_keys or ("image", "label")
        features = dict(builder.info.features.items())
        file_format = str(getattr(builder.info.file_format, "value", builder.info.file_format))
    except Exception as error:  # TFDS raises many kinds for a folder that is damaged
        raise DataError(
            f"{place}: expected a whole TFDS dataset; its description cannot be read: {one_line(error)[:300]}; if it "
            "is "
            "damaged, delete it and prepare it again"
        ) from error
    if not isinstance(features.get(image_key), tfds.features.Image):
        raise DataError(f"{name}: expected an image feature {image_key!r}, got {features.get(image_key)}")
    if not isinstance(features.get(label_key), tfds.features.ClassLabel):
        raise DataError(f"{name}: expected a class label {label_key!r}, got {features.get(label_key)}")
    if "train" not in splits:
        raise DataError(f"{name}: expected a split `train`, got {splits}")
    if file_format != "array_record":
        raise DataError(
            f"{place}: expected file_format array_record, which can be read without TensorFlow, got {file_format}; "
            "prepare "
            "it again with file_format='array_record'"
        )
    parts = {}
    for split in ("train", "test") if "test" in splits else ("train",):
        try:
            records = builder.as_data_source(split=split)
            images = [records[i] for i in range(len(records))]
        except Exception as error:  # array_record and the decoders raise many kinds for damaged records
            raise DataError(
                f"{place}: the records of {split!r} cannot be read: {one_line(error)[:300]}; if they are damaged, "
                "delete the "
                "folder and prepare it again"
            ) from error
        shapes = sorted({r[image_key].shape for r in images})
        if len(shapes) > 1:
            raise DataError(
                f"{name}: expected images of one size, got {len(shapes)} sizes in {split!r}, from {shapes[0]} to "
                f"{shapes[-1]}; resize them, and bring them as arrays with `metalr data import FILE.npz`"
            )
        numbers = np.array([r[label_key] for r in images], np.int64)
        names = np.array(features[label_key].names)
        # Names only where they say more than the numbers, whose order they would change.
        plain = names.tolist() == [str(i) for i in range(len(names))]
        parts[split] = np.stack([r[image_key] for r in images]), numbers, None if plain else names
    test = parts.get("test", (None, None, None))
    dataset = arrays.from_arrays(
        *parts["train"][:2],
        test_images=test[0],
        test_labels=test[1],
        name=arrays.cached_path(name).name,
        source=f"TFDS {full_name}",
    )
    return _named(dataset, parts["train"][2])


def _named(dataset: arrays.Dataset, names: np.ndarray | None) -> arrays.Dataset:
    """The dataset with TFDS's names of its classes in place of TFDS's numbers."""
    if names is None:
        return dataset
    numbers = dataset.class_names or tuple(map(str, range(dataset.classes)))
    return dataclasses.replace(dataset, class_names=tuple(str(names[int(number)]) for number in numbers))
