"""Plug-in look-up: built-in by module name, third-party by entry point, and errors that name the choices."""

from importlib import metadata
from pathlib import Path

import pytest

from ncclbench.config import plugins as registry
from ncclbench.config.refusals import unknown
from ncclbench.errors import UsageError
from ncclbench.measure.case import run_case
from ncclbench.plan.plan import Settings, parse_plan
from ncclbench.schedule import Case
from ncclbench.topology import Topology
from ncclbench.transports.threads import play
from tests.helpers.third_party import install

RELAY = '''
"""Rank 0's buffer, in two hops."""
from ncclbench.schedule import Case, GroupParams, Op, Schedule, collective
from ncclbench.topology import Topology


class Params(GroupParams, frozen=True):
    """Parameters of relay."""


def schedule(case: Case, topology: Topology) -> Schedule:
    """A broadcast under another name."""
    return collective(case, topology, Op.BROADCAST, group=case.read(Params).group, root=0)
'''
BUILT_IN = [
    "all_gather",
    "all_reduce",
    "all_to_all",
    "broadcast",
    "gather",
    "hypercube",
    "reduce",
    "reduce_scatter",
    "scatter",
    "send_recv",
]


def test_built_in_patterns_are_found_by_file_name() -> None:
    assert set(registry.names("patterns")) >= set(BUILT_IN)
    assert registry.names("patterns") == sorted(registry.names("patterns"))


def test_shared_modules_are_not_transports() -> None:
    found = registry.names("transports")
    assert set(found) == {"cupy_nccl", "gloo", "mpi", "nccl", "threads"}


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_pattern_loads_and_has_a_docstring(name: str) -> None:
    module = registry.load("patterns", name)
    assert callable(module.schedule)
    assert module.__doc__


def test_unknown_name_names_nearest_and_all() -> None:
    with pytest.raises(UsageError) as caught:
        registry.load("patterns", "all_redcue")
    assert "no pattern 'all_redcue'; did you mean 'all_reduce'? there are: " in str(caught.value)
    assert all(name in str(caught.value) for name in BUILT_IN)


def test_unlike_name_has_no_suggestion() -> None:
    message = unknown("plan", "zzzz", ["quick"])
    assert message == "no plan 'zzzz'; there are: quick"
    assert unknown("plan", "zzzz", []) == "no plan 'zzzz'; there are: none"


def test_third_party_pattern_is_listed_and_run(site: Path) -> None:
    install(site, "[ncclbench.patterns]\nrelay = outsider_relay\n", outsider_relay=RELAY)
    assert "relay" in registry.names("patterns")
    assert registry.exists("patterns", "relay")
    plan = parse_plan('name = "p"\n[[case]]\npattern = "relay"\nbytes = 64\n', "plan.toml")
    assert plan.cases[0].case.id == "relay/float32/64/isolated"
    topology, settings = Topology.single_node(3), Settings(iterations=6, warmup=1)
    measured = play(3, lambda transport: run_case(Case(pattern="relay", nbytes=64), transport, topology, settings))
    assert measured[0] is not None
    assert measured[0].record.status == "ok"


def test_third_party_cannot_hide_a_built_in(site: Path) -> None:
    install(site, "[ncclbench.patterns]\nall_reduce = outsider_fake\n", outsider_fake="raise SystemError\n")
    assert registry.load("patterns", "all_reduce").__name__ == "ncclbench_patterns.all_reduce"
    assert registry.names("patterns").count("all_reduce") == 1


@pytest.mark.parametrize(
    ("value", "modules", "words"),
    [
        (
            "outsider_broken",
            {"outsider_broken": "raise RuntimeError('out of cheese')\n"},
            "does not load: out of cheese",
        ),
        ("outsider_broken", {"outsider_broken": "import nothing_of_this_name\n"}, "nothing_of_this_name"),
        ("outsider_broken", {"outsider_broken": "def f(:\n"}, "does not load"),
        ("outsider_absent", {}, "does not load: No module named 'outsider_absent'"),
        ("outsider_module:absent", {"outsider_module": ""}, "does not load"),
        ("outsider_module:number", {"outsider_module": "number = 3\n"}, "must name a module"),
        ("not a module", {}, "does not load"),
    ],
)
def test_broken_third_party_module_is_one_line(site: Path, value: str, modules: dict[str, str], words: str) -> None:
    install(site, f"[ncclbench.patterns]\nrelay = {value}\n", **modules)
    assert "relay" in registry.names("patterns")  # listing does not import
    with pytest.raises(UsageError) as caught:
        registry.load("patterns", "relay")
    assert "pattern 'relay'" in str(caught.value)
    assert value in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_third_party_pattern_without_schedule_is_refused(site: Path) -> None:
    install(site, "[ncclbench.patterns]\nrelay = outsider_empty\n", outsider_empty='"""Nothing."""\n')
    with pytest.raises(UsageError, match="relay"):
        parse_plan('name = "p"\n[[case]]\npattern = "relay"\nbytes = 64\n', "plan.toml")


def test_third_party_report_and_transport_are_found(site: Path) -> None:
    install(
        site,
        "[ncclbench.reports]\nshout = outsider_shout\n[ncclbench.transports]\npigeon = outsider_pigeon\n",
        outsider_shout="def render(runs):\n    return 'LOUD'\n",
        outsider_pigeon="",
    )
    assert registry.load("reports", "shout").render([]) == "LOUD"
    assert "pigeon" in registry.names("transports")
    assert "pigeon" not in registry.names("patterns")


def test_no_entry_point_repeats_a_built_in() -> None:
    # No package in the test environment replaces a built-in plug-in.
    for kind in ("patterns", "reports", "transports"):
        for point in metadata.entry_points(group=f"ncclbench.{kind}"):
            assert point.name not in registry.builtin_modules(kind)
