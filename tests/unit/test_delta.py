"""Delta files: round trips, equal bytes, and every kind of file that is no whole delta."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from sepme.concepts import Concept
from sepme.delta.concept_delta import ConceptDelta
from sepme.delta.format import FORMAT, MAX_FILE, MAX_HEADER, header_hash
from sepme.delta.library import DeltaLibrary
from sepme.delta.thumbnail import MAX, beside, picture
from sepme.errors import SepMEError

LAYER = "middle_block.1.transformer_blocks.0.attn2"
SHAPES = {f"{LAYER}.to_k": (6, 16), f"{LAYER}.to_v": (6, 16), "input_blocks.1.1.transformer_blocks.0.attn2.to_k": (4, 16)}
INFO = {"known": [{"name": "moon", "prompts": ["moon"]}], "certificate": {"rank": 3}, "recipe": {"seed": 0}, "losses": [0.1, 0.01]}


@pytest.fixture(scope="module")
def delta(make_random_delta: Callable[..., ConceptDelta]) -> ConceptDelta:
    made = make_random_delta("star", SHAPES, gate=0.125, **INFO)
    return replace(made, concept=Concept("stär", ("star", 'a "star"\n'), "shape"))


def same(a: ConceptDelta, b: ConceptDelta) -> bool:
    return (
        a.concept == b.concept
        and torch.equal(a.down, b.down)
        and a.up.keys() == b.up.keys()
        and all(torch.equal(a.up[n], b.up[n]) and a.up[n].dtype == b.up[n].dtype for n in a.up)
        and dict(a.scale) == dict(b.scale)
        and a.gate == b.gate
        and json.dumps(a.info, sort_keys=True) == json.dumps(b.info, sort_keys=True)
    )


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and tensor bytes of a safetensors file."""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:end]), data[end:]


