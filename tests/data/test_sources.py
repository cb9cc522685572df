"""IDX files, TFDS folders, downloads; all offline, on made files (and the real ones, if METALR_MNIST_IDX is set)."""

import functools
import gzip
import hashlib
import http.server
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from metalr import data
from metalr.data import sources
from metalr.errors import ConfigError, DataError

REAL = os.environ.get("METALR_MNIST_IDX")


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def idx_dir(tmp_path, monkeypatch):
    """Four small IDX files, with their own hashes in place of MNIST's."""
    folder = tmp_path / "idx"
    folder.mkdir()
    rng = np.random.default_rng(0)
    hashes = {}
    for part, count in (("train", 40), ("t10k", 20)):
        for kind, array in (
            ("images-idx3", rng.integers(0, 256, (count, 28, 28))),
            ("labels-idx1", np.arange(count) % 10),
        ):
            content = idx_bytes(array)
            name = f"{part}-{kind}-ubyte"
            hashes[name] = hashlib.sha256(content).hexdigest()
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    monkeypatch.setattr(sources, "IDX_FILES", hashes)
    return folder


@pytest.mark.filterwarnings("ignore")  # TFDS's own
def test_idx_to_tfds_to_cache(idx_dir, tmp_path):
    prepared = sources.prepare("mnist", idx=idx_dir)
    assert (tmp_path / "tfds" / "mnist" / "3.0.1" / "dataset_info.json").is_file()
    assert not list((tmp_path / "tfds").glob(".metalr-*"))
    plain = sources.read_mnist(idx_dir)
    for part in ("train", "test"):  # TFDS shuffles: the same images with the same labels, in another order

        def rows(dataset, part=part):
            images, labels = getattr(dataset, f"{part}_images"), getattr(dataset, f"{part}_labels")
            return sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))

        assert rows(prepared) == rows(plain)
    assert data.load("mnist").sha256 == prepared.sha256
    assert sources.prepare("mnist").sha256 == prepared.sha256  # now from the TFDS folder


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: None, "expected the gzipped IDX file, found none"),
        (lambda raw: raw[:-20], "expected a whole gzip file, got one cut short"),
        (lambda raw: b"<!DOCTYPE html><html>", "expected a gzip file, got an HTML page"),
        (lambda raw: gzip.compress(gzip.decompress(raw)[:-1] + b"\0\1"), "expected sha256 .* got"),
        (lambda raw: raw[:30] + bytes([raw[30] ^ 255]) + raw[31:], "expected"),
    ],
)
def test_damaged_idx_files_are_refused_and_nothing_is_left(idx_dir, tmp_path, damage, message):
    file = idx_dir / "t10k-images-idx3-ubyte.gz"
    content = damage(file.read_bytes())
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=f"t10k-images-idx3-ubyte.gz: {message}") as caught:
        sources.prepare("mnist", idx=idx_dir)
    assert "metalr data prepare mnist --idx DIR" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "tfds").exists()


@pytest.mark.filterwarnings("ignore")
def test_download_by_tfds_with_checksums(idx_dir, tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(idx_dir))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *args: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/"
    infos = {}
    for name in sources.IDX_FILES:
        raw = (idx_dir / f"{name}.gz").read_bytes()
        info = tfds.core.download.checksums.UrlInfo(
            size=len(raw), checksum=hashlib.sha256(raw).hexdigest(), filename=f"{name}.gz"
        )
        infos[f"{sources.MNIST_URL}{name}.gz"] = info
    monkeypatch.setattr(tfds.core.download.checksums, "get_all_url_infos", lambda: dict(infos))
    try:
        folder = sources.download_mnist(tmp_path / "got", url)
        assert len(sources.read_mnist(folder).train_images) == 40
        bad = idx_dir / "train-labels-idx1-ubyte.gz"
        bad.write_bytes(b"<html>" + bad.read_bytes())
        with pytest.raises(DataError, match="the download failed"):
            sources.download_mnist(tmp_path / "again", url)
    finally:
        server.shutdown()
        server.server_close()


def test_no_network_is_one_line():
    with pytest.raises(DataError, match=r"cannot be reached.*--idx DIR.*mnist12k"):
        sources.download_mnist(Path("x"), "http://127.0.0.1:9/")


