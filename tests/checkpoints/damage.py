"""Damaged and hostile checkpoints, made from whole ones by a seeded generator; a damage changes a folder in place."""

import io
import json
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from avg_llava.checkpoints.checksums import MANIFEST_NAME, compute_checksums
from avg_llava.checkpoints.weight_files import list_tensors, read_tensors, weight_files

FORMS = ("safetensors", "safetensors shards", "archive", "archive shards", "legacy")
CANARY = "canary"  # a file that hostile pickles make in the working directory


def write_weights(folder: Path, tensors: dict[str, torch.Tensor], form: str) -> None:
    """Writes weights as one file or as two shards and their index, in one of FORMS."""
    kind = "safetensors" if form.startswith("safetensors") else "bin"
    stem = "model" if kind == "safetensors" else "pytorch_model"
    names = sorted(tensors)
    if not form.endswith("shards"):
        _write(folder / f"{stem}.{kind}", tensors, form)
        return
    shards = {f"{stem}-00001-of-00002.{kind}": names[::2], f"{stem}-00002-of-00002.{kind}": names[1::2]}
    for file, held in shards.items():
        _write(folder / file, {name: tensors[name] for name in held}, form)
    index = {"metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}}
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))


def _write(file: Path, tensors: dict[str, torch.Tensor], form: str) -> None:
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    if file.suffix == ".safetensors":
        save_file(tensors, file, {"format": "pt"})
    else:
        torch.save(tensors, file, _use_new_zipfile_serialization=form != "legacy")


def remove_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Takes the weights out of a folder."""
    tensors = {name: tensor.clone() for name, tensor in read_tensors(folder).items()}
    for file in (*weight_files(folder), *folder.glob("*.index.json")):
        file.unlink()
    return tensors


@dataclass(frozen=True)
class Damage:
    """A change to a folder; `changes_weights` if loading rightly gives others than before, such as NaN."""

    name: str
    apply: Callable[[Path, random.Random], None]
    changes_weights: bool = False


def _a_file(folder: Path, chance: random.Random) -> Path:
    return chance.choice(weight_files(folder))


def _header_bytes(file: Path) -> list[range]:
    """Positions of everything but the tensors' bytes, which nothing protects in files of others."""
    size = file.stat().st_size
    taken = sorted((tensor.start, tensor.start + tensor.num_bytes) for tensor in list_tensors([file]).values())
    positions, cursor = [], 0
    for start, end in taken:
        positions.append(range(cursor, start))
        cursor = max(cursor, end)
    return [gap for gap in (*positions, range(cursor, size)) if gap]


def flip_header(folder: Path, chance: random.Random) -> None:
    file = _a_file(folder, chance)
    if file.suffix == ".safetensors" or file.read_bytes()[:2] == b"PK":
        position = chance.choice(chance.choice(_header_bytes(file)))
    else:
        position = chance.randrange(500)  # the pickles of a legacy file come first
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def flip_data(folder: Path, chance: random.Random) -> None:
    tensor = chance.choice([each for each in list_tensors(weight_files(folder)).values() if each.num_bytes])
    content = bytearray(tensor.file.read_bytes())
    content[tensor.start + chance.randrange(tensor.num_bytes)] ^= 1 << chance.randrange(8)
    tensor.file.write_bytes(content)


def _overwrite(change: Callable[[bytes, random.Random], bytes]) -> Callable[[Path, random.Random], None]:
    def apply(folder: Path, chance: random.Random) -> None:
        file = _a_file(folder, chance)
        file.write_bytes(change(file.read_bytes(), chance))

    return apply


def _with_header(change: Callable[[dict], None], length: int | None = None) -> Callable[[Path, random.Random], None]:
    """Rewrites the header of a safetensors file; a pickled file becomes one of that header."""

    def apply(folder: Path, chance: random.Random) -> None:
        file = _a_file(folder, chance)
        content = file.read_bytes()
        if file.suffix != ".safetensors":
            content = struct.pack("<Q", 2) + b"{}" + content
        (old,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + old])
        change(header)
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + content[8 + old :])

    return apply


