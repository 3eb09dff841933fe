"""What the page asks of a real server: deltas listed, installed, renamed, deleted; and everything that it must refuse."""

from __future__ import annotations

import base64
import http.client
import json
import os
import random
import shutil
import struct
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from comfyui.graph import Graph
from comfyui.server import Server, serving
from safetensors.torch import save_file

from sepme.delta.concept_delta import ConceptDelta
from sepme.delta.format import MAX_FILE

pytestmark = pytest.mark.xdist_group("comfyui")

BINARY = {"Content-Type": "application/octet-stream"}
JSON = {"Content-Type": "application/json"}


def ask(server: Server, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> tuple[int, Any]:
    """Status and decoded answer; the path goes out as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        connection.request(method, path, body, dict(headers or {}))
        answer = connection.getresponse()
        data = answer.read()
        return answer.status, json.loads(data) if "json" in answer.headers.get("Content-Type", "") else data
    finally:
        connection.close()


def query(**values: str) -> str:
    return "/sepme/deltas?" + urllib.parse.urlencode(values)


def deltas(server: Server) -> dict[str, Any]:
    status, answer = ask(server, "GET", "/sepme/deltas")
    assert status == 200
    return {d["name"]: d for d in answer["deltas"]}


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and not p.is_symlink()}


@pytest.fixture
def folder(server: Server) -> Iterator[Path]:
    """models/sepme, empty; what other tests have there comes back afterwards."""
    folder = server.base / "models" / "sepme"
    aside = folder.with_name("sepme.aside")
    folder.mkdir(parents=True, exist_ok=True)
    folder.rename(aside)
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)
    aside.rename(folder)


@pytest.fixture(scope="session")
def make_file(make_random_delta: Callable[..., ConceptDelta]) -> Callable[..., bytes]:
    """``make_file(concept, seed)``: the bytes of a small delta with a certificate."""
    layer = "input_blocks.1.1.transformer_blocks.0.attn2"
    certificate = {
        "leakage_linear": {"picasso": 0.02}, "leakage_gated": {"picasso": 0.0}, "kept_energy": 0.4, "gate_low": 0.1, "gate_high": 0.6,
        "gate_overlap": 0.0, "false_touch_rate": 0.0, "rank": 3, "null_dims": 12, "mode": "tolerance", "pooled": None,
    }  # fmt: skip

    def build(concept: str = "van gogh", seed: int = 0) -> bytes:
        shapes = {f"{layer}.to_k": (12, 16), f"{layer}.to_v": (12, 16)}
        return make_random_delta(concept, shapes, seed=seed, gate=0.3, certificate=certificate).to_bytes()

    return build


def test_install_list_rename_delete(server: Server, folder: Path, make_file: Callable[..., bytes]) -> None:
    data = make_file()
    status, facts = ask(server, "POST", query(name="styles/van-gogh.safetensors"), data, BINARY)
    assert status == 200
    assert files(folder) == {"styles/van-gogh.safetensors": data}
    listed = deltas(server)["styles/van-gogh.safetensors"]
    assert listed == facts
    assert (listed["concept"], listed["rank"], listed["grade"], listed["bytes"]) == ("van gogh", 3, "good", len(data))
    assert listed["leakage_by_name"] == {"picasso": 0.02}
    status, facts = ask(server, "POST", "/sepme/deltas/rename", json.dumps({"from": listed["name"], "to": "vincent.safetensors"}), JSON)
    assert (status, facts["name"], facts["content_hash"]) == (200, "vincent.safetensors", listed["content_hash"])
    assert list(deltas(server)) == ["vincent.safetensors"]
    status, answer = ask(server, "DELETE", query(name="vincent.safetensors", content_hash="0" * 64))
    assert status == 404
    assert list(files(folder)) == ["vincent.safetensors"]
    assert ask(server, "DELETE", query(name="vincent.safetensors"))[0] == 404  # no confirmation
    status, answer = ask(server, "DELETE", query(name="vincent.safetensors", content_hash=listed["content_hash"]))
    assert (status, answer) == (200, {"deleted": "vincent.safetensors"})
    assert not files(folder)


def test_pictures(server: Server, folder: Path, make_random_delta: Callable[..., ConceptDelta]) -> None:
    """Of a file's header, as a picture file; without one, or with something else there, 404."""
    shown = "data:image/png;base64," + base64.b64encode(b"a picture").decode()
    for name, text in (("a", shown), ("b", ""), ("c", "data:text/html;base64,AAAA")):
        made = make_random_delta(name, {"input_blocks.1.1.transformer_blocks.0.attn2.to_k": (12, 16)})
        replace(made, thumbnail=text).save(folder / f"{name}.safetensors")
    assert ask(server, "GET", "/sepme/deltas/thumbnail?name=a.safetensors") == (200, b"a picture")
    assert [ask(server, "GET", f"/sepme/deltas/thumbnail?name={n}.safetensors")[0] for n in "bcx"] == [404] * 3
    assert deltas(server)["a.safetensors"]["thumbnail"] is True
    assert deltas(server)["a.safetensors"]["date"] == int(1000 * (folder / "a.safetensors").stat().st_mtime)


def test_nothing_is_replaced_unasked(server: Server, folder: Path, make_file: Callable[..., bytes]) -> None:
    first, second = make_file(seed=1), make_file(seed=2)
    assert ask(server, "POST", query(name="a.safetensors"), first, BINARY)[0] == 200
    assert ask(server, "POST", query(name="a.safetensors"), first, BINARY)[0] == 200  # the same content is there already
    status, answer = ask(server, "POST", query(name="a.safetensors"), second, BINARY)
    assert status == 409
    assert "a.safetensors" in answer["error"]
    assert ask(server, "POST", query(name="a.safetensors", replace="1"), second, BINARY)[0] == 409  # not the flag
    assert files(folder) == {"a.safetensors": first}
    assert ask(server, "POST", query(name="b.safetensors"), second, BINARY)[0] == 200
    rename = json.dumps({"from": "b.safetensors", "to": "a.safetensors"})
    assert ask(server, "POST", "/sepme/deltas/rename", rename, JSON)[0] == 409
    assert files(folder) == {"a.safetensors": first, "b.safetensors": second}
    assert ask(server, "POST", query(name="a.safetensors", replace="true"), second, BINARY)[0] == 200
    assert files(folder)["a.safetensors"] == second


def test_only_whole_deltas_are_installed(server: Server, folder: Path, make_file: Callable[..., bytes], tmp_path: Path) -> None:
    import torch

    good = make_file()
    save_file({"x": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    changed = bytearray(good)
    changed[-1] ^= 1
    bad = {
        "nothing": b"",
        "cut": good[:-5],
        "one bit": bytes(changed),
        "foreign": (tmp_path / "foreign.safetensors").read_bytes(),
        "pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os",
        "header of 2**62 bytes": struct.pack("<Q", 1 << 62) + b"{}",
        "deep header": struct.pack("<Q", 200_000) + b"[" * 200_000,
    }
    for what, data in bad.items():
        status, answer = ask(server, "POST", query(name="bad.safetensors"), data, BINARY)
        assert status == 400, what
        assert answer["error"].endswith(".") or "get it again" in answer["error"], what
        assert str(folder) not in answer["error"], what
        assert not files(folder), what


def test_limits_hold_while_reading(server: Server, folder: Path) -> None:
    for headers in ({"Content-Length": str(MAX_FILE + 1)}, {"Content-Length": "9" * 18}):
        status, answer = ask(server, "POST", query(name="big.safetensors"), b"", BINARY | headers)
        assert (status, list(answer)) == (413, ["error"])
    many = b" " * (3 << 20)
    status, _ = ask(server, "POST", "/sepme/book", iter([many]), JSON)  # chunked: no length is said
    assert status == 413
    assert ask(server, "POST", "/sepme/deltas/rename", many, JSON)[0] == 413
    assert not files(folder)


def test_numbers_that_json_does_not_know(server: Server) -> None:
    for constant in ("NaN", "-Infinity"):
        status, answer = ask(server, "POST", "/sepme/book", f'{{"book": "concepts: [x]", "more": {constant}}}', JSON)
        assert (status, answer) == (400, {"error": "The request is no JSON object."})


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site, same-origin"},
        {"Origin": "https://evil.example", "Host": "192.168.0.5:8188"},
        {"Origin": "null", "Host": "192.168.0.5:8188"},
        {"Origin": "x", "Host": "192.168.0.5:8188"},
        {"Origin": "http://192.168.0.5", "Host": "192.168.0.5:8188"},
    ],
)
def test_other_sites_are_refused(server: Server, folder: Path, make_file: Callable[..., bytes], headers: dict[str, str]) -> None:
    (folder / "a.safetensors").write_bytes(make_file())
    (mine,) = deltas(server).values()
    before = files(folder)
    for method, path, body, more in (
        ("GET", "/sepme/deltas", None, {}),
        ("POST", query(name="b.safetensors"), make_file(seed=3), BINARY),
        ("DELETE", query(name="a.safetensors", content_hash=mine["content_hash"]), None, {}),
        ("POST", "/sepme/deltas/rename", json.dumps({"from": "a.safetensors", "to": "c.safetensors"}), JSON),
        ("GET", "/sepme/deltas/record?name=a.safetensors&embed=true", None, {}),
        ("POST", "/sepme/book", json.dumps({"book": "concepts: [x]"}), JSON),
        ("GET", "/sepme/architecture", None, {}),
    ):
        assert ask(server, method, path, body, {**more, **headers})[0] == 403, (method, path)
    assert files(folder) == before


def test_forms_of_other_sites_are_no_requests(server: Server, folder: Path, make_file: Callable[..., bytes]) -> None:
    """What a form can send without asking (plain text, multipart) is refused by its type, whatever else it says."""
    for kind in ("text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded"):
        assert ask(server, "POST", query(name="a.safetensors"), make_file(), {"Content-Type": kind})[0] == 400
        assert ask(server, "POST", "/sepme/deltas/rename", "{}", {"Content-Type": kind})[0] == 400
    assert not files(folder)


def test_the_page_itself_may(server: Server, folder: Path) -> None:
    own = f"127.0.0.1:{server.port}"
    assert ask(server, "GET", "/sepme/deltas", None, {"Sec-Fetch-Site": "same-origin"})[0] == 200
    assert ask(server, "GET", "/sepme/deltas", None, {"Origin": f"http://{own}"})[0] == 200
    assert ask(server, "GET", "/api/sepme/deltas")[0] == 200  # where the front end asks


NAMES = [
    "../a.safetensors", "..\\a.safetensors", "/etc/a.safetensors", "C:\\a.safetensors", "C:a.safetensors", "a/../../b.safetensors",
    "a/./b.safetensors", "a//b.safetensors", "./a.safetensors", ".a.safetensors", ".git/a.safetensors", "a/.safetensors", ".safetensors",
    "a.safetensors/", "a.safetensors\0.png", "a\n.safetensors", "a.SAFETENSORS ", "a.ckpt", "a", "", "con.safetensors", "x/NUL.safetensors",
    "lpt1.x.safetensors", "a /b.safetensors", "a./b.safetensors", "a:b.safetensors", "a|b.safetensors", "a*.safetensors",
    "file:///etc/passwd.safetensors", "%2e%2e/a.safetensors\0", "\ufeff\0.safetensors", "a" * 300 + ".safetensors",
    "é" * 120 + ".safetensors",
    "1/2/3/4/5.safetensors",
    "link/a.safetensors", "linked.safetensors", "~\x7f.safetensors", "a\u2028.safetensors\x1f", "\ud800.safetensors",
]  # fmt: skip


def test_names_stay_in_the_folder(server: Server, folder: Path, make_file: Callable[..., bytes], tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a.safetensors").write_bytes(make_file())
    (folder / "link").symlink_to(outside)
    (folder / "linked.safetensors").symlink_to(outside / "a.safetensors")
    (folder / "mine.safetensors").write_bytes(make_file(seed=4))
    mine = deltas(server)["mine.safetensors"]["content_hash"]
    theirs = ConceptDelta.load(outside / "a.safetensors").content_hash()
    before, around = files(folder), sorted(p.name for p in server.base.rglob("*.safetensors"))
    for name in NAMES:
        quoted = urllib.parse.quote(name, errors="surrogatepass")
        for flag in ("", "&replace=true"):
            assert ask(server, "POST", f"/sepme/deltas?name={quoted}{flag}", make_file(seed=5), BINARY)[0] == 400, name
        assert ask(server, "POST", "/sepme/deltas/rename", json.dumps({"from": "mine.safetensors", "to": name}), JSON)[0] == 400, name
        assert ask(server, "POST", "/sepme/deltas/rename", json.dumps({"from": name, "to": "new.safetensors"}), JSON)[0] in (400, 404), name
        for content_hash in (mine, theirs):
            assert ask(server, "DELETE", f"/sepme/deltas?name={quoted}&content_hash={content_hash}")[0] in (400, 404), name
    assert files(folder) == before
    assert sorted(p.name for p in server.base.rglob("*.safetensors")) == around
    assert files(outside) == {"a.safetensors": make_file()}
    assert os.readlink(folder / "linked.safetensors") == str(outside / "a.safetensors")


def test_fuzz(server: Server, folder: Path, make_file: Callable[..., bytes]) -> None:
    """Random names, headers, flags and bodies: every answer is a JSON sentence or facts, and only whole deltas ever lie in the folder."""
    draw, start = random.Random(7), server.log.stat().st_size
    alphabet = "ab./\\:%\0\n é\u202e<>|*~$'\"{}[]-_" + "中"
    good = make_file()

    def name() -> str:
        text = "".join(draw.choices(alphabet, k=draw.randrange(12)))
        return text + draw.choice(["", ".safetensors", ".safetensors", ".SafeTensors", ".pt"])

    def content() -> bytes:
        data = bytearray(good)
        for _ in range(draw.choice([0, 1, 5])):
            data[draw.randrange(len(data))] = draw.randrange(256)
        return bytes(data[: draw.choice([len(data), draw.randrange(len(data))])])

    headers = [
        {}, BINARY, JSON, BINARY | {"Origin": "x"}, BINARY | {"Sec-Fetch-Site": "x"}, BINARY | {"Content-Encoding": "gzip"},
        {"Content-Type": "x" * 4000}, JSON | {"Accept": "\xff"}, BINARY | {"Range": "bytes=-1"}, JSON | {"X-Forwarded-Host": "evil"},
    ]  # fmt: skip
    values: list[Any] = [None, 1, [], {}, "a.safetensors", True, "x" * 5000, {"from": "a"}, [[[[]]]]]
    for _ in range(250):
        kind, more = draw.randrange(5), draw.choice(headers)
        quoted = urllib.parse.quote(name(), errors="surrogatepass")
        if kind == 0:
            status, answer = ask(server, "POST", f"/sepme/deltas?name={quoted}&replace={draw.choice(['', 'true', '0'])}", content(), more)
        elif kind == 1:
            status, answer = ask(server, "DELETE", f"/sepme/deltas?name={quoted}&content_hash={quoted}", None, more)
        elif kind == 2:
            body = json.dumps({"from": draw.choice([name(), *values]), "to": draw.choice([name(), *values])})
            status, answer = ask(server, "POST", "/sepme/deltas/rename", body.encode(errors="surrogatepass"), more)
        elif kind == 3:
            body = json.dumps(draw.choice([*values, {"book": draw.choice([name(), *values])}, {"book": "a: &x [*x, *x]"}]))
            status, answer = ask(server, "POST", "/sepme/book", body, more)
        else:
            path = draw.choice(["/sepme/deltas/record?embed=true&name=", "/sepme/architecture?checkpoint="])
            status, answer = ask(server, "GET", path + quoted, None, more)
        assert status < 500, server.log.read_text(errors="replace")[-2000:]
        assert isinstance(answer, dict)
        assert status == 200 or (set(answer) == {"error"} and len(answer["error"]) < 1000)
    for path in folder.rglob("*"):
        assert path.is_dir() or path.name.lower().endswith(".safetensors")
        if path.is_file():
            ConceptDelta.load(path)
    said = server.log.read_bytes()[start:].decode(errors="replace").split("Error handling request")[1:]
    # aiohttp itself says so of a body that is not packed as its header tells, where that arrives behind the answer
    assert [text[:3000] for text in said if "Can not decode content-encoding" not in text] == []


def test_book_and_architecture(server: Server) -> None:
    status, answer = ask(server, "POST", "/sepme/book", json.dumps({"book": "concepts: [van gogh, {name: x, prompts: [y]}]"}), JSON)
    assert (status, [c["name"] for c in answer["concepts"]]) == (200, ["van gogh", "x"])
    status, answer = ask(server, "GET", "/sepme/architecture")
    assert (status, answer["architecture"][:10]) == (200, "unet-384x7")
    assert answer["fits"] == [answer["architecture"], "context-384"]
    assert ask(server, "GET", "/sepme/architecture?checkpoint=..%2F..%2Fx.safetensors")[0] == 400


def test_record_carries_the_file(server: Server, folder: Path, make_file: Callable[..., bytes]) -> None:
    import base64

    (folder / "a.safetensors").write_bytes(make_file())
    status, answer = ask(server, "GET", "/sepme/deltas/record?name=a.safetensors&embed=true")
    ((content_hash, record),) = answer.items()
    assert (status, content_hash) == (200, ConceptDelta.load(folder / "a.safetensors").content_hash())
    assert base64.b64decode(record["data"]) == make_file()
    assert (record["concept"], record["file"]) == ("van gogh", "a.safetensors")
    _, answer = ask(server, "GET", "/sepme/deltas/record?name=a.safetensors")
    assert "data" not in answer[content_hash]


# --- what users have in such folders


def test_files_of_one_content_are_one_row(server: Server, folder: Path, make_file: Callable[..., bytes]) -> None:
    """Copied there by hand, or installed again under another name."""
    data = make_file()
    for name in ("b.safetensors", "a.safetensors", "c/a.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    (row,) = deltas(server).values()
    assert row["name"] == "a.safetensors"
    assert row["copies"] == ["b.safetensors", "c/a.safetensors"]
    status, answer = ask(server, "POST", query(name="another.safetensors"), data, BINARY)
    assert (status, answer["name"]) == (200, "a.safetensors")
    assert not (folder / "another.safetensors").exists()
    assert ask(server, "DELETE", query(name="a.safetensors", content_hash=row["content_hash"]))[0] == 200
    assert deltas(server)["b.safetensors"]["copies"] == ["c/a.safetensors"]


@pytest.mark.parametrize("name", ["con.safetensors", "NUL.x.safetensors", "a?.safetensors", "half ", "what: a name.safetensors"])
def test_a_file_with_a_bad_name_can_be_given_a_good_one(server: Server, folder: Path, make_file: Callable[..., bytes], name: str) -> None:
    name = name if name.endswith(".safetensors") else f"{name}.safetensors"
    (folder / name).write_bytes(make_file())
    body = json.dumps({"from": name, "to": "good.safetensors"})
    status, answer = ask(server, "POST", "/sepme/deltas/rename", body, JSON)
    assert (status, answer.get("name")) == (200, "good.safetensors")
    assert list(files(folder)) == ["good.safetensors"]
    body = json.dumps({"from": "good.safetensors", "to": name})
    assert ask(server, "POST", "/sepme/deltas/rename", body, JSON)[0] == (200 if name.startswith("half") else 400)


def test_linked_folders_and_endings_in_capitals(server: Server, folder: Path, make_file: Callable[..., bytes], tmp_path: Path) -> None:
    """Whatever the node offers can be loaded, and the page lists it; behind a link nothing is renamed or deleted."""
    (tmp_path / "x.safetensors").write_bytes(make_file("behind a link"))
    (folder / "nas").symlink_to(tmp_path)
    (folder / "loop").symlink_to(folder)
    (folder / "STAR.SAFETENSORS").write_bytes(make_file("in capitals", 1))
    found = deltas(server)
    assert set(found) == {"nas/x.safetensors", "STAR.SAFETENSORS"}
    offered = server.get("/object_info/SepMELoadDelta")["SepMELoadDelta"]["input"]["required"]["delta"][1]["options"]
    assert set(found) <= set(offered)
    for name in found:
        graph = Graph()
        graph.add("SepMEExport", deltas=graph.add("SepMELoadDelta", delta=name)[0], filename_prefix="out/")
        run = server.run(graph.prompt)
        assert run.error is None, run.error
    behind = found["nas/x.safetensors"]
    status, answer = ask(server, "DELETE", query(name=behind["name"], content_hash=behind["content_hash"]))
    assert status == 400
    assert "link to another place" in answer["error"]
    assert (tmp_path / "x.safetensors").exists()


@pytest.fixture(scope="module")
def two_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """A server whose extra_model_paths.yaml has a folder of deltas of its own, as the default one."""
    second = tmp_path_factory.mktemp("second")
    (second / "deltas").mkdir()
    paths = f"mine:\n  base_path: {second}\n  is_default: true\n  sepme: deltas\n"
    with serving(tmp_path_factory.mktemp("comfyui"), paths=paths) as running:
        yield running, second / "deltas"


def test_a_second_folder(two_folders: tuple[Server, Path], make_file: Callable[..., bytes]) -> None:
    """A namesake there is found by its hash; what is saved and installed goes to models/sepme."""
    server, second = two_folders
    own = server.base / "models" / "sepme"
    own.mkdir(exist_ok=True)
    (own / "star.safetensors").write_bytes(make_file("star", 1))
    (second / "star.safetensors").write_bytes(make_file("star", 2))
    (second / "only here.safetensors").write_bytes(make_file("moon", 3))
    hashes = {path.parent: ConceptDelta.load(path).content_hash() for path in (own / "star.safetensors", second / "star.safetensors")}
    assert deltas(server)["star.safetensors"]["content_hash"] == hashes[own]
    saved = {}
    for place, content_hash in hashes.items():
        graph = Graph()
        loaded = graph.add("SepMELoadDelta", delta="star.safetensors", content_hash=content_hash)
        save = graph.add("SepMESaveDeltas", deltas=loaded[0], filename_prefix="saved/")
        run = server.run(graph.prompt)
        assert run.error is None, run.error
        saved[place] = next(iter(run.outputs[save]["sepme"][0]))
    assert saved == hashes
    assert {p.name for p in (own / "saved").iterdir()} == {"star.safetensors", "star-2.safetensors"}
    assert ask(server, "POST", query(name="new.safetensors"), make_file("sun", 4), BINARY)[0] == 200
    assert (own / "new.safetensors").exists()
    assert set(files(second)) == {"star.safetensors", "only here.safetensors"}