def write_tfds_set(folder, name, version, config=None, *, sizes=(4,), labels=(0, 1), test_labels=None, names=None):
    """A small TFDS image-classification set, as its own builder would lay it out."""
    import io

    import tensorflow_datasets as tfds
    from PIL import Image

    set_name = name
    configs = [tfds.core.BuilderConfig(name=config, version=version)] if config else []

    with tfds.core.registered.skip_registration():  # several of one name

        class Set(tfds.core.GeneratorBasedBuilder):
            name = set_name
            VERSION = tfds.core.Version(version)
            BUILDER_CONFIGS = configs
            pkg_dir_path = None

            def _info(self):
                label = tfds.features.ClassLabel(names=names) if names else tfds.features.ClassLabel(num_classes=30)
                features = {"image": tfds.features.Image(shape=(None, None, 1)), "label": label}
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
                )

            def _split_generators(self, _):
                return {
                    "train": self._generate_examples(labels),
                    "test": self._generate_examples(test_labels or labels),
                }

            def _generate_examples(self, labels):
                for i, label in enumerate(np.repeat(labels, 12)):
                    png = io.BytesIO()
                    size = sizes[i % len(sizes)]
                    Image.fromarray(np.full((size, size), i, np.uint8)).save(png, "PNG")
                    yield i, {"image": png.getvalue(), "label": int(label)}

    tfds.disable_progress_bar()
    options = {"config": config} if config else {}
    Set(data_dir=folder, file_format="array_record", **options).download_and_prepare()


@pytest.mark.filterwarnings("ignore")
def test_one_of_several_prepared_sets_has_to_be_named(tmp_path):
    folder = tmp_path / "tfds"
    for config, version in (("a", "1.0.0"), ("b", "1.0.0"), ("b", "2.0.0")):
        write_tfds_set(folder, "many", version, config)
    for asked in ("many", "many/b", "many:1.0.0"):
        with pytest.raises(DataError, match=r"expected one prepared TFDS dataset, found many/.*:.*, many/.*; name one"):
            sources.prepare(asked)
    prepared = sources.prepare("many/b:2.0.0")
    assert prepared.source == "TFDS many/b:2.0.0"
    assert data.load("many/b:2.0.0").sha256 == prepared.sha256
    assert sources.prepare("many/a").source == "TFDS many/a:1.0.0"
    with pytest.raises(DataError, match=r"expected a prepared TFDS dataset"):
        sources.prepare("many/c")


@pytest.mark.filterwarnings("ignore")
def test_any_numbering_and_any_split_of_classes(tmp_path):
    folder = tmp_path / "tfds"
    write_tfds_set(folder, "gaps", "1.0.0", labels=(3, 9))
    dataset = sources.prepare("gaps")
    assert (dataset.classes, dataset.class_names) == (2, ("3", "9"))
    write_tfds_set(folder, "named", "1.0.0", names=["zebra", "ant"])
    assert sources.prepare("named").class_names == ("zebra", "ant")  # TFDS's order stays
    write_tfds_set(folder, "disjoint", "1.0.0", labels=range(8), test_labels=range(8, 12))
    dataset = sources.prepare("disjoint")
    assert dataset.class_split == ("train",) * 7 + ("val",) + ("test",) * 4


@pytest.mark.filterwarnings("ignore")
def test_images_of_several_sizes_are_not_called_damaged(tmp_path):
    write_tfds_set(tmp_path / "tfds", "sizes", "1.0.0", sizes=(4, 5))
    message = r"images of one size, got 2 sizes in 'train', from \(4, 4, 1\) to \(5, 5, 1\)"
    with pytest.raises(DataError, match=message) as said:
        sources.prepare("sizes")
    assert "delete" not in str(said.value)
    record = next((tmp_path / "tfds" / "sizes").glob("**/*.array_record*"))
    record.write_bytes(record.read_bytes()[:40])
    with pytest.raises(DataError, match="cannot be read: .*; if they are damaged, delete"):
        sources.prepare("sizes")


def test_what_cannot_be_prepared():
    with pytest.raises(DataError, match="expected a prepared TFDS dataset"):
        sources.prepare("fashion_mnist")
    with pytest.raises(DataError, match="--idx: expected the name mnist"):
        sources.prepare("other", idx=Path("."))


@pytest.mark.skipif(not REAL, reason="METALR_MNIST_IDX names no folder with the real MNIST")
def test_bundled_is_a_subset_of_the_real_mnist():
    full, subset = sources.read_mnist(Path(REAL or "")), data.bundled()
    for digit in range(10):
        np.testing.assert_array_equal(
            full.train_images[full.train_labels == digit][:1000], subset.train_images[subset.train_labels == digit]
        )
        np.testing.assert_array_equal(
            full.test_images[full.test_labels == digit][:200], subset.test_images[subset.test_labels == digit]
        )


