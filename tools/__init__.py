"""Tools of the repository that are not part of the package; tests import them as `slipstream_tools`."""