def _first(header: dict) -> dict:
    return header[min(name for name in header if name != "__metadata__")] if len(header) > 1 else header


def _reshape_in_header(header: dict) -> None:
    entry = _first(header)
    entry["shape"] = [*entry.get("shape", []), 2]


def _claim_much(header: dict) -> None:
    entry = _first(header)
    entry.update(dtype="F32", shape=[2**20, 2**20], data_offsets=[0, 2**42])


def _overlap(header: dict) -> None:
    for entry in header.values():
        if "data_offsets" in entry:
            entry["data_offsets"] = [offset - entry["data_offsets"][0] for offset in entry["data_offsets"]]


def _edit_tensors(change: Callable[[dict[str, torch.Tensor], random.Random], None]) -> Callable:
    """Rewrites a file with other tensors, without telling its index."""

    def apply(folder: Path, chance: random.Random) -> None:
        file = _a_file(folder, chance)
        tensors = {name: each.read().clone() for name, each in list_tensors([file]).items()}
        is_archive = file.read_bytes()[:2] == b"PK"
        change(tensors, chance)
        _write(file, tensors, "archive" if is_archive else "legacy")

    return apply


def _matrix(tensors: dict[str, torch.Tensor], chance: random.Random) -> str:
    return chance.choice([name for name, tensor in sorted(tensors.items()) if tensor.ndim == 2])


def _delete(tensors, chance):
    del tensors[chance.choice(sorted(tensors))]


def _rename(tensors, chance):
    name = chance.choice(sorted(tensors))
    tensors[name.replace("weight", "wieght") + "x"] = tensors.pop(name)


def _add(tensors, chance):
    tensors["model.stranger.weight"] = torch.ones(3)


def _cut(tensors, chance):
    name = _matrix(tensors, chance)
    tensors[name] = tensors[name][1:]


def _transpose(tensors, chance):
    name = chance.choice([name for name in sorted(tensors) if len(set(tensors[name].shape)) == 2])
    tensors[name] = tensors[name].transpose(0, 1)


def _flatten(tensors, chance):
    name = _matrix(tensors, chance)
    tensors[name] = tensors[name].flatten()


def _retype(dtype: torch.dtype) -> Callable:
    def change(tensors, chance):
        name = _matrix(tensors, chance)
        tensors[name] = tensors[name].to(dtype)

    return change


def _spoil(value: float) -> Callable:
    def change(tensors, chance):
        tensors[_matrix(tensors, chance)][0, 0] = value

    return change


