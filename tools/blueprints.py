"""A blueprint of an example: its inner nodes as one sub-graph node, which the frontend's node library lists (subgraphs/NAME.json)."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

INPUT, OUTPUT = -10, -20  # what links of a sub-graph come from and go to outside
Json = dict[str, Any]


@dataclass(frozen=True)
class Blueprint:
    """`outside` are the ids of the example's nodes that stay out, `widgets` (node id, name) stand on the sub-graph's node."""

    name: str
    description: str
    outside: frozenset[int]
    widgets: tuple[tuple[int, str], ...]


def identifier(*parts: object) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, "/".join(map(str, ("slipstream", *parts)))))


def blueprint_of(workflow: Json, plan: Blueprint) -> Json:
    """Return the file: a workflow of one node, whose definition holds the inner nodes."""
    inner = [node for node in workflow["nodes"] if node["id"] not in plan.outside and node["type"] != "MarkdownNote"]
    kept = {node["id"] for node in inner}
    by_id = {node["id"]: node for node in workflow["nodes"]}
    feeding = {source for _, source, _, target, *_ in workflow["links"] if target in kept} - kept
    links, entries, exits = [], {}, {}
    for id, source, slot, target, socket, kind in workflow["links"]:
        if source in kept and target in kept:
            links.append(_link(id, source, slot, target, socket, kind))
        elif target in kept:
            entries.setdefault((source, slot, kind), []).append((id, target, socket))
        elif source in kept and target not in feeding:  # what goes in may follow an inner node, as a clip its model
            exits.setdefault((source, slot, kind), []).append(id)
    inputs = [_port(plan, "in", by_id[source]["outputs"][slot]["name"].lower(), kind, [e[0] for e in ends])
              for (source, slot, kind), ends in entries.items()]  # fmt: skip
    outputs = [
        _port(plan, "out", by_id[source]["outputs"][slot]["name"], kind, ids[:1])
        for (source, slot, kind), ids in exits.items()
    ]
    for at, ((_, _, kind), ends) in enumerate(entries.items()):
        links += [_link(id, INPUT, at, target, socket, kind) for id, target, socket in ends]
    links += [
        _link(ids[0], source, slot, OUTPUT, at, kind) for at, ((source, slot, kind), ids) in enumerate(exits.items())
    ]
    known = {link["id"] for link in links}
    definition = {
        "id": identifier(plan.name), "version": 1, "revision": 0, "config": {}, "name": plan.name,
        "state": {"lastGroupId": 0, "lastNodeId": max(kept), "lastLinkId": max(known), "lastRerouteId": 0},
        "inputNode": {"id": INPUT, "bounding": [0, 100, 120, 60]}, "outputNode": {"id": OUTPUT, "bounding": [2400, 100, 120, 60]},
        "inputs": inputs, "outputs": outputs, "widgets": [], "nodes": [_without(node, known) for node in inner], "groups": [],
        "links": links, "extra": {"BlueprintDescription": plan.description}, "category": "slipstream", "description": plan.description,
    }  # fmt: skip
    node = {
        "id": max(kept) + 1, "type": definition["id"], "title": plan.name, "pos": [0, 0], "size": [400, 240], "flags": {}, "order": 0,
        "mode": 0, "properties": {"proxyWidgets": [[str(id), name] for id, name in plan.widgets]}, "widgets_values": [],
        "inputs": [{"name": port["name"], "type": port["type"], "link": None} for port in inputs],
        "outputs": [{"name": port["name"], "type": port["type"], "links": []} for port in outputs],
    }  # fmt: skip
    return {
        "revision": 0, "last_node_id": node["id"], "last_link_id": 0, "nodes": [node], "links": [], "version": 0.4,
        "definitions": {"subgraphs": [definition]}, "extra": {},
    }  # fmt: skip


def _link(id: int, source: int, slot: int, target: int, socket: int, kind: str) -> Json:
    return {
        "id": id,
        "origin_id": source,
        "origin_slot": slot,
        "target_id": target,
        "target_slot": socket,
        "type": kind,
    }


def _port(plan: Blueprint, side: str, name: str, kind: str, links: Sequence[int]) -> Json:
    return {"id": identifier(plan.name, side, name), "name": name, "type": kind, "linkIds": list(links), "label": name}


def _without(node: Json, known: set[int]) -> Json:
    """A node without links to what stays outside."""
    outputs = [{**each, "links": [i for i in each["links"] or [] if i in known] or None} for each in node["outputs"]]
    return {**node, "outputs": outputs}
