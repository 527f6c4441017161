"""Open the ComfyUI frontend in headless Chromium, load a workflow, optionally run it, save a PNG.

Needs the Python package `playwright` (no browser download: it drives a Chromium that
is installed already, from $CHROMIUM or the PATH).

    python screenshot.py --pack . --workflow example_workflows/a.json --run --out a.png
    python screenshot.py --url http://127.0.0.1:8188 --out default.png

The report (printed as JSON, returned by `screenshot`) names node types the frontend does
not know, console errors, failed requests and how the run ended, so it can be a test too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import sys
import time

# Things that a fresh user folder always misses; they say nothing of a pack.
EXPECTED_404 = (
    "/user.css",
    "/userdata",
    "/i18n",
    "/global_subgraphs",
    "/experiment/",
    "/api/jobs",
    "/api/assets",
    "/workflow_templates",
    "/api/auth",
)

READY = """() => {
  const app = window.app ?? window.comfyAPI?.app?.app;
  if (!(app && app.extensionManager && app.vueAppReady)) return false;
  // Loading a graph before the node definitions are registered marks every node as missing.
  if (!window.LiteGraph?.registered_node_types?.KSampler) return false;
  const graph = app.rootGraph ?? app.graph;
  window.__ready_since ??= Date.now();
  return (graph?._nodes?.length > 0 || Date.now() - window.__ready_since > 8000);
}"""

LISTEN = """() => {
  const app = window.app ?? window.comfyAPI?.app?.app;
  window.__host = {app, ended: null, error: null, progress: 0, previews: 0, started: 0};
  const on = (name, f) => app.api.addEventListener(name, f);
  on('execution_start', () => { window.__host.started += 1; });
  on('execution_success', () => { window.__host.ended ??= 'success'; });
  on('execution_interrupted', () => { window.__host.ended ??= 'interrupted'; });
  on('execution_error', (e) => {
    window.__host.ended ??= 'error';
    window.__host.error = `${e.detail.node_type}: ${e.detail.exception_message}`;
  });
  on('progress', () => { window.__host.progress += 1; });
  on('b_preview', () => { window.__host.previews += 1; });
}"""

LOAD = """async (workflow) => {
  await window.__host.app.loadGraphData(workflow, true, true);
}"""

MISSING = """() => {
  const app = window.__host.app, known = window.LiteGraph?.registered_node_types ?? {};
  const seen = [];
  const walk = (g) => { for (const n of g?._nodes ?? g?.nodes ?? []) {
    seen.push([String(n.id), n.type, n.title]); if (n.subgraph) walk(n.subgraph); } };
  walk(app.rootGraph ?? app.graph);
  return {nodes: seen, missing: seen.filter(([, t]) => !(t in known)).map(([, t]) => t)};
}"""

DIALOGS = """() => [...document.querySelectorAll('.p-dialog, [role=dialog]')]
  .filter((d) => d.offsetParent !== null || d.getClientRects().length)
  .map((d) => d.innerText.trim().slice(0, 400))"""

FIT = """(margin) => {
  const app = window.__host.app, nodes = app.graph._nodes ?? [], ds = app.canvas.ds;
  if (!nodes.length) return;
  let x0 = 1e9, y0 = 1e9, x1 = -1e9, y1 = -1e9;
  for (const n of nodes) {
    x0 = Math.min(x0, n.pos[0]); y0 = Math.min(y0, n.pos[1] - 40);
    x1 = Math.max(x1, n.pos[0] + n.size[0]); y1 = Math.max(y1, n.pos[1] + n.size[1]);
  }
  // Offsets count from the canvas, which begins right of the side bar.
  const at = app.canvas.canvas.getBoundingClientRect();
  const [left, top, right, bottom] = [margin[0] - at.left, margin[1] - at.top, margin[2] + at.left, margin[3] + at.top];
  const w = window.innerWidth - left - right, h = window.innerHeight - top - bottom;
  ds.scale = Math.min(w / (x1 - x0), h / (y1 - y0), 1.2);
  ds.offset[0] = (left + w / 2) / ds.scale - (x0 + x1) / 2;
  ds.offset[1] = (top + h / 2) / ds.scale - (y0 + y1) / 2;
  app.graph.setDirtyCanvas(true, true);
}"""

SET = """async ([key, value]) => {
  await window.__host.app.extensionManager.setting.set(key, value);
}"""

RUN_BUTTON = (
    "button:visible:text-is('Run'), button[aria-label='Run']:visible, [data-testid='queue-button'] button:visible"
)


def queued_prompt(answer):
    return answer.request.method == "POST" and answer.url.endswith("/prompt")


def find_chromium():
    for name in (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"):
        path = shutil.which(name) if name else None
        if path:
            return path
    raise RuntimeError("no Chromium: install one or set CHROMIUM to its path")


@contextlib.contextmanager
def frontend(url, *, size=(1600, 900), chromium=None, settings=None, timeout=180.0, flags=()):
    """Yield (page, report) with the frontend of `url` ready and listeners in place."""
    from playwright.sync_api import sync_playwright

    # Errors until the frontend is ready are kept apart: some frontends have one of their own.
    report = {
        "console_errors": [],
        "page_errors": [],
        "page_errors_at_start": [],
        "failed_requests": [],
        "not_found": [],
    }
    state = {"ready": False}
    with sync_playwright() as p:
        browser = p.chromium.launch(
            executable_path=chromium or find_chromium(),
            args=[
                "--no-sandbox",
                "--disable-dev-shm-usage",
                "--no-proxy-server",
                "--disable-background-networking",
                "--disable-component-update",
                *flags,
            ],
        )
        page = browser.new_page(viewport={"width": size[0], "height": size[1]})
        origin = url.rstrip("/")
        # Nothing outside the host is needed; refuse it rather than wait for it.
        page.route(
            "**/*",
            lambda route: (
                route.continue_() if route.request.url.startswith((origin, "data:", "blob:")) else route.abort()
            ),
        )

        def console(message):
            if message.type == "error" and "Failed to load resource" not in message.text:
                report["console_errors"].append(message.text[:400])

        def response(answer):
            if answer.status >= 400 and not any(s in answer.url for s in EXPECTED_404):
                report["not_found"].append(f"{answer.status} {answer.url[len(origin) :]}")

        page.on("console", console)
        page.on("response", response)
        page.on(
            "pageerror",
            lambda e: report["page_errors" if state["ready"] else "page_errors_at_start"].append(str(e)[:400]),
        )
        page.on(
            "requestfailed",
            lambda r: (
                report["failed_requests"].append(r.url[:200])
                if r.url.startswith(origin) and not any(s in r.url for s in EXPECTED_404)
                else None
            ),
        )
        began = time.monotonic()
        page.goto(origin + "/", wait_until="domcontentloaded", timeout=timeout * 1000)
        # Software rendering can starve requestAnimationFrame, so poll on a timer.
        page.wait_for_function(READY, timeout=timeout * 1000, polling=250)
        page.wait_for_timeout(1000)
        page.evaluate(LISTEN)
        state["ready"] = True
        for key, value in (settings or {}).items():
            page.evaluate(SET, [key, value])
        report["ready_seconds"] = round(time.monotonic() - began, 2)
        report["frontend"] = page.evaluate("() => window.__COMFYUI_FRONTEND_VERSION__ ?? null")
        try:
            yield page, report
        finally:
            browser.close()


def lacks_nodes_2(page, report):
    """Return why Nodes 2.0 of this frontend cannot be tested, or None."""
    if not page.evaluate("() => Boolean(window.LiteGraph.vueNodesMode)"):
        return "this frontend has no Nodes 2.0"
    if str(report["frontend"]).startswith("1.27."):
        return "Nodes 2.0 of this frontend is an unfinished one: it draws no DOM widgets, and the nodes of the workflow before"
    return None


def early_nodes_2(page, report):
    """Whether this is Nodes 2.0 of frontend 1.35: it makes a graph 1.2 times as wide, and shows no widget that a node gets later."""
    return str(report["frontend"]).startswith("1.35.") and page.evaluate("() => Boolean(window.LiteGraph.vueNodesMode)")


def load_workflow(page, report, workflow):
    if not isinstance(workflow, dict):
        workflow = json.loads(pathlib.Path(workflow).read_text(encoding="utf-8"))
    page.evaluate(LOAD, workflow)
    page.wait_for_timeout(500)
    report.update(page.evaluate(MISSING))
    report["dialogs"] = page.evaluate(DIALOGS)


def fit(page, margin=(90, 110, 40, 60)):
    page.evaluate(FIT, list(margin))
    page.wait_for_timeout(700)


def click_run(page):
    """Press the Run button with the mouse; raises where none can be pressed, or where the press queues nothing."""
    with page.expect_response(queued_prompt, timeout=30_000) as queued:
        page.locator(RUN_BUTTON).first.click()
    if queued.value.status != 200:
        raise RuntimeError(f"Run was refused: {queued.value.text()[:400]}")


def wait_for_run(page, report, timeout=300.0):
    with contextlib.suppress(Exception):
        page.wait_for_function("() => window.__host.ended", timeout=timeout * 1000, polling=200)
    state = page.evaluate("() => { const {app, ...rest} = window.__host; return rest; }")
    report["run"] = state
    return state["ended"]


def screenshot(
    url, out, *, workflow=None, run=False, wait=2.0, run_timeout=300.0, fit_view=True, mid_run=None, **kwargs
):
    """Take one screenshot (and, with `mid_run`, another that many seconds into the run)."""
    out = pathlib.Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with frontend(url, **kwargs) as (page, report):
        if workflow is not None:
            load_workflow(page, report, workflow)
        if fit_view:
            fit(page)
        if run:
            click_run(page)
            if mid_run is not None:
                page.wait_for_timeout(mid_run * 1000)
                page.screenshot(path=str(out.with_name(out.stem + "-running" + out.suffix)))
            wait_for_run(page, report, run_timeout)
        page.wait_for_timeout(wait * 1000)
        report["dialogs"] = page.evaluate(DIALOGS)
        page.screenshot(path=str(out))
        report["screenshot"] = out.name
        return report


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", help="a running host; else one is started (see comfy_host.py)")
    parser.add_argument("--pack", action="append", default=[])
    parser.add_argument("--host-arg", action="append", default=[])
    parser.add_argument("--image", action="append", default=[], help="upload to the input folder")
    parser.add_argument("--workflow", help="UI-format workflow JSON")
    parser.add_argument("--run", action="store_true", help="click Run and wait for the end")
    parser.add_argument("--run-timeout", type=float, default=300)
    parser.add_argument("--mid-run", type=float, help="also shoot this many seconds into the run")
    parser.add_argument("--wait", type=float, default=2.0, help="seconds before the image")
    parser.add_argument("--no-fit", action="store_true")
    parser.add_argument("--setting", action="append", default=[], help="KEY=JSON, e.g. Comfy.VueNodes.Enabled=true")
    parser.add_argument("--size", default="1600x900")
    parser.add_argument("--chromium")
    parser.add_argument("--out", default="frontend.png")
    args = parser.parse_args(argv)
    settings = {k: json.loads(v) for k, v in (s.split("=", 1) for s in args.setting)}
    with contextlib.ExitStack() as stack:
        url = args.url
        if url is None:
            from comfy_host import ComfyHost

            host = stack.enter_context(ComfyHost(args.pack, args=args.host_arg, settings=settings))
            for image in args.image:
                host.upload_image(image)
            url = host.url
        report = screenshot(
            url,
            args.out,
            workflow=args.workflow,
            run=args.run,
            wait=args.wait,
            run_timeout=args.run_timeout,
            mid_run=args.mid_run,
            fit_view=not args.no_fit,
            size=tuple(int(n) for n in args.size.split("x")),
            chromium=args.chromium,
            settings=settings,
        )
    print(json.dumps(report, indent=1))
    bad = (
        report["page_errors"]
        or report.get("missing")
        or report["dialogs"]
        or (args.run and report["run"]["ended"] != "success")
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