def pictures(folder, sizes=((30, 40),), classes=("ant", "bee/small", "cat"), count=12):
    from PIL import Image

    for c, label in enumerate(classes):
        (folder / label).mkdir(parents=True)
        for i in range(count):
            pixels = np.full((*sizes[i % len(sizes)], 3), 15 * c + i, np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i:02}.{('png', 'jpg')[i % 2]}")
    (folder / "notes.txt").write_text("not a picture")
    return folder


def test_folders_of_pictures(tmp_path):
    folder = pictures(tmp_path / "insects", sizes=((30, 40), (50, 20)))
    with pytest.raises(DataError, match=r"expected pictures of one size, got 40x30 \(00.png\) and 20x50 .*pass --size"):
        sources.read_folder(folder)
    dataset = sources.read_folder(folder, size=8)
    assert (dataset.name, dataset.shape, dataset.class_names) == ("insects", (8, 8, 3), ("ant", "bee/small", "cat"))
    assert (len(dataset.train_images), len(dataset.test_images)) == (30, 6)
    gray = sources.read_folder(folder, size=8, gray=True)
    assert gray.shape == (8, 8, 1)
    values = gray.train_images[gray.train_labels == 2].mean((1, 2, 3))
    assert set(np.round(values).astype(int)) <= set(range(29, 43))  # 30 and up, as they were painted; JPEG is near
    (folder / "cat" / "00.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"00.png: cannot be read as a picture"):
        sources.read_folder(folder, size=8)
    with pytest.raises(DataError, match="expected pictures in a folder for each class"):
        sources.read_folder(folder / "ant")
    with pytest.raises(DataError, match="expected a folder with a folder of pictures"):
        sources.read_folder(tmp_path / "none")


def test_pictures_of_all_kinds_keep_what_they_show(tmp_path):
    """A dark glyph on a light ground: also with the ground transparent, and in 16 bits."""
    from PIL import Image

    glyph = np.full((6, 6), 255, np.uint8)
    glyph[2:4] = 0
    clear = np.stack([np.zeros_like(glyph)] * 3 + [255 - glyph], axis=-1)
    kinds = {
        "gray": Image.fromarray(glyph),
        "transparent": Image.fromarray(clear, "RGBA"),
        "gray with transparency": Image.fromarray(clear[..., 2:], "LA"),
        "deep": Image.fromarray(glyph.astype(np.uint16) * 257),
        "bits": Image.fromarray(glyph > 0),
    }
    for name, picture in kinds.items():
        for i in range(2):
            (tmp_path / "set" / name).mkdir(parents=True, exist_ok=True)
            picture.save(tmp_path / "set" / name / f"{i}.png")
    (tmp_path / "set" / "gray" / "._0.png").write_bytes(b"what another system leaves")
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "set" / "deep")
    (tmp_path / "set" / "deep" / "round").symlink_to(tmp_path / "set")
    for gray in (True, False):
        dataset = sources.read_folder(tmp_path / "set", gray=gray)
        assert dataset.classes == 6
        for image in dataset.train_images:
            np.testing.assert_array_equal(image, np.repeat(glyph[..., None], image.shape[-1], -1))
    for values in (glyph.astype(np.int32), glyph / np.float32(255)):
        Image.fromarray(values).save(tmp_path / "set" / "gray" / "wide.tif")
        with pytest.raises(DataError, match=r"wide.tif: expected a picture of 8 or 16 bits, got one of 32"):
            sources.read_folder(tmp_path / "set")
    with pytest.raises(ConfigError, match="size: expected at least 1, got -3"):
        sources.read_folder(tmp_path / "set", size=-3)


def test_folders_of_parts_are_no_classes(tmp_path):
    folder = pictures(tmp_path / "split", classes=("train/ant", "train/bee", "test/ant"), count=2)
    with pytest.raises(DataError, match="expected a folder for each class, got test, train, .* import one of them"):
        sources.read_folder(folder, size=8)
    assert sources.read_folder(folder / "train", size=8).class_names == ("ant", "bee")


def test_other_data_are_not_replaced_in_silence(tmp_path, capsys):
    from metalr import cli

    for i, classes in enumerate((("a", "b"), ("a", "b", "c"))):
        pictures(tmp_path / str(i) / "images", classes=classes)
    first, second = (["data", "import", str(tmp_path / str(i) / "images"), "--size", "8"] for i in (0, 1))
    for call in (first, first):  # the same again is no loss
        cli.main(call)
    with pytest.raises(SystemExit):
        cli.main(second)
    assert "expected a new name, got that of other data (images: 20 train" in capsys.readouterr().err
    cli.main([*second, "--overwrite"])
    assert data.load("images").classes == 3


