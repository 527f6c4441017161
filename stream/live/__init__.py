"""Live streams: frames from a browser or a program over one websocket, through a `StreamBatch`, and back. See docs/live.md."""