class _Call:
    """Pickled as a call of a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def _hostile(make: Callable[[], object], protocol: int = 2) -> Callable[[Path, random.Random], None]:
    """Puts an object into a pickled file; a safetensors file is replaced by such a file."""

    def apply(folder: Path, chance: random.Random) -> None:
        file = _a_file(folder, chance)
        tensors = {name: each.read().clone() for name, each in list_tensors([file]).items()}
        legacy = file.read_bytes()[:2] != b"PK"
        content = {"first": make(), **tensors}
        torch.save(content, file, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)

    return apply


def _bare_pickle(folder: Path, chance: random.Random) -> None:
    _a_file(folder, chance).write_bytes(pickle.dumps(_Call(exec, f"open({CANARY!r}, 'w')")))


def _compress(folder: Path, chance: random.Random) -> None:
    """Rewrites an archive with compressed records, which a memory map would take for weights; others become one."""
    file = _a_file(folder, chance)
    tensors = {name: each.read().clone() for name, each in list_tensors([file]).items()}
    archive = io.BytesIO()
    torch.save(tensors, archive)
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))


def _short_record(folder: Path, chance: random.Random) -> None:
    file = _a_file(folder, chance)
    archive = io.BytesIO()
    torch.save({name: each.read().clone() for name, each in list_tensors([file]).items()}, archive)
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(file, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(entry.filename, content[:-4] if entry.filename.endswith("data/3") else content)


def _index(folder: Path) -> Path | None:
    return next(folder.glob("*.index.json"), None)


def _edit_index(change: Callable[[dict, random.Random], object]) -> Callable[[Path, random.Random], None]:
    """Rewrites the index; a folder without gets one, of its single file."""

    def apply(folder: Path, chance: random.Random) -> None:
        file = _index(folder)
        if file is None:
            [single] = weight_files(folder)
            file = folder / f"{single.name}.index.json"
            file.write_text(json.dumps({"weight_map": dict.fromkeys(list_tensors([single]), single.name)}))
        content = json.loads(file.read_text())
        file.write_text(json.dumps(change(content, chance)))

    return apply


def _point(value: object) -> Callable:
    def change(content, chance):
        content["weight_map"][chance.choice(sorted(content["weight_map"]))] = value
        return content

    return change


def _swap(content, chance):
    names = content["weight_map"]
    files = sorted(set(names.values()))
    others = {file: files[index - 1] for index, file in enumerate(files)}
    names.update({name: others[file] for name, file in names.items()})
    return content


def _duplicate(folder: Path, chance: random.Random) -> None:
    first, *others = weight_files(folder)
    for other in others:
        name, tensor = next(iter(list_tensors([first]).items()))
        tensors = {key: each.read().clone() for key, each in list_tensors([other]).items()}
        _write(other, tensors | {name: tensor.read() + 1}, "archive")


def _unlink(folder: Path, chance: random.Random) -> None:
    _a_file(folder, chance).unlink()


def _make_folder(folder: Path, chance: random.Random) -> None:
    file = _a_file(folder, chance)
    file.unlink()
    file.mkdir()


def _dangle(folder: Path, chance: random.Random) -> None:
    file = _a_file(folder, chance)
    file.unlink()
    file.symlink_to(folder / "gone")


ODD_VALUES = (None, 0, -1, 3, 2.5, 10**9, 10**30, "x", "", [], [None], [[1]], {}, {"a": 1}, True)


def _edit_config(folder: Path, chance: random.Random) -> None:
    """Deletes a key of `config.json` or of a part of it, or gives it an odd value."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    part = chance.choice([config, *(value for value in config.values() if isinstance(value, dict) and value)])
    key = chance.choice(sorted(part))
    if chance.random() < 0.2:
        del part[key]
    else:
        part[key] = chance.choice(ODD_VALUES)
    file.write_text(json.dumps(config))


def _text(name: str, content: str) -> Callable[[Path, random.Random], None]:
    def apply(folder: Path, chance: random.Random) -> None:
        (folder / name).write_text(content)

    return apply