def test_pictures_from_the_command_line_to_a_run(tmp_path, capsys):
    from metalr import cli

    folder = pictures(tmp_path / "insects", classes=tuple(f"c{i}" for i in range(12)))
    cli.main(["data", "import", str(folder), "--size", "8", "--gray"])
    assert "8x8x1, 12 classes" in capsys.readouterr().out
    cli.main([
        "train", "--data", "insects", "--tasks.family", "classes", "--tasks.turns", "False", "--tasks.way", "2",
        "--tasks.query", "3", "--outer.steps", "2", "--outer.meta-batch", "2", "--evaluation.episodes", "4",
        "--evaluation.validation-episodes", "2", "--model.widths", "8", "--out", str(tmp_path / "run"),
    ])  # fmt: skip
    assert "classes 2-way 1-shot" in capsys.readouterr().out
    cli.main(["data", "list"])
    assert "MiB" in capsys.readouterr().out
    cli.main(["data", "remove", "insects"])
    assert data.names() == ["mnist12k"]
    with pytest.raises(DataError, match="expected a prepared dataset, have none"):
        data.remove("insects")


def write_idx(folder: Path, name: str, array: np.ndarray, packed: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.gz" if packed else folder / name
    file.write_bytes(gzip.compress(idx_bytes(array)) if packed else idx_bytes(array))
    return file


@pytest.fixture
def clothes(tmp_path):
    """A set in MNIST's layout, but of its own size and labels."""
    rng, folder = np.random.default_rng(0), tmp_path / "clothes"
    for part, count in (("emnist-mine-train", 60), ("emnist-mine-test", 20)):
        write_idx(folder, f"{part}-images-idx3-ubyte", rng.integers(0, 256, (count, 8, 8)), part.endswith("test"))
        write_idx(folder, f"{part}-labels-idx1-ubyte", np.arange(count) % 5)
    return folder


def test_any_set_in_mnists_layout(clothes):
    assert sources.holds_idx(clothes)
    dataset = sources.read_idx(clothes)
    assert (dataset.name, dataset.shape, dataset.classes) == ("clothes", (8, 8, 1), 5)
    assert (len(dataset.train_images), len(dataset.test_images)) == (60, 20)
    raw = np.frombuffer((clothes / "emnist-mine-train-images-idx3-ubyte").read_bytes(), np.uint8, offset=16)
    by_class = np.argsort(np.arange(60) % 5, kind="stable")
    kept = dataset.train_images[np.argsort(dataset.train_labels, kind="stable"), ..., 0]
    assert np.array_equal(kept, raw.reshape(60, 8, 8)[by_class])
    (clothes / "emnist-mine-train-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(60) % 5))  # beside its .gz
    (clothes / "train-images-idx3-ubyte").mkdir()  # a folder beside the file, as some archives have it
    assert sources.read_idx(clothes).sha256 == dataset.sha256
    for file in clothes.glob("*test*"):
        file.unlink()
    alone = sources.read_idx(clothes, name="alone")  # a sixth of each class becomes the test part
    assert (alone.name, len(alone.train_images), len(alone.test_images)) == ("alone", 50, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "emnist-mine-test-labels-idx1-ubyte.gz").unlink(), "the test part's labels .*, got none"),
        (
            lambda f: write_idx(f, "other-train-labels-idx1-ubyte", np.arange(3)),
            "one IDX file of the train part's labels .*, got emnist-mine-train.*, other-train.*; keep one set",
        ),
        (
            lambda f: write_idx(f, "emnist-mine-train-images-idx3-ubyte", np.arange(3), packed=False),
            "train-images-idx3-ubyte: expected an IDX file of bytes in 3 dimensions",
        ),
        (
            lambda f: (f / "emnist-mine-train-images-idx3-ubyte").write_bytes(idx_bytes(np.zeros((4, 8, 8)))[:-1]),
            "train-images-idx3-ubyte: expected 4 x 8 x 8 bytes, as it says, got 255; get it again",
        ),
        (
            lambda f: (f / "emnist-mine-train-images-idx3-ubyte").write_bytes(bytes([0, 0, 8, 3, 0])),
            "train-images-idx3-ubyte: expected an IDX file with its 3 sizes, got one cut short",
        ),
        (
            lambda f: (f / "emnist-mine-train-labels-idx1-ubyte.gz").write_bytes(b"<html>"),
            "labels-idx1-ubyte.gz: expected a gzip file, got an HTML page; get it again",
        ),
    ],
)
def test_a_set_in_mnists_layout_that_is_not_whole(clothes, change, message):
    change(clothes)
    with pytest.raises(DataError, match=message):
        sources.read_idx(clothes)