def joined(header: Any, payload: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + payload


def remade(delta: ConceptDelta, change: Callable[[dict[str, Tensor]], Any]) -> bytes:
    """The file with its tensors changed, metadata as it was."""
    tensors = dict(delta.tensors())
    change(tensors)
    return save(tensors, metadata=delta.metadata())


def relabelled(delta: ConceptDelta, **texts: Any) -> bytes:
    """The file with its metadata changed (None: left out), tensors as they were."""
    header, payload = split(delta.to_bytes())
    metadata = header["__metadata__"] | texts
    header["__metadata__"] = {k: v for k, v in metadata.items() if v is not None}
    return joined(header, payload)


def refused(tmp_path: Path, data: bytes, message: str, name: str = "some.safetensors") -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(SepMEError, match=message) as error:
        ConceptDelta.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


# --- what a file holds


def test_round_trip_is_bit_equal(delta: ConceptDelta, tmp_path: Path) -> None:
    path = delta.save(tmp_path / "new folder" / "star.safetensors")
    loaded = ConceptDelta.load(path)
    assert same(loaded, delta)
    assert loaded.content_hash() == delta.content_hash()
    assert loaded.to_bytes() == delta.to_bytes() == path.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(path.parent.iterdir()) == [path]
    delta.save(path)  # over the old one
    assert same(ConceptDelta.load(str(path)), delta)


def test_same_delta_same_bytes(delta: ConceptDelta, tmp_path: Path) -> None:
    """Within a process and in another one (hash seeds differ)."""
    first = delta.to_bytes()
    assert all(delta.to_bytes() == first for _ in range(10))
    turned = replace(delta, up=dict(reversed(delta.up.items())), info=dict(reversed(delta.info.items())))
    assert turned.to_bytes() == first
    (tmp_path / "a.safetensors").write_bytes(first)
    code = "import sys; from sepme.delta.concept_delta import ConceptDelta; ConceptDelta.load(sys.argv[1]).save(sys.argv[2])"
    paths = [str(tmp_path / n) for n in ("a.safetensors", "b.safetensors")]
    subprocess.run(
        [sys.executable, "-c", code, *paths], check=True, cwd=Path(__file__).parents[2], env=os.environ | {"PYTHONHASHSEED": "7"}
    )
    assert Path(paths[1]).read_bytes() == first


def test_the_file_is_plain_safetensors(delta: ConceptDelta, tmp_path: Path) -> None:
    """Other programs read it; header fields are those of the format."""
    from safetensors import safe_open

    path = delta.save(tmp_path / "a.safetensors")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        assert set(file.keys()) == {"down", *(f"up.{n}" for n in SHAPES), *(f"up.{n}.scale" for n in SHAPES)}
        assert torch.equal(file.get_tensor("down"), delta.down)
    assert metadata["format"] == FORMAT
    assert metadata["concept"] == "stär"
    assert json.loads(metadata["prompts"]) == ["star", 'a "star"']
    assert metadata["architecture"] == delta.architecture
    assert float(metadata["gate"]) == 0.125
    assert json.loads(metadata["certificate"]) == {"rank": 3}
    assert metadata["modelspec.title"] == "SepME: stär"
    assert (8 + struct.unpack("<Q", path.read_bytes()[:8])[0]) % 8 == 0  # tensors stay aligned


def test_factors_are_rounded_to_half_with_a_scale(delta: ConceptDelta) -> None:
    """A small β does not sink into subnormals: relative error 2^-11 of the largest entry at any size."""
    generator = torch.Generator().manual_seed(0)
    for size in (1e-12, 1.0, 1e12):
        up = {n: size * torch.randn(s[0], 3, generator=generator) for n, s in SHAPES.items()}
        made = ConceptDelta.from_factors(delta.concept, delta.down, up, 0.1, {})
        for name, value in up.items():
            assert made.up[name].dtype == torch.float16
            assert (made.up_factor(name) - value).abs().max() <= 2**-11 * value.abs().max()
            assert torch.equal(made.weight_delta(name), made.up_factor(name) @ made.down)
    assert (
        ConceptDelta.from_factors(delta.concept, delta.down, {f"{LAYER}.to_k": torch.zeros(6, 3)}, 0.1, {})
        .up_factor(f"{LAYER}.to_k")
        .eq(0)
        .all()
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_diverged_factors_are_refused(delta: ConceptDelta, value: float) -> None:
    up = {f"{LAYER}.to_k": torch.tensor([[0.0, value, 1.0]])}
    with pytest.raises(SepMEError, match=rf"NaN or infinite at {LAYER}\.to_k"):
        ConceptDelta.from_factors(delta.concept, delta.down, up, 0.1, {})


def test_content_hash_sees_tensors(delta: ConceptDelta) -> None:
    """Any tensor, scale or name changes it; metadata does not."""
    name = f"{LAYER}.to_k"
    bits = delta.up[name].clone()
    bits.view(torch.int16)[0, 0] ^= 1
    changed = [
        replace(delta, down=-delta.down),
        replace(delta, up={**delta.up, name: bits}),
        replace(delta, scale={**delta.scale, name: delta.scale[name] * 2}),
        replace(delta, up={n: v for n, v in delta.up.items() if n != name}),
    ]
    assert len({delta.content_hash(), *(d.content_hash() for d in changed)}) == 5
    assert replace(delta, gate=0.5, info={}, concept=Concept("x")).content_hash() == delta.content_hash()


def test_check_fits(delta: ConceptDelta) -> None:
    assert delta.rank == 3
    assert delta.d_in == 16
    assert delta.shapes == SHAPES
    delta.check_fits(dict(reversed(SHAPES.items())))
    wider = {n: (s[0], 32) for n, s in SHAPES.items()}
    with pytest.raises(SepMEError, match=r"'stär' is for unet-16x1-\w+ \(d_in 16, 3 projections\), but the model is unet-32x1"):
        delta.check_fits(wider)
    name = f"{LAYER}.to_k"
    for shapes in ({**SHAPES, name: (7, 16)}, {n: s for n, s in SHAPES.items() if n != name}, {**SHAPES, "more": (6, 16)}, {}):
        with pytest.raises(SepMEError, match="but this UNet is"):
            delta.check_fits(shapes, "this UNet")


# --- bad files


def test_missing_or_no_file(tmp_path: Path) -> None:
    with pytest.raises(SepMEError, match=r"nothing\.safetensors cannot be read \(No such file"):
        ConceptDelta.load(tmp_path / "nothing.safetensors")
    with pytest.raises(SepMEError, match=r"cannot be read \(Is a directory"):
        ConceptDelta.load(tmp_path)


@pytest.mark.parametrize("suffix", [".pt", ".PTH", ".ckpt", ".bin", ".pkl", ".pickle"])
def test_pickles_are_not_opened(tmp_path: Path, suffix: str) -> None:
    """Refused by name: the file need not exist, and a real pickle is not run."""
    with pytest.raises(SepMEError, match="never opened"):
        ConceptDelta.load(tmp_path / f"missing{suffix}")


def test_a_pickle_under_another_name_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "sprung"),))

    torch.save({"down": Trap()}, tmp_path / "x.safetensors")
    with pytest.raises(SepMEError):
        ConceptDelta.load(tmp_path / "x.safetensors")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("data", [b"", b"\x00", b"1234567", b"\x00" * 8, b"\x00" * 64, struct.pack("<Q", 2), struct.pack("<Q", 1) + b"{}"])
