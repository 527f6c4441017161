"""One real ComfyUI for all tests of this folder; without one they skip, and the terminal summary names it once.

The host is found at COMFYUI_PATH, else ~/ComfyUI; its Python at COMFYUI_PYTHON, else <host>/.venv/bin/python. Fixtures:

    host                 a running `ComfyHost` with the pack (under an awkward folder name) and the probe nodes
    host_models          its folders diffusers/, loras/, controlnet/, checkpoints/: put files there, the host lists them at once
    example(name, {...}) the API-format prompt of an example (its name without the number) or of tests/host/workflows/NAME.json,
                         with values changed ("KSampler.seed": 3)
    inside(script, ...)  the JSON lines that a script of this folder prints in the host's Python
    report(result)       what a probe node found
    complaint(prompt)    what the host says of a mistake, before the run or in it
    cancelled(prompt, when)  runs a prompt, presses cancel, counts the network calls before and after
    lora                 the name of a random LoRA that fits the pocket model, in kohya's layout
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import secrets
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# The pack must load from a folder of any name.
PACK_NAME = "slip-stream.v0"
MODEL_KINDS = ("diffusers", "loras", "controlnet", "checkpoints", "vae", "vae_approx", "embeddings")


def load(name: str) -> Any:
    """Import one of the harness files once, under its own name (screenshot.py imports comfy_host by it)."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


comfy_host = load("comfy_host")
graph = load("graph")


def workflow_file(name: str) -> pathlib.Path:
    """Return the file of an example, named without its number, or of a workflow that the tests alone run."""
    (found,) = [
        *(ROOT / "example_workflows").glob(f"[0-9][0-9] {name}.json"),
        *(HERE / "workflows").glob(f"{name}.json"),
    ]
    return found


def find_host() -> tuple[str, str] | None:
    """Return (checkout, Python) of the host, or None."""
    folder = pathlib.Path(os.environ.get("COMFYUI_PATH", "~/ComfyUI")).expanduser()
    python = os.environ.get("COMFYUI_PYTHON") or str(folder / ".venv" / "bin" / "python")
    return (str(folder), python) if (folder / "main.py").is_file() and pathlib.Path(python).exists() else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if pathlib.Path(str(item.path)).is_relative_to(HERE)]
    for item in ours:
        item.add_marker(pytest.mark.host)
        if find_host() is None:
            item.add_marker(pytest.mark.skip(reason="no ComfyUI here"))  # tests/conftest.py counts these aloud


@pytest.fixture(scope="session")
def checkout() -> tuple[str, str]:
    """The host's folder and its Python, for tests that run code inside it without a server."""
    found = find_host()
    assert found is not None
    return found


