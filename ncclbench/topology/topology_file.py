"""Reading of topology files: TOML, Slurm's formats, and NCCL's XML.

    schema = 1
    name = "lab 3x2"
    [[node]]
    name = "n0"                # the host name that its ranks report, whole or up to the first dot
    [[node.nic]]
    rail = 0
    device = "rail0"
    leaf = "leaf0"
    gbit_per_s = 0.1
    [[leaf]]
    name = "leaf0"
    spines = ["spine0"]
    uplink_gbit_per_s = 0.1    # each of its uplinks
    [[spine]]
    name = "spine0"
    gbit_per_s = 0.1           # each of its ports

`docs/formats.md` has every key. An unknown key or a contradiction is refused and named.
"""

import hashlib
from pathlib import Path

import msgspec

from ncclbench.config.toml_files import decode_toml
from ncclbench.errors import UsageError
from ncclbench.topology.file_model import SCHEMA, TopologyFile, check_topology
from ncclbench.topology.nccl_xml import nccl_xml
from ncclbench.topology.slurm import slurm_conf, slurm_yaml


def read_topology(path: Path | str) -> TopologyFile:
    """The topology in a file: TOML, Slurm's topology.conf or topology.yaml, or an NCCL topology XML.

    Raises:
        UsageError: naming the file, the key, and what was meant.
    """
    file = Path(path)
    try:
        raw = file.read_bytes()
        text = raw.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the topology {file}: {error}") from None
    parsers = {".xml": nccl_xml, ".conf": slurm_conf, ".yaml": slurm_yaml, ".yml": slurm_yaml}
    found = parsers.get(file.suffix, parse_topology)(text, str(file))
    check_topology(found)
    return msgspec.structs.replace(found, sha256=hashlib.sha256(raw).hexdigest())


def parse_topology(text: str, source: str) -> TopologyFile:
    """The topology in TOML text; `source` is what errors call it. See `read_topology`."""
    found = decode_toml(text, TopologyFile, source, newest=SCHEMA, hidden=("source", "sha256"))
    found = msgspec.structs.replace(found, source=source)
    check_topology(found)
    return found
