"""The schemas and field tables in the docs are what the types of the store say."""

import importlib.util
import json
from types import ModuleType

import jsonschema
import msgspec
import pytest

from ncclbench.store.manifest import Manifest
from ncclbench.store.records import Record
from tests.helpers.paths import GOLDEN, SCRIPTS
from tests.helpers.stored import plain

RUNS = sorted((GOLDEN / "runs").glob("**/manifest.json"))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_schemas", SCRIPTS / "make_schemas.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_docs_are_what_the_types_say(script: ModuleType) -> None:
    stale = [path.name for path, text in script.texts().items() if path.read_text() != text]
    assert not stale, "run scripts/make_schemas.py"


@pytest.mark.parametrize("kind", [Manifest, Record])
def test_every_field_is_described_in_order(kind: type[msgspec.Struct], script: ModuleType) -> None:
    for one in script._paths(kind):
        _, attributes = script.described(one)
        assert list(attributes) == [field.name for field in msgspec.structs.fields(one)], one


def test_every_stored_manifest_is_what_its_type_says(script: ModuleType) -> None:
    validate = jsonschema.Draft202012Validator(script.schema_of(Manifest, "manifest.json")).validate
    assert len(RUNS) > 20
    for file in RUNS:
        validate(json.loads(file.read_text()))
        validate(plain(msgspec.json.decode(file.read_bytes(), type=Manifest)))
