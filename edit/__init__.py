"""DiffEditor: move, resize, paste, re-texture and drag in a photo."""
