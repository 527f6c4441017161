"""From a UI-format workflow (what example_workflows/ holds) to the API format that POST /prompt takes.

prompt = to_api(json.loads(path.read_text()), host.object_info())
prompt = to_api(workflow, info, {"KSampler.seed": 3, "12.text": "a red circle"})     # change values: type or node id
result = host.run(prompt)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

DEVICE = os.environ.get("COMFYUI_DEVICE", "cpu")  # where the host computes: "cpu" or "gpu"
# Drawn by the frontend only; never sent to the server.
FRONTEND_ONLY = {"Note", "MarkdownNote", "Reroute", "PrimitiveNode"}
MUTED, BYPASSED = 2, 4
# A list of choices, each with further inputs that are named after it: "format", then "format.codec".
DYNAMIC = "COMFY_DYNAMICCOMBO_V3"
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", DYNAMIC}


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


def default_of(spec: list[Any]) -> Any:
    """Return the value that the frontend gives a widget that nothing was saved for."""
    options = spec[1] if len(spec) > 1 else {}
    choices = spec[0] if isinstance(spec[0], list) else options.get("options", [])
    first = choices[0] if choices else {"INT": 0, "FLOAT": 0.0, "BOOLEAN": False}.get(str(spec[0]), "")
    return options.get("default", first["key"] if isinstance(first, dict) else first)


def widgets(info: dict[str, Any], saved: Sequence[Any] = ()) -> Iterator[tuple[str | None, Any]]:
    """Yield (input name, value) of each entry of `widgets_values`; the name None stands for the frontend's own (seed control).

    A newer host's node may have grown widgets after those that were saved: they get their defaults, as in the frontend.
    Raises ValueError when more values were saved than the node has widgets.
    """
    left = list(saved)

    def walk(specs: dict[str, list[Any]], prefix: str = "") -> Iterator[tuple[str | None, Any]]:
        for name, spec in specs.items():
            if not is_widget(spec):
                continue
            value = left.pop(0) if left else default_of(spec)
            yield prefix + name, value
            for own in frontend_widgets(name, spec):
                yield None, left.pop(0) if left else own
            if spec[0] == DYNAMIC:
                chosen = [option for option in spec[1]["options"] if option["key"] == value]
                yield from walk(all_inputs({"input": chosen[0]["inputs"]}) if chosen else {}, f"{prefix}{name}.")

    yield from walk(all_inputs(info))
    if left:
        raise ValueError(f"Expected no more widget values, but got {left} besides those of {list(all_inputs(info))}.")


def frontend_widgets(name: str, spec: list[Any]) -> list[str]:
    """Return the values of the widgets that the frontend adds after this one: the control of a seed, an upload button."""
    options = spec[1] if len(spec) > 1 else {}
    seed = spec[0] == "INT" and name in ("seed", "noise_seed")
    return ["fixed"] * bool(options.get("control_after_generate", seed)) + ["image"] * bool(options.get("image_upload"))


def widget_names(info: dict[str, Any]) -> list[str | None]:
    """Return the input name of each entry of `widgets_values` of a fresh node."""
    return [name for name, _ in widgets(info)]


def widget_values(node: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """Return {input name: value} of one UI node; raises ValueError when it has more values than the node has widgets."""
    return {name: value for name, value in widgets(info, node.get("widgets_values") or []) if name is not None}


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