@pytest.fixture(scope="session")
def inside(checkout: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[dict[str, Any]]]:
    """Return a function that runs a script of this folder by the Python of the host, and gives the JSON lines that it prints."""

    def run(script: str, *arguments: str) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp("inside")
        (folder / "slipstream").symlink_to(ROOT, target_is_directory=True)
        paths = os.pathsep.join([checkout[0], str(folder), str(HERE)])
        done = subprocess.run(
            [checkout[1], str(HERE / script), *arguments], cwd=checkout[0], capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": paths}, timeout=3000, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


@pytest.fixture(scope="session")
def host_models(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    base = tmp_path_factory.mktemp("host_models")
    for kind in MODEL_KINDS:
        (base / kind).mkdir()
    return base


@pytest.fixture(scope="session")
def host(host_models: pathlib.Path) -> Iterator[Any]:
    found = find_host()
    if found is None:
        pytest.skip("no ComfyUI here")
    models = {kind: [str(host_models / kind)] for kind in MODEL_KINDS}
    packs = [(PACK_NAME, ROOT), ("zz-probe", HERE / "probe_pack")]
    frontend = os.environ.get("COMFYUI_FRONTEND")
    args = ["--preview-method", "auto", *(["--front-end-root", frontend] if frontend else [])]
    args += shlex.split(os.environ.get("COMFYUI_ARGS", ""))
    env: dict[str, str] = {}
    if graph.DEVICE == "gpu":
        # Much is compared with the library in float32, bit by bit for the same seed: a GPU computes so too, and without TF32.
        args += ["--force-fp32", "--fp32-vae", "--deterministic"]
        env["NVIDIA_TF32_OVERRIDE"] = "0"
    made = comfy_host.ComfyHost(
        packs, comfyui=found[0], python=found[1], models=models, args=args, device=graph.DEVICE, env=env
    )
    with made as running:
        # The examples edit the photo that every ComfyUI has; here the host has an input folder of its own.
        running.upload_image(pathlib.Path(found[0]) / "input" / "example.png")
        yield running


@pytest.fixture(scope="session")
def tells_again(host: Any) -> bool:
    """Whether this host gives what a cached node within the graph had shown once more: 0.8.0 does not."""
    told = {"t": graph.node("ProbeTold", value="told"), "show": graph.node("PreviewAny", source=["t", 0])}
    assert "t" in host.run(told).outputs
    return "t" in host.run(told).outputs


@pytest.fixture(scope="session")
def object_info(host: Any) -> dict[str, Any]:
    return host.object_info()


@pytest.fixture(scope="session")
def example(object_info: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    def prompt(name: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
        return graph.to_api(json.loads(workflow_file(name).read_text()), object_info, changes)

    return prompt


@pytest.fixture(scope="session")
def report() -> Callable[[Any], Any]:
    def read(result: Any) -> Any:
        assert result.ok, result.explain()
        (found,) = [ui["report"][0] for ui in result.outputs.values() if "report" in ui]
        return json.loads(found)

    return read


@pytest.fixture(scope="session")
def complaint(host: Any) -> Callable[[dict[str, Any]], str]:
    """Return a function that runs a prompt with a mistake in it and gives what the host says of it: before the run, or in it."""

    def run(prompt: dict[str, Any]) -> str:
        try:
            running = host.submit(prompt)
        except comfy_host.PromptRejected as error:
            return str(error)
        result = running.wait()
        if running.node_errors:
            return "\n".join(comfy_host.node_error_lines(running.node_errors))
        assert result.status == "error", "the host found nothing wrong"
        return result.explain()

    return run


@pytest.fixture
def cancelled(host: Any, report: Callable[[Any], Any]) -> Callable[..., tuple[Any, int, int]]:
    """Return a function that runs a prompt and presses cancel when `when(event)` holds.

    It gives (result, network calls before that, network calls that began after it) of the MODEL that leaves node `model`.
    """

    def run(prompt: dict[str, Any], when: Callable[[Any], bool], model: str = "1") -> tuple[Any, int, int]:
        name = secrets.token_hex(4)
        counted = json.loads(json.dumps(prompt))
        for each in counted.values():
            each["inputs"] = {k: ["count", 0] if v == [model, 0] else v for k, v in each["inputs"].items()}
        counted["count"] = graph.node("ProbeCount", model=[model, 0], name=name)
        running = host.submit(counted)
        running.wait_for(when, timeout=120)
        running.interrupt()
        result = running.wait()
        calls, late = report(host.run({"late": graph.node("ProbeLate", name=name)}))
        return result, calls - late, late

    return run


@pytest.fixture(scope="session")
def lora(host_models: pathlib.Path) -> str:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    tensors = {}
    layers = {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (32, 64),
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q": (96, 96),
        "lora_unet_up_blocks_2_attentions_1_transformer_blocks_0_attn2_to_v": (32, 64),
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (64, 64),
    }
    for name, (out, inner) in layers.items():
        tensors[f"{name}.lora_up.weight"] = torch.randn(out, 4, generator=generator)
        tensors[f"{name}.lora_down.weight"] = 0.3 * torch.randn(4, inner, generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(4.0)
    save_file(tensors, host_models / "loras" / "tiny.safetensors")
    return "tiny.safetensors"