def test_empty_and_tiny_files(tmp_path: Path, data: bytes) -> None:
    refused(tmp_path, data, "is no safetensors file or is cut short")


def test_truncated_files(delta: ConceptDelta, tmp_path: Path) -> None:
    """Cut anywhere: in the length, the header, each tensor, one byte short."""
    data = delta.to_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    cuts = {0, 1, 7, 8, 9, 100, header - 1, header, header + 1, len(data) - 1, *range(16, len(data), max(1, len(data) // 60))}
    assert len(cuts) > 60
    for cut in sorted(cuts):
        refused(tmp_path, data[:cut], "cut short|is damaged|get it again")
    refused(tmp_path, data + b"\x00", "is damaged")


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**40])
def test_declared_header_longer_than_the_file(tmp_path: Path, length: int) -> None:
    refused(tmp_path, struct.pack("<Q", length) + b"{}", "cut short")


def test_sizes_are_capped_before_anything_is_read(tmp_path: Path) -> None:
    """Sparse files: a header of 17 MB, a file of more than 1 GB."""
    path = tmp_path / "big.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER + 1))
        file.truncate(MAX_HEADER + 100)
    with pytest.raises(SepMEError, match="its header has 16 MB"):
        ConceptDelta.load(path)
    with open(path, "r+b") as file:
        file.truncate(MAX_FILE + 1)
    with pytest.raises(SepMEError, match="has 1024 MB; a delta has less"):
        ConceptDelta.load(path)


@pytest.mark.parametrize(
    "header", [b"not json at all", b"{", b"\xff\xfe\xfd\xfc", b"[1, 2]", b"3 ", b"[" * 10000, b'{"a": ' + b"9" * 5000 + b"}", b'"x" ']
)
def test_header_is_no_json_object(tmp_path: Path, header: bytes) -> None:
    refused(tmp_path, joined(header), "is no safetensors file")


@pytest.mark.parametrize("metadata", [3, [], {"format": 3}, {"format": FORMAT, "x": None}])
def test_damaged_metadata(tmp_path: Path, metadata: Any) -> None:
    refused(tmp_path, joined({"__metadata__": metadata}), "its metadata is damaged")


@pytest.mark.parametrize(
    "texts",
    [
        {"certificate": '{"gate_low": 1e300}'}, {"certificate": '{"null_dims": ' + "9" * 300 + "}"},
        {"certificate": '{"kept_energy": NaN}'},
        {"certificate": '{"rank": Infinity}'}, {"certificate": '{"mode": 3}'}, {"losses": "[1e999]"}, {"losses": "[true]"},
        {"objective": '{"name": "gcirs", "steps": "many"}'}, {"objective": '{"name": "gcirs", "steps": -1e200}'},
        {"clip_skip": '"one"'}, {"preserve": '{"count": "x"}'}, {"preserve": '{"count": 1, "sha256": 5}'},
        {"recipe": '{"train": {"seed": 36893488147419103232}}'}, {"recipe": '{"plan": {"tolerance": -Infinity}}'},
        {"gate": "nan"}, {"gate": "inf"}, {"gate": "1e7"}, {"gate": "-0.1"},
    ],
)  # fmt: skip
def test_absurd_numbers_in_a_header(delta: ConceptDelta, tmp_path: Path, texts: dict[str, str]) -> None:
    changed = delta.metadata() | texts
    refused(tmp_path, relabelled(delta, **texts, header_hash=header_hash(changed)), "metadata is damaged|is no threshold")


def test_foreign_safetensors(tmp_path: Path) -> None:
    """A LoRA, and a file without metadata."""
    lora = {"lora_unet_mid_block.lora_down.weight": torch.zeros(4, 16), "lora_unet_mid_block.lora_up.weight": torch.zeros(8, 4)}
    refused(tmp_path, save(lora, metadata={"ss_network_dim": "4", "format": "pt"}), "a foreign safetensors file, not sepme.delta/1")
    refused(tmp_path, save(lora), "a foreign safetensors file")


def test_another_version(delta: ConceptDelta, tmp_path: Path) -> None:
    refused(
        tmp_path,
        relabelled(delta, format="sepme.delta/2"),
        "is format 'sepme.delta/2', not sepme.delta/1.*a newer format needs a newer SepME",
    )


NAME = f"up.{LAYER}.to_k"
BAD_TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no down": (lambda t: t.pop("down"), "'down' is missing"),
    "down fp16": (lambda t: t.update(down=t["down"].half()), "'down' is missing or is not a float32 matrix"),
    "down 1-d": (lambda t: t.update(down=t["down"][0].clone()), "'down' is missing or is not a float32 matrix"),
    "down 0 rows": (lambda t: t.update(down=torch.zeros(0, 16)), "impossible shape 0 x 16"),
    "down too many rows": (lambda t: t.update(down=torch.zeros(5000, 1)), "impossible shape 5000 x 1"),
    "down too wide": (lambda t: t.update(down=torch.zeros(1, 40000)), "impossible shape 1 x 40000"),
    "down other rank": (lambda t: t.update(down=torch.zeros(4, 16)), r"has shape \[\d, 3\], expected \(d_out, 4\)"),
    "up fp32": (lambda t: t.update({NAME: t[NAME].float()}), f"{NAME}' is not a float16 matrix"),
    "up bf16": (lambda t: t.update({NAME: t[NAME].bfloat16()}), f"{NAME}' is not a float16 matrix"),
    "up 3-d": (lambda t: t.update({NAME: t[NAME][None].clone()}), f"{NAME}' is not a float16 matrix"),
    "up other rank": (lambda t: t.update({NAME: t[NAME][:, :2].clone()}), r"has shape \[6, 2\], expected \(d_out, 3\)"),
    "up 0 rows": (lambda t: t.update({NAME: t[NAME][:0].clone()}), r"has shape \[0, 3\]"),
    "no scale": (lambda t: t.pop(f"{NAME}.scale"), f"scale of tensor '{NAME}' is missing"),
    "scale 1-d": (lambda t: t.update({f"{NAME}.scale": torch.ones(1)}), f"scale of tensor '{NAME}' is missing"),
    "scale fp64": (lambda t: t.update({f"{NAME}.scale": torch.tensor(1.0, dtype=torch.float64)}), f"scale of tensor '{NAME}' is missing"),
    "scale alone": (lambda t: t.pop(NAME), "foreign tensor"),
    "foreign name": (lambda t: t.update({"extra": torch.zeros(1)}), "foreign tensor 'extra'"),
    "foreign layer": (lambda t: t.update({"up.middle_block.2.transformer_blocks.0.attn2.to_k": t[NAME].clone()}), "foreign tensor"),
    "query": (lambda t: t.update({f"up.{LAYER}.to_q": t[NAME].clone()}), "foreign tensor"),
    "no up": (lambda t: [t.pop(n) for n in list(t) if n != "down"], "no up-factors"),
    "down NaN": (lambda t: t["down"].mul_(float("nan")), "'down' holds NaN"),
    "up inf": (lambda t: t.update({NAME: t[NAME] * float("inf")}), f"'{NAME}' holds NaN"),
    "scale NaN": (lambda t: t.update({f"{NAME}.scale": torch.tensor(float("nan"))}), "holds NaN"),
    "other values": (lambda t: t.update({NAME: -t[NAME]}), "does not match its hash"),
    "other scale": (lambda t: t.update({f"{NAME}.scale": torch.tensor(2.0)}), "does not match its hash"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors(delta: ConceptDelta, tmp_path: Path, case: str) -> None:
    change, message = BAD_TENSORS[case]
    copy = replace(delta, down=delta.down.clone(), up={n: v.clone() for n, v in delta.up.items()})
    refused(tmp_path, remade(copy, change), message)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"concept": None}, "metadata is damaged"),
        ({"concept": ""}, "empty name"),
        ({"prompts": None}, "metadata is damaged"),
        ({"prompts": "star"}, "metadata is damaged"),
        ({"prompts": '"star"'}, "metadata is damaged"),
        ({"prompts": "[1]"}, "metadata is damaged"),
        ({"prompts": '[""]'}, "empty prompt"),
        ({"prompts": '["star"]'}, "does not match its hash"),
        ({"concept": "moon"}, "does not match its hash"),
        ({"anchor": "dot"}, "does not match its hash"),
        ({"gate": None}, "metadata is damaged"),
        ({"gate": "low"}, "metadata is damaged"),
        ({"gate": "nan"}, "is no threshold"),
        ({"gate": "-1"}, "is no threshold"),
        ({"gate": "0.5"}, "does not match its hash"),
        ({"recipe": "{"}, "metadata is damaged"),
        ({"recipe": "[" * 10000}, "metadata is damaged"),
        ({"recipe": "{}"}, "does not match its hash"),
        ({"content_hash": None}, "does not match its hash"),
        ({"content_hash": "0"}, "does not match its hash"),
        ({"header_hash": None}, "does not match its hash"),
    ],
)
def test_bad_metadata(delta: ConceptDelta, tmp_path: Path, texts: dict[str, Any], message: str) -> None:
    refused(tmp_path, relabelled(delta, **texts), message)


