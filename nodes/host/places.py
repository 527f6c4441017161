"""Which files a client may read: those in the host's input and models folders, and where the operator allowed it."""

from __future__ import annotations

import os
import pathlib

VARIABLE = "SLIPSTREAM_FOLDERS"


def readable(name: str, value: str) -> pathlib.Path:
    """Return the file or folder that the widget `name` gives, absolute or below the input folder.

    Raises ValueError outside of what is allowed, whether or not there is such a file: whoever can send a prompt could else
    look around on the server. Links are followed first. Without a host there is no client, and any path is returned.
    """
    try:
        import folder_paths
    except ImportError:
        return pathlib.Path(value).expanduser()
    allowed = [os.path.abspath(root) for root in roots()]
    path = os.path.join(folder_paths.get_input_directory(), os.path.expanduser(value.strip()))
    # By its text first: on Windows a look at a path of another machine already signs in there.
    if "\0" not in path and _within(os.path.abspath(path), [*allowed, *map(os.path.realpath, allowed)]):
        found = os.path.realpath(path)
        if _within(found, [os.path.realpath(root) for root in allowed]):
            return pathlib.Path(found)
    raise ValueError(
        f"Expected `{name}` in ComfyUI's input or models folders, but got {value!r:.200}. Put it there, or let the operator "
        f"allow its folder with the environment variable {VARIABLE}."
    )


def roots() -> list[str]:
    """Return the folders that may be read: input, models with those of extra_model_paths.yaml, and the operator's."""
    import folder_paths

    models = [
        place
        for kind, (places, _) in folder_paths.folder_names_and_paths.items()
        if kind not in ("custom_nodes", "configs")
        for place in places
    ]
    allowed = os.environ.get(VARIABLE, "").split(os.pathsep)
    own = [os.path.expanduser(place) for place in allowed if place.strip()]
    return [folder_paths.get_input_directory(), folder_paths.models_dir, *models, *own]


def _within(path: str, folders: list[str]) -> bool:
    def inside(folder: str) -> bool:
        try:
            return os.path.commonpath([path, folder]) == folder
        except ValueError:  # different drives
            return False

    return any(inside(os.path.normpath(folder)) for folder in folders)


def readable_images(name: str, value: str, below: bool = False) -> list[pathlib.Path]:
    """Return the image files of a folder that a widget gives, as `image_files` does; a link that leads elsewhere is refused."""
    from ...core.images import image_files

    files = image_files(readable(name, value), below, name)
    return [readable(name, str(file)) if file.is_symlink() else file for file in files]