def damages() -> Iterator[Damage]:
    """All kinds of damages."""
    yield from (Damage(f"header flip {number}", flip_header) for number in range(4))
    yield Damage("cut", _overwrite(lambda content, chance: content[: chance.randrange(1, len(content))]))
    yield Damage("cut by a byte", _overwrite(lambda content, chance: content[:-1]))
    yield Damage("emptied", _overwrite(lambda content, chance: b""))
    yield Damage("longer", _overwrite(lambda content, chance: content + bytes(7)))
    yield Damage("zeros", _overwrite(lambda content, chance: bytes(len(content))))
    yield Damage("page", _overwrite(lambda content, chance: b"<!DOCTYPE html><html>Not found</html>"))
    yield Damage("pointer", _overwrite(lambda content, chance: b"version https://git-lfs.github.com/spec/v1\noid 0\n"))
    yield Damage("start of an archive", _overwrite(lambda content, chance: b"PK\x03\x04" + content[4:]))
    yield Damage("huge header", _with_header(lambda header: None, length=2**63))
    yield Damage("large header", _with_header(lambda header: None, length=2**33))
    yield Damage("header to the end", _with_header(lambda header: None, length=10**5))
    yield Damage("shape in the header", _with_header(_reshape_in_header))
    yield Damage("claimed size", _with_header(_claim_much))
    yield Damage("overlap", _with_header(_overlap))
    yield Damage("type in the header", _with_header(lambda header: _first(header).update(dtype="F99")))
    yield Damage("deep header", _overwrite(lambda content, chance: struct.pack("<Q", 10**5) + b"[" * 10**5))
    yield Damage("deleted", _edit_tensors(_delete))
    yield Damage("renamed", _edit_tensors(_rename))
    yield Damage("added", _edit_tensors(_add))
    yield Damage("fewer rows", _edit_tensors(_cut))
    yield Damage("transposed", _edit_tensors(_transpose))
    yield Damage("flattened", _edit_tensors(_flatten))
    for dtype in (torch.int8, torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn):
        yield Damage(f"as {dtype}", _edit_tensors(_retype(dtype)))
    yield Damage("NaN", _edit_tensors(_spoil(torch.nan)), changes_weights=True)
    yield Damage("infinite", _edit_tensors(_spoil(-torch.inf)), changes_weights=True)
    for name, call in {
        "exec": lambda: _Call(exec, f"open({CANARY!r}, 'w')"),
        "open": lambda: _Call(open, CANARY, "w"),
        "eval": lambda: _Call(eval, f"open({CANARY!r}, 'w')"),
        "path": lambda: _Call(Path.touch, Path(CANARY)),
        "getattr": lambda: _Call(getattr, Path(CANARY), "touch"),
        "memory": lambda: _Call(bytearray, 10**11),
        "tensor": lambda: _Call(torch.FloatTensor, 10**11),
        "repeated": lambda: torch.ones(1).expand(10**12),
        "no tensor": lambda: {"a": [1, 2]},
        "meta": lambda: torch.empty(10**12, device="meta"),
        "sparse": lambda: torch.eye(3).to_sparse(),
    }.items():
        yield Damage(f"pickled {name}", _hostile(call))
    yield Damage("pickled by protocol 4", _hostile(lambda: _Call(exec, f"open({CANARY!r}, 'w')"), protocol=4))
    yield Damage("bare pickle", _bare_pickle)
    yield Damage("compressed", _compress)
    yield Damage("short record", _short_record)
    for value in ("../model.bin", "/etc/passwd", "a/model.bin", "gone.safetensors", "config.json", None, 3, [], ""):
        yield Damage(f"index to {value!r}", _edit_index(_point(value)))
    yield Damage("index swapped", _edit_index(_swap))
    for number, content in enumerate((None, [], 3, {}, {"weight_map": None}, {"weight_map": []}, {"weight_map": {}})):
        yield Damage(f"index content {number}", _edit_index(lambda old, chance, content=content: content))
    yield Damage("held twice", _duplicate)
    yield Damage("missing", _unlink)
    yield Damage("a folder", _make_folder)
    yield Damage("a dangling link", _dangle)
    yield from (Damage(f"configuration {number}", _edit_config) for number in range(20))
    for content in ("", "null", "[]", "{", '{"model_type": null}', "{}", '"x"', "[" * 10**5):
        yield Damage(f"configuration is {content[:20]!r}", _text("config.json", content))
    for content in ("", "null", "[]", '{"eos_token_id": "x"}', '{"max_length": null}'):
        yield Damage(f"generation configuration is {content!r}", _text("generation_config.json", content))


def protected_damages() -> Iterator[Damage]:
    """Damages to a folder whose manifest has checksums."""
    yield from (Damage(f"data flip {number}", flip_data) for number in range(12))
    yield from (Damage(f"header flip {number}", flip_header) for number in range(4))
    for number, content in enumerate(("", "null", "[]", '{"weights": 3}', '{"weights": {"model.safetensors": 3}}')):
        yield Damage(f"manifest {number}", _text(MANIFEST_NAME, content))
    yield Damage("deleted", _edit_tensors(_delete))
    yield Damage("transposed", _edit_tensors(_transpose))
    yield Damage("another type", _edit_tensors(_retype(torch.float16)))


def protect(folder: Path) -> None:
    """Writes a manifest with checksums."""
    (folder / MANIFEST_NAME).write_text(json.dumps({"weights": compute_checksums(folder)}))


def damaged_copy(whole: Path, copy: Path, damage: Damage, seed: int) -> None:
    """Copies a folder and damages the copy."""
    shutil.copytree(whole, copy)
    damage.apply(copy, random.Random(seed))
