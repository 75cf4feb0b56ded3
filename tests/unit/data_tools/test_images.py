"""`megatrain-data images`: the images and labels of every kind of input, and what is no image."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_samples import RunCommand, folder_bytes
from PIL import Image

from data_tools import units
from megatrain.data import open_dataset
from megatrain.data.images import ImageDataset, decode_image, open_images
from megatrain.errors import DataError
from tests.image_samples import NAMES, Pixels, encoded, make_images, write_folder, write_idx, write_parquet


def packed(run_command: RunCommand, *arguments: object) -> ImageDataset:
    """The dataset that the command makes; its --out comes last."""
    code, _, err = run_command("images", *map(str, arguments[:-1]), "--out", str(arguments[-1]))
    assert code == 0, err
    return open_images(Path(str(arguments[-1])))


def contents(dataset: ImageDataset) -> list[tuple[Pixels, str]]:
    return [(dataset.image(k), dataset.label_names[dataset.label(k)]) for k in range(dataset.num_images)]


def are_same(one: list[tuple[Pixels, str]], other: list[tuple[Pixels, int]]) -> bool:
    labels = [label for _, label in one] == [NAMES[label] for _, label in other]
    return labels and all(np.array_equal(a, b) for (a, _), (b, _) in zip(one, other, strict=True))


def test_class_folders_give_images_with_labels(tmp_path: Path, run_command: RunCommand) -> None:
    images = sorted(make_images(), key=lambda image: image[1])
    write_folder(tmp_path / "in", images)
    (tmp_path / "in" / "cat" / "README").write_text("no image")
    dataset = packed(run_command, tmp_path / "in", tmp_path / "out")
    assert are_same(contents(dataset), images)
    assert dataset.label_names == list(NAMES)
    assert bytes(dataset.file(0)) == (tmp_path / "in" / "cat" / "0000.png").read_bytes()
    assert dataset.document_info(3).source_file.endswith("cat/0003.png")


@pytest.mark.parametrize("labels", ["class labels", "names", "numbers"])
def test_parquet_gives_images_with_labels(labels: str, tmp_path: Path, run_command: RunCommand) -> None:
    images = make_images()
    write_parquet(tmp_path / "a.parquet", images, labels)
    (tmp_path / "names").write_text("\n".join(NAMES))
    given = ["--label-names", tmp_path / "names"] if labels == "numbers" else []
    dataset = packed(run_command, tmp_path / "a.parquet", *given, tmp_path / "out")
    assert are_same(contents(dataset), images)


def test_parquet_with_other_columns_is_read(tmp_path: Path, run_command: RunCommand) -> None:
    images = make_images(6)
    columns = {"png": [encoded(pixels) for pixels, _ in images], "what": [NAMES[label] for _, label in images]}
    pq.write_table(pa.table({**columns, "id": list("abcdef")}), tmp_path / "a.parquet")
    keys = ["--image-key", "png", "--label-key", "what"]
    dataset = packed(run_command, tmp_path / "a.parquet", *keys, tmp_path / "out")
    assert are_same(contents(dataset), images)
    assert dataset.document_info(2).id == "c"


@pytest.mark.parametrize("channels", [1, 3])
def test_idx_files_give_images_with_labels(channels: int, tmp_path: Path, run_command: RunCommand) -> None:
    images = [(pixels[:8], label) for pixels, label in make_images(channels=channels)]
    path = write_idx(tmp_path, images)
    dataset = packed(run_command, path, tmp_path / "out")
    assert dataset.label_names == ["0", "1", "2"]
    found = contents(dataset)
    assert all(np.array_equal(one, other) for (one, _), (other, _) in zip(found, images, strict=True))
    assert [int(name) for _, name in found] == [label for _, label in images]


def test_digest_names_images_and_labels_alone(tmp_path: Path, run_command: RunCommand) -> None:
    images = sorted(make_images(), key=lambda image: image[1])
    write_folder(tmp_path / "in", images)
    write_parquet(tmp_path / "a.parquet", images)
    digests = [
        packed(run_command, tmp_path / name, "--shard-bytes", size, tmp_path / f"out-{name}").digest
        for name, size in (("in", 2000), ("a.parquet", 1 << 20))
    ]
    assert digests[0] == digests[1]
    images[0] = (images[0][0], 1)
    write_parquet(tmp_path / "b.parquet", images)
    assert packed(run_command, tmp_path / "b.parquet", tmp_path / "out-b").digest != digests[0]


def test_bytes_depend_on_no_worker(tmp_path: Path, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "a.parquet", make_images(200))
    options = ["--shard-bytes", "20000"]
    packed(run_command, tmp_path / "a.parquet", *options, "--workers", 1, tmp_path / "one")
    monkeypatch.setattr(units, "PART_BYTES", 4000)
    dataset = packed(run_command, tmp_path / "a.parquet", *options, "--workers", 2, tmp_path / "two")
    assert dataset.num_shards > 2
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")


def hostile_images() -> dict[str, bytes]:
    """Bytes that are no image that is taken, by what is said of them."""
    png = encoded(make_images(1)[0][0])
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    bomb = png[:8] + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[33:]
    return {
        "cannot be decoded": png[: len(png) // 2],
        "more than 67108864 pixels": bomb,
        "it is no image": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    }


@pytest.mark.parametrize("problem", hostile_images())
def test_unusable_image_is_named_in_one_paragraph(problem: str, tmp_path: Path, run_command: RunCommand) -> None:
    write_folder(tmp_path / "in", make_images(6))
    (tmp_path / "in" / "dog" / "bad.png").write_bytes(hostile_images()[problem])
    code, _, err = run_command("images", str(tmp_path / "in"), "--out", str(tmp_path / "out"))
    assert code == 3
    said = err.splitlines()[-1]
    assert "dog/bad.png" in said
    assert problem in said
    code, out, err = run_command("images", str(tmp_path / "in"), "--out", str(tmp_path / "skip"), "--errors", "skip")
    assert code == 0
    assert "6 images" in out
    assert "1 images were left out" in err
    skipped = json.loads((tmp_path / "skip" / "skipped.jsonl").read_text())
    assert problem in skipped["problem"]


def test_check_lists_all_that_is_wrong(tmp_path: Path, run_command: RunCommand) -> None:
    write_folder(tmp_path / "in", make_images(6))
    for number, data in enumerate(hostile_images().values()):
        (tmp_path / "in" / "dog" / f"bad{number}.png").write_bytes(data)
    path = write_idx(tmp_path, [(pixels[:8], label) for pixels, label in make_images(6)], num_labels=5)
    command = ("images", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--check")
    code, out, err = run_command(*command)
    assert code == 3
    assert all(problem in out for problem in hostile_images())
    assert "6 images can" in err
    assert not (tmp_path / "out").exists()
    (tmp_path / "in" / "dog" / "bad0.png").unlink()
    code, out, _ = run_command("images", str(path), "--out", str(tmp_path / "out"), "--check")
    assert code == 3
    assert "6 images, and" in out


WRONG = {
    "5 labels": "6 images, and",
    "no labels": "names no file",
    "cut off": "is cut off",
    "one label": "fewer than two labels ('cat')",
    "two orders": "in several orders",
    "label above": "the label 2 is none of the 2 labels",
    "path alone": "path alone",
    "null": "should be bytes, or bytes and path, not None",
    "no column": "has no column 'image'",
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_told_in_one_paragraph(case: str, tmp_path: Path, run_command: RunCommand) -> None:
    images = [(pixels[:8], label) for pixels, label in make_images(6)]
    more: list[str] = []
    path = tmp_path / "a.parquet"
    if case in ("5 labels", "no labels", "cut off"):
        path = write_idx(tmp_path, images, num_labels=5 if case == "5 labels" else None)
        if case == "no labels":
            (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
        if case == "cut off":
            path.write_bytes(path.read_bytes()[:-200])
    elif case == "one label":
        path = tmp_path / "in"
        write_folder(path, [(pixels, 0) for pixels, _ in images])
    elif case == "no column":
        pq.write_table(pa.table({"picture": [b""], "label": [1]}), path)
    elif case in ("path alone", "null"):
        image = {"bytes": None, "path": "a.png"} if case == "path alone" else None
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        pq.write_table(pa.table({"image": pa.array([image], kind), "label": [1]}), path)
    else:
        write_parquet(path, images, "class labels" if case == "two orders" else "numbers")
    if case == "two orders":
        table = pq.read_table(path)
        features = {"label": {"names": list(reversed(NAMES))}}
        metadata = {b"huggingface": orjson.dumps({"info": {"features": features}})}
        pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "b.parquet")
        more = [str(tmp_path / "b.parquet")]
    if case == "label above":
        (tmp_path / "names").write_text("cat\ndog\n")
        more = ["--label-names", str(tmp_path / "names")]
    code, _, err = run_command("images", str(path), *more, "--out", str(tmp_path / "out"))
    assert code == 3, err
    assert WRONG[case] in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("labels", "names", "told"),
    [
        ([0, 1, 2], ["cat", "dog", "cat"], "Two labels of a table have the name 'cat'"),
        ([0.0, 1.0, 2.0], None, "fewer than two labels (none; those of type float are none)"),
        (["dog", "cat", ""], None, "row 2: the label '' is none of the 2 labels"),
    ],
)
def test_labels_that_name_nothing_are_refused(
    labels: list[Any], names: list[str] | None, told: str, tmp_path: Path, run_command: RunCommand
) -> None:
    (pixels, _), *_ = make_images(1)
    write_parquet(tmp_path / "a.parquet", [(pixels[:8], 0)] * 3, "numbers")
    table = pq.read_table(tmp_path / "a.parquet").set_column(1, "label", pa.array(labels))
    metadata = {b"huggingface": orjson.dumps({"info": {"features": {"label": {"names": names}}}})}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "a.parquet")
    code, _, err = run_command("images", str(tmp_path / "a.parquet"), "--out", str(tmp_path / "out"))
    assert code == 3
    assert told in err
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert "Traceback" not in err


def test_odd_images_become_gray_or_rgb(tmp_path: Path) -> None:
    gray = np.arange(64, dtype=np.uint8).reshape(8, 8)
    wide = Image.fromarray((gray.astype(np.uint16) << 8) + 3)
    color, dithered = Image.fromarray(make_images(1)[0][0]), Image.fromarray(gray).convert("1")
    turned = Image.Exif()
    turned[0x0112] = 6  # rotated by a quarter
    cases = [
        (wide, "PNG", {}, gray[:, :, None]),
        (dithered, "PNG", {}, np.array(dithered.convert("L"))[:, :, None]),
        (Image.fromarray(gray).convert("P"), "PNG", {}, np.repeat(gray[:, :, None], 3, 2)),
        (color.convert("RGBA"), "PNG", {}, np.array(color)),
        (color, "PNG", {"exif": turned}, np.rot90(np.array(color), -1)),
    ]
    for image, form, options, expected in cases:
        image.save(tmp_path / "image", form, **options)
        assert np.array_equal(decode_image((tmp_path / "image").read_bytes()), expected), image.mode
    color.convert("CMYK").save(tmp_path / "cmyk", "JPEG", quality=95)
    found = decode_image((tmp_path / "cmyk").read_bytes())
    assert found.shape == (*color.size[::-1], 3)


def test_verify_finds_each_flipped_bit(tmp_path: Path, run_command: RunCommand) -> None:
    write_folder(tmp_path / "in", make_images(12))
    packed(run_command, tmp_path / "in", tmp_path / "out")
    code, out, _ = run_command("verify", str(tmp_path / "out"))
    assert (code, "is whole: 12 images" in out) == (0, True)
    random = np.random.default_rng(1)
    for path in sorted((tmp_path / "out").iterdir()):
        data = path.read_bytes()
        for place in random.integers(0, len(data), 12).tolist():
            path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
            assert run_command("verify", str(tmp_path / "out"))[0] == 3, (path.name, place)
        path.write_bytes(data)


def test_inspect_shows_labels_sizes_and_an_image(tmp_path: Path, run_command: RunCommand) -> None:
    write_folder(tmp_path / "in", make_images(12))
    packed(run_command, tmp_path / "in", tmp_path / "out")
    code, out, _ = run_command("inspect", str(tmp_path / "out"), "--document", "5", "--json")
    assert code == 0
    described = json.loads(out)
    assert described["labels"] == [{"name": name, "images": 4} for name in NAMES]
    assert described["image"]["label_name"] == "dog"
    assert sum(size["images"] for size in described["sizes"]) == 12
    code, out, _ = run_command("inspect", str(tmp_path / "out"), "--document", "5")
    assert (code, "newt" in out) == (0, True)
    assert run_command("inspect", str(tmp_path / "out"), "--document", "12")[0] == 2


def test_text_and_images_are_told_apart(tmp_path: Path, run_command: RunCommand) -> None:
    write_folder(tmp_path / "in", make_images(6))
    packed(run_command, tmp_path / "in", tmp_path / "out")
    with pytest.raises(DataError, match="is a dataset of images"):
        open_dataset(tmp_path / "out")
    code, _, err = run_command("stats", str(tmp_path / "out"))
    assert (code, "is a dataset of images" in err) == (3, True)


def test_same_command_again_is_done(tmp_path: Path, run_command: RunCommand) -> None:
    write_folder(tmp_path / "in", make_images(6))
    command = ("images", str(tmp_path / "in"), "--out", str(tmp_path / "out"))
    assert run_command(*command)[0] == 0
    before = folder_bytes(tmp_path / "out")
    assert run_command(*command)[0] == 0
    assert run_command(*command, "--restart")[0] == 0
    assert folder_bytes(tmp_path / "out") == before
    code, _, err = run_command(*command, "--errors", "skip")
    assert (code, "already holds a dataset" in err) == (2, True)
