"""The TOML loader: nested structs, and errors of one line with the file and the path of the key."""

from pathlib import Path

import msgspec
import pytest

from ncclbench.config.refusals import refuse_newer
from ncclbench.config.shipped_files import MODELS, PLANS, PROFILES, ShippedFiles
from ncclbench.config.toml_files import decode_toml, read_text
from ncclbench.errors import UsageError


class Port(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    rail: int


class Box(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    port: tuple[Port, ...] = ()
    spare: Port | None = None


class File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    schema: int = 1
    box: list[Box] = []
    limits: dict[str, int] = {}
    source: str = ""


def decode(text: str) -> File:
    return decode_toml(text, File, "f.toml", newest=1, hidden=("source",))


def test_tables_become_structs_at_any_depth() -> None:
    text = "[limits]\nanything = 3\n[[box]]\nname = 'b'\nspare = { rail = 2 }\n[[box.port]]\nrail = 1"
    assert decode(text) == File(box=[Box(name="b", port=(Port(rail=1),), spare=Port(rail=2))], limits={"anything": 3})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bxo = 1", "f.toml: unknown key bxo; did you mean 'box'? known: schema, box, limits"),
        ("source = 'x'", "f.toml: unknown key source; did you mean"),
        ("[[box]]\nnaem = 'b'", "f.toml: unknown key box[0].naem; did you mean 'name'? known: name, port, spare"),
        ("[[box]]\nname = 'b'\n[[box]]\nspare = { rial = 1 }", "f.toml: unknown key box[1].spare.rial; did you mean"),
        (
            "[[box]]\nname = 'b'\n[[box.port]]\nrial = 1",
            "f.toml: unknown key box[0].port[0].rial; did you mean 'rail'?",
        ),
        ('"a\\nb" = 1', "f.toml: unknown key 'a\\nb'; did you mean"),
        ("[box]\nname = 'b'", "f.toml: box must be a list: write [[box]], not [box]"),
        ("[[box]]\nname = 'b'\n[box.port]\nrail = 1", "box[0].port must be a list: write [[box.port]], not [box.port]"),
        ("[[box]]\nname = 1", "f.toml: Expected `str`, got `int` - at `$.box[0].name`"),
        ("schema = 2\nnew = 1", "f.toml has schema 2; this ncclbench reads up to 1: use a newer one"),
        ("schema = '2'", "f.toml: Expected `int`, got `str` - at `$.schema`"),
        ("a = = 1", "f.toml: not a TOML file: "),
        ("a = " + "[" * 100_000, "f.toml: not a TOML file: "),
    ],
)
def test_invalid_file_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        decode(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("schema", [1, 0, None, "7"])
def test_only_a_newer_schema_is_refused(schema: object) -> None:
    refuse_newer(schema, 1, "file")
    with pytest.raises(UsageError, match="file has schema 2; this ncclbench reads up to 1"):
        refuse_newer(2, 1, "file")


def test_unreadable_file_names_its_kind(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "marked").write_bytes(b"\xef\xbb\xbfx = 1")
    assert read_text(tmp_path / "marked", "plan") == "x = 1"
    for path in (tmp_path / "latin", tmp_path / "absent", tmp_path, Path("a\0b")):
        with pytest.raises(UsageError, match=r"^cannot read the plan "):
            read_text(path, "plan")


@pytest.mark.parametrize("shipped", [PLANS, PROFILES, MODELS], ids=lambda shipped: shipped.kind)
def test_shipped_files_are_found_by_name(shipped: ShippedFiles) -> None:
    assert list(shipped.titles()) == shipped.names() == sorted(shipped.names())
    for name in shipped.names():
        assert shipped.read_file_or_name(name) == shipped.read(name)
    with pytest.raises(UsageError, match=f"^no {shipped.kind} 'zz'; there are: .*; or give a .toml file$"):
        shipped.read_file_or_name("zz")


def test_directory_does_not_hide_a_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cpu-gloo").mkdir()
    assert PROFILES.read_file_or_name("cpu-gloo") == PROFILES.read("cpu-gloo")
