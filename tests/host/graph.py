"""From a UI-format workflow (what example_workflows/ holds) to the API format that POST /prompt takes.

prompt = to_api(json.loads(path.read_text()), host.object_info())
prompt = to_api(workflow, info, {"KSampler.seed": 3, "12.text": "a red circle"})     # change values: type or node id
result = host.run(prompt)
"""

from __future__ import annotations

from typing import Any

# Drawn by the frontend only; never sent to the server.
FRONTEND_ONLY = {"Note", "MarkdownNote", "Reroute", "PrimitiveNode"}
MUTED, BYPASSED = 2, 4
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


def node(type: str, **inputs: Any) -> dict[str, Any]:
    """Return one node of an API-format prompt: `{"k": node("KSampler", model=["1", 0], seed=3, ...)}`."""
    return {"class_type": type, "inputs": inputs}


def is_widget(spec: list[Any]) -> bool:
    """Whether an input of /object_info is a widget (not a socket): a plain value or a list of choices."""
    options = spec[1] if len(spec) > 1 else {}
    return (isinstance(spec[0], list) or spec[0] in WIDGET_TYPES) and not options.get("forceInput", False)


def all_inputs(info: dict[str, Any]) -> dict[str, list[Any]]:
    """Return {name: spec} of a node's required and optional inputs, in the order in which the frontend draws them."""
    return {**info["input"].get("required", {}), **info["input"].get("optional", {})}


def widget_names(info: dict[str, Any]) -> list[str | None]:
    """Return the input name of each entry of `widgets_values`; None stands for the frontend's own (seed control, upload)."""
    names: list[str | None] = []
    for name, spec in all_inputs(info).items():
        if not is_widget(spec):
            continue
        names.append(name)
        options = spec[1] if len(spec) > 1 else {}
        implied = spec[0] == "INT" and name in ("seed", "noise_seed")
        if options.get("control_after_generate", implied):
            names.append(None)
        if options.get("image_upload"):
            names.append(None)
    return names


def widget_values(node: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """Return {input name: value} of one UI node; raises ValueError when the number of values does not fit the node."""
    names, values = widget_names(info), node.get("widgets_values") or []
    if len(values) != len(names):
        raise ValueError(f"Expected {len(names)} widget values for {node['type']} ({names}), but got {len(values)}.")
    return {name: value for name, value in zip(names, values) if name is not None}


def to_api(
    workflow: dict[str, Any], object_info: dict[str, Any], changes: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return the API-format prompt of a UI-format workflow, with values changed by "NodeType.input" or "id.input"."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt: dict[str, Any] = {}
    for node in workflow["nodes"]:
        if node["type"] in FRONTEND_ONLY or node.get("mode", 0) in (MUTED, BYPASSED):
            continue
        inputs = widget_values(node, object_info[node["type"]])
        for socket in node.get("inputs", []):
            if socket.get("link") is not None:
                inputs[socket["name"]] = links[socket["link"]]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    for key, value in (changes or {}).items():
        owner, name = key.rsplit(".", 1)
        targets = [n for i, n in prompt.items() if owner in (i, n["class_type"])]
        if not targets:
            raise ValueError(f"Expected a node {owner} in the workflow, but got {sorted(prompt)}.")
        for target in targets:
            target["inputs"][name] = value
    return prompt
