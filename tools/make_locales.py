"""Write locales/LANG/nodeDefs.json, which the frontend reads, from tools/locales/LANG.json: python tools/make_locales.py.

The translations are kept by English text: a changed text has none until it is translated again, and tests/test_locales.py names it.
`titles` hold the nodes' names, `names` the inputs and outputs, `descriptions` the nodes' own text, `texts` all tooltips.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCES = ROOT / "tools" / "locales"
Table = dict[str, dict[str, str]]


def tooltip_of(spec: Any) -> str:
    return str(spec[1].get("tooltip", "")) if len(spec) > 1 else ""


def inputs_of(node: Any) -> dict[str, Any]:
    declared = node.INPUT_TYPES()
    return {**declared.get("required", {}), **declared.get("optional", {})}


def missing(nodes: dict[str, Any], titles: dict[str, str], table: Table) -> list[str]:
    """Return what of the nodes has no translation, as "kind: text"."""
    wanted = [("titles", title) for title in titles.values()]
    for id, node in nodes.items():
        wanted += [("descriptions", id), *(("names", name) for name in (*inputs_of(node), *node.RETURN_NAMES))]
        wanted += [
            ("texts", text) for text in (*map(tooltip_of, inputs_of(node).values()), *node.OUTPUT_TOOLTIPS) if text
        ]
    return sorted({f"{kind}: {key}" for kind, key in wanted if not table[kind].get(key, "").strip()})


def translated(nodes: dict[str, Any], titles: dict[str, str], table: Table) -> dict[str, Any]:
    """Return nodeDefs.json of one language; a text without a translation stays English."""

    def entry(name: str, text: str) -> dict[str, str]:
        return {"name": table["names"].get(name, name), **({"tooltip": table["texts"].get(text, text)} if text else {})}

    return {
        id: {
            "display_name": table["titles"].get(titles[id], titles[id]),
            "description": table["descriptions"].get(id, node.DESCRIPTION),
            "inputs": {name: entry(name, tooltip_of(spec)) for name, spec in inputs_of(node).items()},
            "outputs": {str(i): entry(*each) for i, each in enumerate(zip(node.RETURN_NAMES, node.OUTPUT_TOOLTIPS))},
        }
        for id, node in nodes.items()
    }


def written(table: Table) -> str:
    """Return the text of a nodeDefs.json."""
    import slipstream

    made = translated(slipstream.NODE_CLASS_MAPPINGS, slipstream.NODE_DISPLAY_NAME_MAPPINGS, table)
    return json.dumps(made, ensure_ascii=False, indent=1) + "\n"


def main() -> int:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import _common  # noqa: F401
    import slipstream

    for source in sorted(SOURCES.glob("*.json")):
        table = json.loads(source.read_text(encoding="utf-8"))
        path = ROOT / "locales" / source.stem / "nodeDefs.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(written(table), encoding="utf-8")
        left = missing(slipstream.NODE_CLASS_MAPPINGS, slipstream.NODE_DISPLAY_NAME_MAPPINGS, table)
        print(f"{path.relative_to(ROOT)}: {len(left)} texts without a translation", *left, sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
