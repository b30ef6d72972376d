"""Model presets: the numbers of real networks, read from TOML files in the package of the patterns.

Every file names its sources.
"""

from functools import cache

import msgspec

from ncclbench.config.shipped_files import MODELS
from ncclbench.config.toml_files import decode_toml
from ncclbench.moe.routing import Router


class Layout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a model was distributed over GPUs; None stands for what the source does not state."""

    name: str
    gpus: int
    hardware: str
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    micro_batch: int | None = None
    global_batch: int | None = None
    sequence: int | None = None
    format: str | None = None


class ModelPreset(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One network.

    Attributes:
        title: full name.
        parameters: number of parameters, in words.
        hidden: elements per token.
        layers: number of layers.
        sources: sources of the numbers.
        experts: routed experts; 0 for a dense model.
        top_k: experts per token.
        groups: groups of experts, if the router keeps some of them.
        groups_kept: groups that it keeps.
        moe_layers: layers with experts.
        layout: known distributions over GPUs.
    """

    title: str
    parameters: str
    hidden: int
    layers: int
    sources: list[str]
    experts: int = 0
    top_k: int = 0
    groups: int = 1
    groups_kept: int = 1
    moe_layers: int = 0
    layout: list[Layout] = []

    def router(self) -> Router:
        """The experts that a token chooses from."""
        return Router(experts=self.experts, top_k=self.top_k, groups=self.groups, groups_kept=self.groups_kept)


@cache
def read_model(name: str) -> ModelPreset:
    """The preset called `name`.

    Raises:
        UsageError: if there is none, with the nearest name and all names.
    """
    return decode_toml(MODELS.read(name), ModelPreset, f"{name}.toml")


def model_line(name: str) -> str:
    """The line of a preset in ``ncclbench list models``."""
    model = read_model(name)
    router = f"{model.experts} experts, top {model.top_k}" if model.experts else "dense"
    if model.groups > 1:
        router += f" from {model.groups_kept} of {model.groups} groups"
    layouts = "; ".join(f"{layout.name}: EP {layout.ep}" for layout in model.layout)
    return f"{model.title} ({model.parameters}): hidden {model.hidden}, {router}; {layouts}"
