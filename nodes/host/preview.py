"""Images shown on a node itself, as the stock PreviewImage shows them."""

from __future__ import annotations

import pathlib
import secrets
from typing import Any

from torch import Tensor

from ...core.images import save_image


def preview_images(images: Tensor) -> dict[str, Any]:
    """Return the `ui` part of a node's result that shows IMAGE (B, H, W, 3); the files lie in the host's temporary folder."""
    import folder_paths

    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
        f"slipstream_{secrets.token_hex(4)}", folder_paths.get_temp_directory(), images.shape[2], images.shape[1]
    )
    shown = []
    for index in range(len(images)):
        file = f"{name}_{counter + index:05}_.png"
        save_image(images[index : index + 1], pathlib.Path(folder) / file)
        shown.append({"filename": file, "subfolder": subfolder, "type": "temp"})
    return {"images": shown}
