"""The pack's nodes, merged from one module per technique; nothing here imports the host at import time."""

from __future__ import annotations

from types import ModuleType

from . import cow, doctor, edit, live, lmd, models, search, show, stream
from .host.live import mount
from .host.memory import follow_host
from .host.warnings import collecting
from .words import ALIASES

MODULES: tuple[ModuleType, ...] = (models, cow, edit, lmd, stream, live, search, show, doctor)

NODE_CLASS_MAPPINGS: dict[str, type] = {
    id: collecting(id, node, name) for module in MODULES for id, (node, name) in module.NODES.items()
}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {id: name for module in MODULES for id, (_, name) in module.NODES.items()}

for id, node in NODE_CLASS_MAPPINGS.items():
    node.SEARCH_ALIASES = [word.strip() for word in ALIASES.get(id, "").split(",")]  # type: ignore[attr-defined]

follow_host()
mount()