def test_a_picture_is_for_show(delta: ConceptDelta, tmp_path: Path) -> None:
    """It travels with the file; hashes do not know it; what is none is left out, and a file that has another one is the same delta."""
    from PIL import Image

    shown = replace(delta, thumbnail=beside(Image.new("RGB", (64, 64), "red"), Image.new("RGB", (512, 512))))
    library = DeltaLibrary(lambda: [tmp_path])
    path = library.save(shown)
    loaded = ConceptDelta.load(path)
    assert (loaded.thumbnail, loaded.content_hash()) == (shown.thumbnail, delta.content_hash())
    assert loaded.to_bytes() == path.read_bytes()
    assert Image.open(io.BytesIO(picture(loaded.thumbnail).data)).size == (256, 128)  # type: ignore[union-attr]
    assert library.save(delta) == path
    assert path.read_bytes() == shown.to_bytes()
    assert library.save(replace(shown, gate=delta.gate / 2)) != path
    for bad in ("data:text/html;base64,AAAA", "data:image/svg+xml;base64,AAAA", "https://example.org/a.jpg", "data:image/jpeg;base64,A"):
        path.write_bytes(relabelled(delta, **{"modelspec.thumbnail": bad}))
        assert ConceptDelta.load(path).thumbnail == ""
    path.write_bytes(relabelled(delta, **{"modelspec.thumbnail": "data:image/jpeg;base64," + "A" * MAX}))
    assert ConceptDelta.load(path).thumbnail == ""


def test_other_tools_may_relabel(delta: ConceptDelta, tmp_path: Path) -> None:
    """modelspec.* is for show: changing it leaves a valid delta."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(relabelled(delta, **{"modelspec.title": "mine", "modelspec.author": "me"}))
    assert same(ConceptDelta.load(path), delta)


def test_overlapping_or_missing_bytes(delta: ConceptDelta, tmp_path: Path) -> None:
    header, payload = split(delta.to_bytes())
    header["down"]["data_offsets"] = [0, 4]
    refused(tmp_path, joined(header, payload), "is damaged")
    header, payload = split(delta.to_bytes())
    refused(tmp_path, joined(header, payload[:-4]), "is damaged")


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_bytes(delta: ConceptDelta, tmp_path: Path, data: st.DataObject) -> None:
    """Any damage is one error, or leaves an equal delta (whitespace, modelspec)."""
    whole = delta.to_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        end = data.draw(st.sampled_from([header, len(whole)]))  # headers are the smaller part
        at = data.draw(st.integers(0, end - 1))
        kind = data.draw(st.sampled_from(["set", "insert", "delete", "repeat", "digit"]))
        if kind == "set":
            damaged[at : at + 1] = bytes([data.draw(st.integers(0, 255))])
        elif kind == "insert":
            damaged[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        elif kind == "delete":
            del damaged[at : at + data.draw(st.integers(1, 16))]
        elif kind == "repeat":
            damaged[at:at] = damaged[at : at + 16]
        else:
            damaged[at : at + 1] = data.draw(st.sampled_from([b"0", b"9", b"-", b"e", b'"', b"{", b"]", b","]))
    path = tmp_path / "mutated.safetensors"
    path.write_bytes(damaged)
    try:
        loaded = ConceptDelta.load(path)
    except SepMEError as error:
        assert "\n" not in str(error)
    else:
        assert same(loaded, delta)


# --- writing


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.suffix == ".part"]


def test_unwritable_folder(delta: ConceptDelta, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for path in (tmp_path / "file" / "a.safetensors", tmp_path / "file" / "deeper" / "a.safetensors", tmp_path / ("x" * 300)):
        with pytest.raises(SepMEError, match=r"cannot be written .*; choose a folder that you may write to"):
            delta.save(path)
    assert (tmp_path / "file").read_bytes() == b"x"
    assert leftovers(tmp_path) == []


def test_target_is_a_folder(delta: ConceptDelta, tmp_path: Path) -> None:
    """The rename fails after the temporary file was written."""
    (tmp_path / "a.safetensors" / "inner").mkdir(parents=True)
    with pytest.raises(SepMEError, match="cannot be written"):
        delta.save(tmp_path / "a.safetensors")
    assert leftovers(tmp_path) == []
    assert (tmp_path / "a.safetensors" / "inner").is_dir()
